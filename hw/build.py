# SPDX-License-Identifier: Apache-2.0
"""``python -m hw.build``: generates Verilog and manifest of one accelerator."""

import argparse
from pathlib import Path

from hw.flows.command_line import add_config_options, config_of, exit_code
from hw.flows.generate import generate, summary, write
from hw.spec.cli import Parser, run_cli
from hw.spec.parts import TARGETS


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m hw.build", description="Generate an accelerator.")
    add_config_options(parser)
    parser.add_argument("--top", default="accelerator", help="generate this block alone (default: the accelerator)")
    parser.add_argument(
        "--target",
        default="generic",
        help=f"one of {', '.join(TARGETS)}: generic is for any part, the others suit one family",
    )
    parser.add_argument("--out", type=Path, default=Path("build/hw"), metavar="DIR", help="folder to write to")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parser().parse_args(arguments)

    def run() -> int:
        config = config_of(options, options.target)
        verilog, manifest = generate(config, options.top, options.target)
        write(options.out, verilog, manifest)
        print(summary(config, options.top, options.out, verilog))
        return 0

    return exit_code(run)


if __name__ == "__main__":
    run_cli(main)
