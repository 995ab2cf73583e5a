# SPDX-License-Identifier: Apache-2.0
"""The options of the commands that export a checkpoint."""

from pathlib import Path

from sw.common.command_line import Parser
from sw.model.lm_head import HEAD_MODES


def export_parser(prog: str, description: str, source: str) -> Parser:
    """The command line that exporters share: options.source, .out and .lm_head."""
    parser = Parser(prog=prog, description=description)
    parser.add_argument("source", type=Path, metavar=source)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--lm-head",
        choices=HEAD_MODES,
        default=HEAD_MODES[0],
        help="a float output layer is quantized to int8 or stays float; one that is quantized stays as it is"
        " (default: %(default)s)",
    )
    return parser
