# SPDX-License-Identifier: Apache-2.0
"""The dispatcher: every unit gets its share of every layer, in order, not too early, and ahead of those that wait."""

from collections import deque
from typing import Any, NamedTuple

import cocotb
from cocotb.triggers import RisingEdge

from hw.spec.control.descriptor import ADDRESS_LIMIT, activation_beats
from hw.spec.ops.base import Wait
from hw.spec.ops.command import LayerCommand
from sim.bench.dut import begin, config, latency, payload
from sim.bench.layers import random_layer
from sim.bench.monitor import Monitor
from sim.bench.streams import Stall, StreamSink, StreamSource, cycle, never, randomly, read, rng

ACTIVATIONS = ("unit", "blocks", "results_job")
WEIGHTS = ("core", "regions")
UNITS = (*ACTIVATIONS, *WEIGHTS)
LAYERS_AHEAD = {"unit": 2, "results_job": 4}
"""Layers that wait in the FIFOs of these units."""
TABLE = 4
"""Layers whose shares are not all sent."""


class _Work(NamedTuple):
    """A checked descriptor, with the units' names of its fields."""

    command: LayerCommand
    wait: Wait
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
        return payload("work").pack(**{name: [int(value)] for name, value in fields.items()})[0]

    def share(self, unit: str) -> dict[str, int] | None:
        """The expected share of a unit, or None if it gets nothing."""
        command = self.command
        if unit == "core":
            return command.fields(config())
        if unit == "unit":
            return {"command": command.to_int(config()), "address": self.activations}
        if unit == "blocks":
            return None if command.reuse else {"address": self.activations, "beats": self.activation_beats}
        if unit == "regions":
            return {"address": self.weights, "stride": self.weights_stride, "beats": self.weight_beats}
        return {"address": self.results, "pitch": self.result_pitch, "interrupt": self.interrupt}


