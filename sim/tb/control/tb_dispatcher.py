# SPDX-License-Identifier: Apache-2.0
"""The dispatcher: every unit gets its share of every layer, in order and not too early."""

from typing import Any, NamedTuple

import cocotb
from cocotb.triggers import RisingEdge

from hw.spec.control.descriptor import ADDRESS_LIMIT, activation_beats
from hw.spec.ops.command import LayerCommand
from sim.bench.dut import begin, config, payload
from sim.bench.layers import random_layer
from sim.bench.monitor import Monitor
from sim.bench.streams import Stall, StreamSink, StreamSource, cycle, never, randomly, read, rng

UNITS = ("core", "unit", "blocks", "jobs", "regions")
LAYERS_AHEAD = {"unit": 2, "jobs": 4}
"""Layers that wait in the FIFOs of these units."""


class _Work(NamedTuple):
    """A checked descriptor, with the units' names of its fields."""

    command: LayerCommand
    activations: int
    activation_beats: int
    results: int
    result_pitch: int
    interrupt: int
    weights: int
    weights_stride: int
    weight_beats: int

    @property
    def word(self) -> int:
        """The work as one payload."""
        fields = {**self._asdict(), "command": self.command.to_int(config())}
        return payload("work").pack(**{name: [value] for name, value in fields.items()})[0]

    def share(self, unit: str) -> dict[str, int] | None:
        """The expected share of a unit, or None if it gets nothing."""
        command = self.command
        if unit == "core":
            return command.__dict__
        if unit == "unit":
            return {"command": command.to_int(config()), "address": self.activations}
        if unit == "blocks":
            return None if command.reuse else {"address": self.activations, "beats": self.activation_beats}
        if unit == "regions":
            return {"address": self.weights, "stride": self.weights_stride, "beats": self.weight_beats}
        return {"address": self.results, "pitch": self.result_pitch, "interrupt": self.interrupt}


def _works(count: int, reuse: float = 0.4) -> list[_Work]:
    """Random layers; some of them reuse the activations of the layer before. No two layers have a value in common."""
    random, works = rng(7), []
    for _ in range(count):
        layer = random_layer(config(), random)
        again = bool(works) and bool(random.random() < reuse)
        tokens = works[-1].command.tokens if again else int(random.integers(1, config().max_tokens, endpoint=True))
        activations, results, weights = (int(address) << 7 for address in random.integers(ADDRESS_LIMIT >> 7, size=3))
        works.append(
            _Work(
                command=LayerCommand.from_layer(layer, tokens, again),
                activations=activations,
                activation_beats=activation_beats(config(), tokens, layer.slices),
                results=results,
                result_pitch=int(random.integers(1 << 17)) << 7,
                interrupt=int(random.integers(2)),
                weights=weights,
                weights_stride=int(random.integers(1 << 20)) << 12,
                weight_beats=layer.beats,
            )
        )
    return works


class _Bench:
    """The units, the fetch's ``asking``, and the check when weights may be offered."""

    def __init__(self, dut: Any, stalls: dict[str, Stall] | None = None, busy: range = range(1, 2)):
        """busy: how many cycles the fetch may ask for a block."""
        self.dut, self.busy = dut, busy
        stalls = stalls or {}
        self.work = StreamSource(dut, "work", dut.clk, stalls.get("work", never))
        self.units = {unit: StreamSink(dut, unit, dut.clk, stalls.get(unit, never)) for unit in UNITS}
        self.works: list[_Work] = []
        dut.asking.value = 0
        cocotb.start_soon(self._fetch())

    async def _fetch(self) -> None:
        """Asks for each block for some cycles, starting in the cycle after its transfer. Weights must wait for that."""
        edge, random, dut = RisingEdge(self.dut.clk), rng(6), self.dut
        left = blocks = regions = 0
        while True:
            await edge
            if dut.rst.value:
                continue
            if read(dut.regions_valid):
                assert not read(dut.asking), f"the weights of layer {regions} are offered while a block is asked for"
                own = sum(not work.command.reuse for work in self.works[: regions + 1])
                assert blocks == own, f"the weights of layer {regions} are offered after {blocks} of {own} blocks"
                regions += read(dut.regions_ready)
            left = max(0, left - 1)
            if read(dut.blocks_valid) and read(dut.blocks_ready):
                assert not read(dut.asking), "the fetch takes no block while it asks for one"
                blocks += 1
                left = int(random.choice(self.busy))
            dut.asking.value = int(left > 0)

    def send(self, works: list[_Work]) -> None:
        self.works += works
        self.work.send(work.word for work in works)

    async def check(self) -> None:
        """Every unit got its shares of all layers that were sent, and nothing else."""
        for unit, sink in self.units.items():
            shares = [share for work in self.works if (share := work.share(unit)) is not None]
            fields = payload(unit).unpack(await sink.take(len(shares), cycles=100_000))
            for index, share in enumerate(shares):
                got = {name: int(values[index]) for name, values in fields.items()}
                assert got == share, f"{unit}, share {index}"
        for sink in self.units.values():
            await sink.quiet(16)


