# SPDX-License-Identifier: Apache-2.0
"""The sequencer against the loop nest: every output in every cycle, never a slice without what it needs, no gap."""

import cocotb
from cocotb.triggers import RisingEdge

from hw.spec.memory.geometry import StreamLayout
from hw.spec.ops.command import LayerCommand
from sim.bench.dut import begin, config, latency
from sim.bench.layers import random_layer
from sim.bench.streams import StreamSource, cycle, never, randomly, rng

HEADERS_AHEAD = 16
"""Output tiles whose header may be ready before they start."""


class _Layers:
    """Random commands, and the cycles of each of their slices."""

    def __init__(self, random, count, max_k=192):
        self.config = c = config()
        self.stream = StreamLayout(c)
        self.commands, self.slices = [], []
        bank, base = 1, c.max_tokens * (c.max_k // c.tile)
        for number in range(count):
            layer = random_layer(c, random, max_k=max_k)
            tokens = min(int(random.choice([1, 2, c.max_tokens])), c.max_tokens)
            command = LayerCommand.from_layer(layer, tokens, number > 0 and random.random() < 0.3)
            self.commands.append(command.to_int(c))
            bank ^= not command.reuse
            for tile in range(command.out_tiles):
                for part in range(command.groups * command.group_slices):
                    fresh = not command.reuse and tile == 0
                    final = part == command.groups * command.group_slices - 1
                    self.slices.append((tokens, bank * base + part * tokens, part, fresh, final))

    def outputs(self, tokens, address, part, final):
        """(token, load, address, pop, place) of every cycle of a slice."""
        words, shared = self.stream.words_per_slice, self.stream.slices_per_word
        for phase in range(max(tokens, words)):
            if shared == 1:
                pop, place = phase < words, 0
            else:
                place = part % shared
                pop = phase == max(tokens, words) - 1 and (place == shared - 1 or final)
            yield phase < tokens, phase == 0, address + phase, pop, place


class _Credits:
    """Counts what was given and taken: a credit given in cycle t can be used by a decision in cycle t + 1."""

    def __init__(self):
        self.given, self.taken = [], 0

    def before(self, cycle):
        """Credits that a decision in this cycle may count on."""
        return sum(1 for t in self.given if t < cycle) - self.taken


class _Bench:
    def __init__(self, dut, layers, stalls):
        self.dut, self.layers, self.stalls = dut, layers, stalls
        self.ring = 1 << (2 * layers.config.max_tokens - 1).bit_length()
        self.credits = {name: _Credits() for name in ("word_pushed", "tile_ready", "slice_ready")}
        self.tiles = sum(part == 0 for _, _, part, *_ in layers.slices)
        self.fresh = sum(fresh for *_, fresh, _ in layers.slices)
        self.entries, self.released, self.starts = 0, [], []
        for name in (*self.credits, "ring_release"):
            getattr(dut, name).value = 0

    def _give(self, now):
        """Decide the pulses of the next cycle, within what the blocks around the sequencer could do."""
        c = self.layers.config
        limits = {
            "word_pushed": (latency("fifo_depth"), 1 << 60),
            "tile_ready": (HEADERS_AHEAD, self.tiles),
            "slice_ready": (c.max_tokens * (c.max_k // c.tile), self.fresh),
        }
        for name, (held, most) in limits.items():
            credit = self.credits[name]
            give = len(credit.given) - credit.taken < held and len(credit.given) < most and not self.stalls[name]()
            getattr(self.dut, name).value = int(give)
            if give:
                credit.given.append(now + 1)
        release = len(self.released) < self.entries and not self.stalls["ring_release"]()
        self.dut.ring_release.value = int(release)
        if release:
            self.released.append(now + 1)

    def _start(self, now, tokens, part, fresh):
        """A slice was decided on one cycle before its first outputs: everything must have been there."""
        decision = now - latency()
        words = self.layers.stream.words_per_slice
        have = self.credits["word_pushed"].before(decision)
        assert have >= words, f"cycle {now}: a slice started with {have} of {words} words"
        if fresh:
            assert self.credits["slice_ready"].before(decision) > 0, f"cycle {now}: activations are missing"
            self.credits["slice_ready"].taken += 1
        if part == 0:
            assert self.credits["tile_ready"].before(decision) > 0, f"cycle {now}: a header is missing"
            self.credits["tile_ready"].taken += 1
            self.entries += tokens
            occupied = self.entries - sum(t < decision for t in self.released)
            assert occupied <= self.ring, f"cycle {now}: {occupied} entries of a ring of {self.ring}"
        self.starts.append(now)

    async def run(self, limit=100_000):
        dut, edge, now = self.dut, RisingEdge(self.dut.clk), 0
        slices, current = iter(self.layers.slices), None
        names = ("token", "load", "address", "pop", "place")
        remaining = len(self.layers.slices)
        while remaining:
            await edge
            token, load, address, pop, place = (int(str(getattr(dut, name).value), 2) for name in names)
            if current is None and load:
                tokens, first, part, fresh, final = next(slices)
                self._start(now, tokens, part, fresh)
                current = self.layers.outputs(tokens, first, part, final)
            expected = next(current, None) if current else None
            if expected is None:
                assert (token, load, pop) == (0, 0, 0), f"cycle {now}: outputs without a slice"
            else:
                seen = (bool(token), bool(load), address if token else expected[2], bool(pop), place)
                assert seen == expected, f"cycle {now}, slice {len(self.starts) - 1}: {seen}, not {expected}"
                self.credits["word_pushed"].taken += pop
                if self._ends(expected, current):
                    current = None
                    remaining -= 1
            self._give(now)
            now += 1
            assert now < limit, f"{remaining} slices did not start"

    def _ends(self, expected, current):
        """Whether that was the slice's last cycle."""
        tokens = self.layers.slices[len(self.starts) - 1][0]
        self.phase = 0 if expected[1] else self.phase + 1
        return self.phase == max(tokens, self.layers.stream.words_per_slice) - 1


async def _walk(dut, stalls, count=25, command=never):
    layers = _Layers(rng(), count)
    source = StreamSource(dut, "command", dut.clk, command)
    bench = _Bench(dut, layers, dict(zip(("word_pushed", "tile_ready", "slice_ready", "ring_release"), stalls)))
    await begin(dut)
    source.send(layers.commands)
    await bench.run()
    return bench


@cocotb.test()
async def test_full_throughput(dut):
    """With everything there in time, a slice follows the other from the first layer's start to the last one's end."""
    bench = await _walk(dut, [never] * 4)
    words = bench.layers.stream.words_per_slice
    # Once the first slice's words are there, one more comes every cycle, and the array takes no more than that.
    gaps = [
        number
        for number, (before, after) in enumerate(zip(bench.starts, bench.starts[1:]))
        if after - before != max(bench.layers.slices[number][0], words)
    ]
    assert not gaps, f"gaps after slices {gaps[:5]}"


@cocotb.test()
@cocotb.parametrize(late=["word_pushed", "tile_ready", "slice_ready"])
async def test_latency(dut, late):
    """The first outputs come ``latency`` cycles after the first cycle that sees the last credit."""
    held, layers = [True], _Layers(rng(), 1)
    stalls = dict.fromkeys(("word_pushed", "tile_ready", "slice_ready", "ring_release"), never)
    stalls[late] = lambda: held[0]
    source, bench = StreamSource(dut, "command", dut.clk), _Bench(dut, layers, stalls)
    await begin(dut)
    source.send(layers.commands)
    task = cocotb.start_soon(bench.run())
    await cycle(dut.clk, 60)
    assert not bench.starts
    held[0] = False
    await task
    needed = layers.stream.words_per_slice if late == "word_pushed" else 1
    assert bench.starts[0] == bench.credits[late].given[needed - 1] + 1 + latency()


@cocotb.test()
@cocotb.parametrize(speeds=[(0.5, 0.5, 0.5, 0.5), (0.0, 0.95, 0.0, 0.0), (0.0, 0.0, 0.9, 0.0), (0.1, 0.0, 0.0, 0.97)])
async def test_random_stalls(dut, speeds):
    stalls = [randomly(p, rng(n)) for n, p in enumerate(speeds)]
    await _walk(dut, stalls, command=randomly(0.5, rng(9)))
