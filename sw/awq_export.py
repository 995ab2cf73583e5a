# SPDX-License-Identifier: Apache-2.0
"""``python -m sw.awq_export``: a Hugging Face folder with quantized layers as a decoder ONNX graph.

    python -m sw.awq_export SRC_DIR --out DIR [--lm-head int8|float]

SRC_DIR holds an AutoAWQ GEMM, GPTQ or compressed-tensors checkpoint. sw.export.huggingface
lists the files that are written into DIR.
"""

from sw.common.errors import run_cli
from sw.console.export_options import export_parser
from sw.export.folder import export_status
from sw.export.huggingface import export_checkpoint


def main() -> None:
    """The command line."""
    options = export_parser(
        "python -m sw.awq_export", "AutoAWQ, GPTQ or compressed-tensors to a decoder ONNX graph", "SRC_DIR"
    ).parse_args()
    with export_status() as progress:
        path = export_checkpoint(options.source, options.out, lm_head=options.lm_head, progress=progress)
    print(path)


if __name__ == "__main__":
    run_cli(main)