@cocotb.test()
async def shares(dut):
    """No unit pauses."""
    bench = _Bench(dut)
    await begin(dut)
    bench.send(_works(60))
    await bench.check()


@cocotb.test()
@cocotb.parametrize(longest=[3, 60])
async def shares_with_stalls(dut, longest):
    """Every unit pauses at its own rate, and the fetch of activations takes some cycles."""
    stalls = {
        unit: randomly(p, rng(n)) for n, (unit, p) in enumerate(zip(("work", *UNITS), (0.2, 0.3, 0.6, 0, 0.8, 0.5)))
    }
    bench, pause = _Bench(dut, stalls, range(1, longest + 1)), stalls["blocks"]
    # The fetch takes no block before it has asked for all of the previous one.
    bench.units["blocks"].stall = lambda: bool(read(dut.asking)) or pause()
    await begin(dut)
    bench.send(_works(150))
    await bench.check()


@cocotb.test()
async def time(dut):
    """Layers that reuse activations: the core and the weights get their shares together, one layer in two cycles."""
    bench, works = _Bench(dut), _works(40, reuse=1)
    await begin(dut)
    bench.send(works[:1])
    await bench.work.drained()
    monitor = Monitor(dut, UNITS, ("work_valid",))
    bench.send(works[1:])
    await bench.check()
    begins = monitor["work_valid"][0]
    for unit in UNITS:
        expected = range(begins + (unit in LAYERS_AHEAD), begins + 2 * len(works) - 2, 2)
        assert monitor[unit][: len(expected)] == ([] if unit == "blocks" else list(expected)), unit


@cocotb.test()
@cocotb.parametrize(blocked=UNITS)
async def one_unit_blocked(dut, blocked):
    """The others get one layer more than the blocked unit's FIFO holds, and the rest when that unit continues."""
    holding = [True]
    bench = _Bench(dut, {blocked: lambda: holding[0]})
    await begin(dut)
    bench.send(_works(20, reuse=0.0))
    await cycle(dut.clk, 200)
    expected = 1 + LAYERS_AHEAD.get(blocked, 0)
    for unit, sink in bench.units.items():
        waits = unit == blocked or (unit, blocked) == ("regions", "blocks")
        assert len(sink.received) == (0 if waits else expected), unit
    holding[0] = False
    await bench.check()


@cocotb.test()
async def weights_wait_for_activations(dut):
    """A layer's weights come in the cycle after the fetch has asked for the layer's block, however long it asks."""
    bench = _Bench(dut)
    await begin(dut)
    monitor = Monitor(dut, ("blocks", "regions"))
    (work,) = _works(1)
    for cycles in (1, 2, 50):
        bench.busy = range(cycles, cycles + 1)
        bench.send([work])
        await bench.work.drained()
        await cycle(dut.clk, 4)
    assert [after - before for before, after in zip(monitor["blocks"], monitor["regions"])] == [2, 3, 51]
