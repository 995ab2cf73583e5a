# SPDX-License-Identifier: Apache-2.0
"""``python -m hw.build``: Verilog and manifest of one accelerator."""

import argparse
import sys
from pathlib import Path

from hw.flows.command_line import add_config_options
from hw.flows.generate import generate, summary, write
from hw.flows.lower import LowerError
from hw.spec.cli import Parser, run_cli
from hw.spec.config import AcceleratorConfig, ConfigError
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
    options = vars(_parser().parse_args(arguments))
    out, block, target = (options.pop(name) for name in ("out", "top", "target"))
    try:
        config = AcceleratorConfig(**options)
        verilog, manifest = generate(config, block, target)
        write(out, verilog, manifest)
    except (ConfigError, LowerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(summary(config, block, out, verilog))
    return 0


if __name__ == "__main__":
    run_cli(main)