def _works(count: int, reuse: float = 0.4, waits: float = 0.0, salt: int = 7) -> list[_Work]:
    """Random layers; some of them reuse the activations of the layer before, some wait for it. No two layers have a
    value in common."""
    random, works = rng(salt), []
    for _ in range(count):
        layer = random_layer(config(), random)
        again = bool(works) and bool(random.random() < reuse)
        tokens = works[-1].command.tokens if again else int(random.integers(1, config().max_tokens, endpoint=True))
        activations, results, weights = (int(address) << 7 for address in random.integers(ADDRESS_LIMIT >> 7, size=3))
        wait = Wait.NOTHING
        if random.random() < waits:
            wait = Wait.WEIGHTS if random.random() < 0.3 else Wait.ACTIVATIONS
        works.append(
            _Work(
                command=LayerCommand.from_layer(layer, tokens, again),
                wait=wait,
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


class _WorkSource(StreamSource):
    """Drives a payload in the cycle before its valid, as the descriptor check does, and noise before that."""

    async def _run(self) -> None:
        edge, random = RisingEdge(self.clk), rng(5)
        driven = offered = False
        await self._after_reset()
        while True:
            if offered and read(self.ready):
                self.transfers += 1
                self.valid.value = 0
                self.payload.value = int.from_bytes(random.bytes(self.width // 8 + 1), "big") & (1 << self.width) - 1
                driven = offered = False
            if driven and not offered:
                self.valid.value = 1
                offered = True
            elif not driven and self._queue and not self.stall():
                self.payload.value = self._queue.popleft()
                driven = True
            await edge


class _Bench:
    """The units, the fetch's ``asking``, the completions, and the checks when each share may be offered."""

    def __init__(
        self,
        dut: Any,
        stalls: dict[str, Stall] | None = None,
        busy: range = range(1, 2),
        takes: range | None = range(1, 2),
    ):
        """busy: how many cycles the fetch may ask for a block. takes: cycles from a layer's last share to its
        completion; None: it is not completed."""
        self.dut, self.busy, self.takes = dut, busy, takes
        stalls = stalls or {}
        self.work = _WorkSource(dut, "work", dut.clk, stalls.get("work", never))
        self.units = {unit: StreamSink(dut, unit, dut.clk, stalls.get(unit, never)) for unit in UNITS}
        self.works: list[_Work] = []
        self.got: dict[str, int] = dict.fromkeys(UNITS, 0)
        """Number of layers whose share of a unit was taken, or that the unit does not need."""
        self.completed = 0
        self.waited = self.ran_ahead = 0
        """Number of layers that had to wait; of layers whose weights were sent before the activations of one that
        waits."""
        dut.asking.value = dut.complete.value = 0
        cocotb.start_soon(self._watch())

    async def _watch(self) -> None:
        """One cycle after the other: the rules for offers, transfers, the fetch, completions."""
        edge, random, dut = RisingEdge(self.dut.clk), rng(6), self.dut
        due: deque[int] = deque()
        left = now = 0
        held: dict[str, bool] = dict.fromkeys(UNITS, False)
        recent = deque([0, 0], maxlen=2)
        while True:
            await edge
            if dut.rst.value:
                continue
            now += 1
            offered = {unit: bool(read(getattr(dut, f"{unit}_valid"))) for unit in UNITS}
            taken = {unit: offered[unit] and bool(read(getattr(dut, f"{unit}_ready"))) for unit in UNITS}
            for unit in ACTIVATIONS:
                if offered[unit]:
                    self._may_read(unit)
            if offered["regions"] and not held["regions"]:
                self._may_fetch_weights(recent[0])
            left = max(0, left - 1)
            if taken["blocks"]:
                assert not read(dut.asking), "the fetch takes no block while it asks for one"
                left = int(random.choice(self.busy))
            for unit in UNITS:
                held[unit] = offered[unit] and not taken[unit]
                self._count(unit, taken[unit])
            dut.asking.value = int(left > 0)
            recent.append(self.completed)
            while self.takes is not None and self.completed + len(due) < min(self.got.values()):
                due.append(now + int(random.choice(self.takes)))
            ends = bool(due) and due[0] <= now
            dut.complete.value = int(ends)
            if ends:
                due.popleft()
                self.completed += 1

    def _count(self, unit: str, taken: bool) -> None:
        """Counts a transfer, and before it the layers that the unit does not need."""
        self.got[unit] += taken
        while self.got[unit] < len(self.works) and self.works[self.got[unit]].share(unit) is None:
            self.got[unit] += 1

    def _may_read(self, unit: str) -> None:
        """A layer that waits gets no share of the activations side before all earlier layers are complete."""
        number = self.got[unit]
        if self.works[number].wait != Wait.NOTHING:
            assert self.completed >= number, f"{unit} of layer {number} after {self.completed} completions"

    def _may_fetch_weights(self, completed: int) -> None:
        """Weights follow their activations, or the first layer whose activations are missing waits. ``completed`` is
        the number of completions some cycles ago, because the dispatcher decides with registers."""
        number, blocks = self.got["regions"], self.got["blocks"]
        assert not read(self.dut.asking), f"the weights of layer {number} are offered while a block is asked for"
        waits = [index for index in range(completed + 1, number + 1) if self.works[index].wait != Wait.NOTHING]
        held = [index for index in range(self.completed + 1, number + 1) if self.works[index].wait == Wait.WEIGHTS]
        assert not held, f"the weights of layer {number} are offered, and those of layer {held[:1]} wait"
        if blocks <= number or waits:
            assert waits, f"the weights of layer {number} are offered after {blocks} of {number + 1} blocks"
            # All activations before the layer that waits are requested.
            first = waits[0]
            passed = [index for index in range(blocks, first) if self.works[index].share("blocks") is not None]
            assert not passed, f"the weights of layer {number} are offered, and the block of {passed[0]} is missing"
            self.ran_ahead += 1

    def send(self, works: list[_Work]) -> None:
        self.works += works
        self.waited += sum(work.wait != Wait.NOTHING for work in works)
        for unit in UNITS:
            self._count(unit, False)
        self.work.send(work.word for work in works)

    async def check(self, count: int | None = None) -> None:
        """Every unit got its shares of all layers that were sent, and nothing else."""
        for unit, sink in self.units.items():
            shares = [share for work in self.works if (share := work.share(unit)) is not None]
            fields = payload(unit).unpack(await sink.take(len(shares), cycles=200_000))
            for index, share in enumerate(shares):
                got = {name: int(values[index]) for name, values in fields.items()}
                assert got == share, f"{unit}, share {index}"
        for sink in self.units.values():
            await sink.quiet(16)


def _stalls() -> dict[str, Stall]:
    """Every unit pauses at its own rate."""
    rates = dict(work=0.2, core=0.3, unit=0.6, blocks=0.0, results_job=0.8, regions=0.5)
    return {unit: randomly(p, rng(n)) for n, (unit, p) in enumerate(rates.items())}


@cocotb.test()
@cocotb.parametrize(waits=[0.0, 0.5])
async def shares(dut, waits):
    """No unit pauses."""
    bench = _Bench(dut, takes=range(1, 20))
    await begin(dut)
    bench.send(_works(60, waits=waits))
    await bench.check()


@cocotb.test()
@cocotb.parametrize(("longest", [3, 60]), (("waits", "takes"), [(0.0, 3), (0.3, 3), (0.3, 60), (1.0, 30)]))
async def shares_with_stalls(dut, longest, waits, takes):
    """Every unit pauses at its own rate, the fetch of activations takes some cycles, and completions come late."""
    stalls = _stalls()
    bench, pause = _Bench(dut, stalls, range(1, longest + 1), range(1, takes + 1)), stalls["blocks"]
    # The fetch takes no block before it has asked for all of the previous one.
    bench.units["blocks"].stall = lambda: bool(read(dut.asking)) or pause()
    await begin(dut)
    bench.send(_works(100, waits=waits))
    await bench.check()
    dut._log.info("%d layers waited, the weights of %d came ahead", bench.waited, bench.ran_ahead)
    assert bench.ran_ahead > 0 or not waits


@cocotb.test()
async def time(dut):
    """Layers that reuse activations: the core and the weights get their shares together, as fast as works come."""
    bench, works = _Bench(dut), _works(40, reuse=1)
    await begin(dut)
    bench.send(works[:1])
    await bench.work.drained()
    monitor = Monitor(dut, UNITS, ("work_valid",))
    bench.send(works[1:])
    await bench.check()
    begins, period = monitor["work_valid"][0], latency("period") + 1
    for unit in UNITS:
        expected = range(begins + (unit in LAYERS_AHEAD), begins + period * (len(works) - 1), period)
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


def _waiting(count: int, waits: dict[int, Wait], reuse: float = 0.0) -> list[_Work]:
    """Layers, some of which wait."""
    return [work._replace(wait=waits.get(index, Wait.NOTHING)) for index, work in enumerate(_works(count, reuse))]


@cocotb.test()
@cocotb.parametrize(first=[0, 1, 5])
async def weights_run_ahead(dut, first):
    """While a layer waits, its weights and those of the table's other layers are sent. Then the rest follows."""
    bench = _Bench(dut, takes=None)
    await begin(dut)
    monitor = Monitor(dut, UNITS, ("complete",))
    # The first layer has nothing to wait for; one more must be incomplete for layer ``first`` to wait.
    bench.send(_waiting(20, {0: Wait.ACTIVATIONS, first: Wait.ACTIVATIONS, 12: Wait.ACTIVATIONS}))
    await cycle(dut.clk, 300)
    begun = first or 12
    ahead = {unit: begun + (TABLE if unit in WEIGHTS else 0) for unit in UNITS}
    assert {unit: len(sink.received) for unit, sink in bench.units.items()} == ahead
    bench.takes = range(1, 2)
    await bench.check()
    # From the completion to the shares that waited for it.
    last = monitor["complete"][begun - 1]
    assert [monitor[unit][begun] - last for unit in ACTIVATIONS] == [2, 1, 2]


@cocotb.test()
async def weights_that_wait(dut):
    """Weights that wait hold those behind them; the core knows the layer."""
    bench = _Bench(dut, takes=None)
    await begin(dut)
    bench.send(_waiting(20, {2: Wait.ACTIVATIONS, 4: Wait.WEIGHTS}))
    await cycle(dut.clk, 300)
    got = {unit: len(sink.received) for unit, sink in bench.units.items()}
    assert got == dict.fromkeys(ACTIVATIONS, 2) | {"regions": 4, "core": 5}
    bench.takes = range(1, 2)
    await bench.check()


@cocotb.test()
async def table_empties_without_pauses(dut):
    """After a wait, the layers of the table that need no further completion follow in the least time."""
    bench = _Bench(dut, takes=None)
    await begin(dut)
    monitor = Monitor(dut, UNITS, ("complete",))
    # With reuse, no fetch of activations limits the pace.
    bench.send(_waiting(12, {1: Wait.ACTIVATIONS}, reuse=1.0))
    await cycle(dut.clk, 100)
    bench.takes = range(1, 2)
    await bench.check()
    first = monitor["complete"][0] + 2
    period = latency("period")
    assert monitor["results_job"][1 : 1 + TABLE] == list(range(first, first + period * TABLE, period))


@cocotb.test()
async def an_offer_stays(dut):
    """Weights that are offered while a layer waits stay offered when its wait ends."""
    holding = [True]
    bench = _Bench(dut, {"regions": lambda: holding[0]}, takes=None)
    await begin(dut)
    bench.send(_waiting(3, {}))
    holding[0] = False
    await bench.check()
    holding[0] = True
    bench.send(_waiting(4, {0: Wait.ACTIVATIONS}))
    await cycle(dut.clk, 50)
    assert read(dut.regions_valid)
    bench.takes = range(1, 2)
    await cycle(dut.clk, 50)
    assert len(bench.units["results_job"].received) == 1 and not bench.units["regions"].received
    holding[0] = False
    await bench.work.drained()
    await cycle(dut.clk, 50)
    assert bench.completed == len(bench.works)
