# SPDX-License-Identifier: Apache-2.0
"""``python -m sw.awq_export``: an AutoAWQ GEMM checkpoint (Llama or Qwen2 family) as a decoder ONNX graph.

    python -m sw.awq_export SRC_DIR --out DIR [--lm-head int8|float]

sw.export.autoawq lists the files that are written into DIR.
"""

from sw.common.errors import run_cli
from sw.console.export_options import export_parser
from sw.export.autoawq import export_awq
from sw.export.folder import export_status


def main() -> None:
    """The command line."""
    options = export_parser("python -m sw.awq_export", "AutoAWQ GEMM to a decoder ONNX graph", "SRC_DIR").parse_args()
    with export_status() as progress:
        path = export_awq(options.source, options.out, lm_head=options.lm_head, progress=progress)
    print(path)


if __name__ == "__main__":
    run_cli(main)
