# SPDX-License-Identifier: Apache-2.0
"""``python -m sim.wave BENCH``: run a bench and keep its waveform, with a GTKWave save file of its streams."""

import secrets
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hw.spec.cli import Parser, run_cli
from sim.benches import BENCHES, Bench
from sim.harness import ROOT, SetupError, run_bench
from sim.run import select, summary
from sim.waveform import save_file

__all__ = ["choose", "main"]

OUT = ROOT / "build" / "wave"


def choose(benches: Sequence[Bench], name: str, tile: int | None = None) -> Bench:
    """The bench with this name, or else the first one whose name matches it as in ``sim.run -k``.

    Raises SetupError if there is none, or if benches of several modules match.
    """
    if not name:
        raise SetupError("BENCH names the bench, such as BENCH=tb_fifo; `python -m sim.run --list` prints all")
    if exact := [bench for bench in benches if bench.name == name and tile is None]:
        return exact[0]
    found = select(benches, full=True, words=name, tile=tile)
    if len({bench.module for bench in found}) > 1:
        exact = [bench for bench in found if bench.module.rsplit(".", 1)[-1] in (name, f"tb_{name}")]
        if not exact:
            names = ", ".join(dict.fromkeys(bench.module.rsplit(".", 1)[-1] for bench in found))
            raise SetupError(f"BENCH={name!r} matches several benches: {names}; name one of them")
        found = exact
    return found[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0 if the bench passed, 1 if it failed, 2 if it could not be run."""
    parser = Parser(prog="python -m sim.wave", description="The waveform of one bench, by Verilator.")
    parser.add_argument("bench", help="a name that `python -m sim.run --list` prints, or a part of it: tb_fifo")
    parser.add_argument("--tile", type=int, help="array size, if the bench has one")
    parser.add_argument("--seed", type=int, help="base seed of an earlier run, to repeat it")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write to (default: build/wave)")
    options = parser.parse_args(arguments)
    seed = secrets.randbits(31) if options.seed is None else options.seed
    try:
        bench = choose(BENCHES, options.bench, options.tile)
        out = options.out.resolve()
        out.mkdir(parents=True, exist_ok=True)
        vcd = out / f"{bench.module.rsplit('.', 1)[-1]}.vcd"
        vcd.unlink(missing_ok=True)
        print(f"{bench.name}, seed {seed} ...", file=sys.stderr)
        result = run_bench(replace(bench, trace=vcd), "verilator", seed)
    except (SetupError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary([result]))
    if vcd.exists():
        save = vcd.with_suffix(".gtkw")
        save.write_text(save_file(vcd), encoding="utf-8")
        print(f"waveform: {vcd} ({vcd.stat().st_size / 1e6:,.1f} MB)\nlook at it: gtkwave {save}")
    return 0 if result.ok else 1


if __name__ == "__main__":
    run_cli(main)
