# SPDX-License-Identifier: Apache-2.0
"""``python -m sw.gguf_export``: a GGUF model as a decoder ONNX graph.

    python -m sw.gguf_export SRC.gguf --out DIR [--lm-head int8|float]

sw.export.gguf lists the files that are written into DIR.
"""

from sw.common.errors import run_cli
from sw.console.export_options import export_parser
from sw.export.folder import export_status
from sw.export.gguf import export_gguf


def main() -> None:
    """The command line."""
    options = export_parser("python -m sw.gguf_export", "GGUF to a decoder ONNX graph", "SRC.gguf").parse_args()
    with export_status() as progress:
        path = export_gguf(options.source, options.out, lm_head=options.lm_head, progress=progress)
    print(path)


if __name__ == "__main__":
    run_cli(main)
