# SPDX-License-Identifier: Apache-2.0
"""``python -m hw.resources``: estimates with yosys the resources of a board's part that an accelerator uses.

``--levels`` measures its logic depth instead: the number of lookup tables between its registers.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping

from hw.flows.blocks import BLOCKS, check_block
from hw.flows.command_line import add_config_options, config_of, exit_code
from hw.flows.levels import Depth, measure_depth
from hw.flows.synthesis import RESOURCES, synthesise
from hw.spec.cli import Parser, run_cli
from hw.spec.config import AcceleratorConfig, ConfigError
from hw.spec.parts import BOARDS, TARGETS, Part, Target

_DESCRIPTION = "Estimate the resources of a board's part that an accelerator uses, or its logic depth."
_NOTE = "yosys's mapping, an estimate: not placed, not routed, no Vivado"
_LEVELS_NOTE = "levels of yosys's mapping: LUT 1, CARRY4 0.12, MUXF 0.3, LUT memory 1.2; not placed, no Vivado"


def _part(board: str) -> Part:
    """The board's part. Raises ConfigError if the board does not exist."""
    if board not in BOARDS:
        raise ConfigError(f"board is one of {', '.join(BOARDS)}, not {board!r}")
    return BOARDS[board]


def _target(board: str, block: str) -> Target:
    """The family of the board's part. Raises ConfigError if the board or the block does not exist."""
    part = _part(board)
    check_block(block)
    target = TARGETS[part.target]
    assert target is not None
    return target


def measure(config: AcceleratorConfig, board: str, block: str = "accelerator") -> dict[str, Counter]:
    """Resources of each block of ``block``, by name; see :func:`hw.flows.synthesis.synthesise`.

    Raises
    ------
    ConfigError : the board or the block does not exist
    hw.flows.lower.LowerError : yosys failed
    """
    target = _target(board, block)
    return synthesise(BLOCKS[block](config), target)


def measure_levels(config: AcceleratorConfig, board: str, block: str = "accelerator") -> Depth:
    """Logic depth of ``block``; see :func:`hw.flows.levels.measure_depth`. Raises as :func:`measure` does."""
    target = _target(board, block)
    return measure_depth(BLOCKS[block](config), target)


def total(blocks: Mapping[str, Counter]) -> dict[str, float]:
    """The sum of all blocks, by resource."""
    return {name: sum(counts[name] for counts in blocks.values()) for name in RESOURCES}


def percentages(counts: Mapping[str, float], part: Part) -> dict[str, float]:
    """Percentages of the part's resources that are used, for each resource that the part counts."""
    return {name: 100 * counts[name] / limit for name, limit in part.resources.items()}


def document(config: AcceleratorConfig, board: str, block: str, blocks: Mapping[str, Counter]) -> dict:
    """The document that ``--json`` prints."""
    part, sums = BOARDS[board], total(blocks)
    return {
        "board": board,
        "part": part.name,
        "method": _NOTE,
        "block": block,
        "config": config.to_dict(),
        "blocks": {name: {kind: counts[kind] for kind in RESOURCES} for name, counts in blocks.items()},
        "total": sums,
        "available": dict(part.resources),
        "percent": {name: round(value, 2) for name, value in percentages(sums, part).items()},
        "fits": all(sums[name] <= limit for name, limit in part.resources.items()),
    }


def text_table(config: AcceleratorConfig, board: str, blocks: Mapping[str, Counter]) -> str:
    """A table of the blocks in falling order of LUTs, with their sum, the part's resources, and percentages."""
    part, sums = BOARDS[board], total(blocks)
    share = percentages(sums, part)
    rows = [
        (name, [f"{counts[kind]:,g}" if counts[kind] else "" for kind in RESOURCES])
        for name, counts in sorted(blocks.items(), key=lambda item: (-item[1]["LUT"], item[0]))
    ]
    rows += [
        ("total", [f"{sums[kind]:,.10g}" for kind in RESOURCES]),
        (
            part.name.split("-")[0],
            [f"{part.resources[kind]:,}" if kind in part.resources else "" for kind in RESOURCES],
        ),
        ("%", [f"{share[kind]:.1f}" if kind in share else "" for kind in RESOURCES]),
    ]
    lines = [f"tile {config.tile} on {board}: {_NOTE}", ""]
    lines += [f"{name:18}" + "".join(f"{value:>10}" for value in values) for name, values in [("", RESOURCES), *rows]]
    return "\n".join(line.rstrip() for line in lines)


def levels_document(config: AcceleratorConfig, board: str, block: str, depth: Depth) -> dict:
    """The document that ``--levels --json`` prints."""
    head = {"board": board, "part": BOARDS[board].name, "method": _LEVELS_NOTE, "block": block}
    return {**head, "config": config.to_dict(), **depth.to_dict()}


def levels_table(config: AcceleratorConfig, board: str, depth: Depth) -> str:
    """Tables of each block's depth, of the number of end points by depth, and of the deepest paths."""
    lines = [f"tile {config.tile} on {board}: {_LEVELS_NOTE}", "", f"{'block':24}{'deepest':>8}"]
    lines += [f"{name:24}{levels:8.2f}" for name, levels in sorted(depth.blocks.items(), key=lambda i: (-i[1], i[0]))]
    lines += [f"{'all':24}{depth.levels:8.2f}", "", f"{'levels':24}{'bits':>8}"]
    lines += [f"{f'up to {level}':24}{depth.histogram[level]:8,}" for level in sorted(depth.histogram)]
    lines += [f"{'all':24}{depth.end_points:8,}", "", "deepest paths, one of each kind"]
    for path in depth.worst:
        lines += ["", f"{path.levels:6.2f}  {path.start}", f"        {', '.join(path.through)}", f"        {path.end}"]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m hw.resources",
        description=_DESCRIPTION,
    )
    add_config_options(parser)
    parser.add_argument("--board", default="kv260", help=f"one of {', '.join(BOARDS)} (default: kv260)")
    parser.add_argument("--top", default="accelerator", help="measure this block alone (default: the accelerator)")
    parser.add_argument("--levels", action="store_true", help="print logic depth per block, and the deepest paths")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 1 if the part is too small."""
    options = _parser().parse_args(arguments)
    board, block = options.board, options.top

    def run() -> int:
        config = config_of(options, _part(board).target)
        if options.levels:
            depth = measure_levels(config, board, block)
            found = levels_document(config, board, block, depth)
            print(json.dumps(found, indent=1) if options.json else levels_table(config, board, depth))
            return 0
        blocks = measure(config, board, block)
        found = document(config, board, block, blocks)
        print(json.dumps(found, indent=1) if options.json else text_table(config, board, blocks))
        if not found["fits"]:
            print(f"error: {board} is too small for this", file=sys.stderr)
        return 0 if found["fits"] else 1

    return exit_code(run)


if __name__ == "__main__":
    run_cli(main)
