# SPDX-License-Identifier: Apache-2.0
"""``python -m sim.run``: run the benches and print a table of the results."""

import os
import secrets
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace

from hw.spec.cli import Parser, run_cli
from hw.spec.config import AcceleratorConfig, ConfigError
from sim.benches import BENCHES, Bench
from sim.harness import ROOT, Result, SetupError, require, run_bench, stop

__all__ = ["main", "run_all", "select"]


def select(
    benches: Sequence[Bench], full: bool = False, words: str | None = None, tile: int | None = None
) -> list[Bench]:
    """The benches that match the options.

    `words` is a filter on names like pytest's: substrings joined with ``and``, ``or`` and ``not``; ``or`` has the
    lowest precedence. `tile` replaces the array size of every bench that has one, with this size's default of `lanes`;
    benches for a part have a board's size, which does not change. Raises SetupError if the tile is not valid or no
    bench matches.
    """
    chosen = [bench for bench in benches if full or not bench.full]
    if tile is not None:
        try:
            AcceleratorConfig(tile=tile)
        except ConfigError as error:
            raise SetupError(str(error)) from None
        free = [bench for bench in chosen if "tile" in bench.params and "target" not in bench.params]
        chosen = [_with_tile(bench, tile) if bench in free else bench for bench in chosen]
        chosen = list({bench.name: bench for bench in chosen}.values())
    if words:
        chosen = [bench for bench in chosen if _matches(bench.name, words)]
    if not chosen:
        raise SetupError(f"No bench matches -k {words!r}" if words else "There is no bench to run")
    return chosen


def _with_tile(bench: Bench, tile: int) -> Bench:
    params = {name: value for name, value in bench.params.items() if name != "lanes"}
    return replace(bench, params={**params, "tile": tile})


def _matches(name: str, words: str) -> bool:
    def term(text: str) -> bool:
        text = text.strip()
        return not term(text[4:]) if text.startswith("not ") else text.lower() in name.lower()

    return any(all(term(part) for part in alternative.split(" and ")) for alternative in words.split(" or "))


def run_all(benches: Sequence[Bench], simulators: Sequence[str], seed: int, jobs: int) -> list[Result]:
    """Run every bench on every simulator, and print a line for each as it ends."""
    widths = [
        max(len(text) for text in column) for column in zip(*(_names(b) for b in benches), ("bench", "parameters"))
    ]
    row = f"{{:{widths[0]}}}  {{:{widths[1]}}}  {{:9}}  {{:>6}}  {{:>6}}  {{:>7}}  {{}}".format
    print(row("bench", "parameters", "simulator", "passed", "failed", "seconds", "seed"), flush=True)
    results = []
    pool = ThreadPoolExecutor(jobs)
    try:
        futures = [pool.submit(run_bench, bench, simulator, seed) for simulator in simulators for bench in benches]
        for future in as_completed(futures):
            result = future.result()
            results.append(result)
            counts = len(result.passed), len(result.failed) or "-"
            print(
                row(*_names(result.bench), result.simulator, *counts, f"{result.seconds:.1f}", result.seed), flush=True
            )
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        stop()
    return results


def _names(bench: Bench) -> tuple[str, str]:
    return bench.place, bench.parameters


def summary(results: Sequence[Result]) -> str:
    """Every failing test with its reason and its log, and one line of totals."""
    lines = [
        f"FAILED {result.bench.name} {result.simulator} {test}: {reason}\n       {_shown(result)}"
        for result in results
        for test, reason in result.failed.items()
    ]
    passed, failed = sum(len(r.passed) for r in results), sum(len(r.failed) for r in results)
    lines.append(f"{len(results)} benches: {passed} tests passed, {failed} failed")
    return "\n".join(lines)


def _shown(result: Result) -> str:
    return str(result.log.relative_to(ROOT) if result.log.is_relative_to(ROOT) else result.log)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0 all passed, 1 something failed, 2 nothing could be run."""
    parser = Parser("python -m sim.run", description="Verify the generated hardware with cocotb.")
    parser.add_argument(
        "--sim", default="verilator", help="verilator, icarus, or both with a comma (default: verilator)"
    )
    parser.add_argument("--tile", type=int, help="array size for every bench that has one")
    parser.add_argument("--full", action="store_true", help="run the long sweeps too")
    parser.add_argument(
        "-k", dest="words", metavar="EXPR", help="only benches whose name matches, as in pytest; core/ is a room"
    )
    parser.add_argument("--seed", type=int, help="base seed of an earlier run, to repeat it")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="benches at a time (default: one per core)"
    )
    parser.add_argument("--list", action="store_true", help="only print the names")
    arguments = parser.parse_args(argv)
    seed = secrets.randbits(31) if arguments.seed is None else arguments.seed
    try:
        if arguments.jobs < 1 or seed < 0:
            raise SetupError(f"--jobs must be at least 1 and --seed at least 0, not {arguments.jobs} and {seed}")
        simulators = [name.strip() for name in arguments.sim.split(",")]
        for simulator in simulators:
            require(simulator)
        benches = select(BENCHES, arguments.full, arguments.words, arguments.tile)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.list:
        print("\n".join(bench.name for bench in benches))
        return 0
    print(f"Base seed {seed}; --seed {seed} repeats this run")
    results = run_all(benches, simulators, seed, arguments.jobs)
    print(summary(results))
    return 0 if all(result.ok for result in results) else 1


if __name__ == "__main__":
    run_cli(main)
