# SPDX-License-Identifier: Apache-2.0
"""The column post-processors: psums of whole layers become exact sums, read through the drain chain."""

import cocotb
import numpy as np

from hw.spec.memory.geometry import LayerLayout, StreamLayout
from hw.spec.numerics.linear import accumulate, group_sums
from sim.bench.dut import begin, config, latency, payload, trace
from sim.bench.layers import activations_of, weights_of
from sim.bench.streams import rng

RING_DELAY = latency("ring_delay")
"""Cycles from a psum to the addition of its group to the ring."""


def _junk(random, port, length):
    """Random values for idle cycles: nothing may depend on them."""
    width = payload(port).width
    return [int.from_bytes(random.bytes(-(-width // 8)), "little") % (1 << width) for _ in range(length)]


class _Run:
    """The inputs of one layer, cycle by cycle, and the slots of its sums."""

    def __init__(self, tokens, group_slices, groups, tiles, gap=0.0, kind="random"):
        c, self.random = config(), rng(tokens, groups)
        self.c, self.tokens = c, tokens
        size = c.tile * max(group_slices, StreamLayout(c).min_group_slices)
        layer = LayerLayout(c, size * groups, c.tile * tiles, size)
        self.weights = weights_of(layer, self.random, kind)
        self.activations = activations_of(layer, tokens, self.random, kind)
        self.sums = group_sums(self.activations, size)
        self.ring = 1 << (2 * c.max_tokens - 1).bit_length()
        self.steps, self.drains, self.total = self._schedule(layer, gap)

    def _schedule(self, layer, gap):
        """When each token's psum comes, and when each sum is drained: both as early as allowed."""
        steps, drains, now, drain_free, freed = [], [], 0, 0, []
        for tile in range(layer.out_tiles):
            for group in range(layer.groups):
                for part in range(layer.group_slices):
                    for token in range(self.tokens):
                        now += int(self.random.random() < gap)
                        entry = tile * self.tokens + token
                        if group == part == 0 and entry >= self.ring:
                            # The first write to an entry comes after the last read of its previous value.
                            now = max(now, freed[entry - self.ring] + 1 - RING_DELAY)
                        steps.append((now, tile, group, part, token))
                        now += 1
            first = steps[-self.tokens][0]
            for token in range(self.tokens):
                readable = next(t for t, *place in reversed(steps) if place[3] == token) + RING_DELAY + 1
                for columns in range(self.c.tile // self.c.lanes):
                    drain_free = max(drain_free, readable, first)
                    drains.append((drain_free, tile, token, columns))
                    drain_free += 1
                freed.append(drain_free - 1)
        return steps, drains, max(now, drain_free) + self.c.tile + RING_DELAY + 2

    def inputs(self):
        """The values of the ports in every cycle."""
        c, length = self.c, self.total
        ports = {name: _junk(self.random, name, length) for name in ("psums", "zero_points", "scales", "group", "ring")}
        for port, flags in (("group", ("valid", "ends")), ("ring", ("write",))):
            clear = ~payload(port).pack(**dict.fromkeys(flags, 1))[0]
            ports[port] = [value & clear for value in ports[port]]
        psums = self.random.integers(-1000, 1000, (length, c.tile))
        group_size, last_part = self.weights.group_size, self.weights.group_size // c.tile - 1
        for t, tile, group, part, token in self.steps:
            rows = slice(tile * c.tile, (tile + 1) * c.tile)
            k = group * group_size + part * c.tile
            x = self.activations.mantissas[token, k : k + c.tile]
            psum = self.weights.q[rows, k : k + c.tile].astype(np.int64) @ x
            for column in range(c.tile):
                psums[t + column, column] = psum[column]
            total = int(self.sums[token, group]) if part == last_part else 0
            ends = int(part == last_part)
            (ports["group"][t],) = payload("group").pack(
                valid=1, first_slice=int(part == 0), ends=ends, token=token, sum=total
            )
            if ends:
                for port, values in (
                    ("zero_points", self.weights.zero_points),
                    ("scales", self.weights.scale_mantissas),
                ):
                    (ports[port][t],) = payload(port).pack(element=values[None, rows, group])
                entry = (tile * self.tokens + token) % self.ring
                (ports["ring"][t + RING_DELAY],) = payload("ring").pack(
                    write=1, first_group=int(group == 0), address=entry
                )
        ports["psums"] = payload("psums").pack(element=psums)
        ports["drain"] = [0] * length
        for t, tile, token, columns in self.drains:
            entry = (tile * self.tokens + token) % self.ring
            (ports["drain"][t],) = payload("drain").pack(columns=columns, address=entry)
        return ports

    def check(self, record):
        """Checks every drained sum and its slot."""
        c, width = self.c, self.c.lanes
        expected = accumulate(c, self.weights, self.activations)
        cycles = [t + latency("drain_latency") for t, *_ in self.drains]
        seen = payload("drained").unpack(record.raw("drained", cycles), values=width)
        for i, (_, tile, token, columns) in enumerate(self.drains):
            first = tile * c.tile + columns * width
            where = f"tile {tile}, token {token}, columns {columns}"
            assert seen["values"][i].tolist() == expected[token, first : first + width].tolist(), where
            assert int(seen["columns"][i]) == columns, where
            assert int(seen["address"][i]) == (tile * self.tokens + token) % self.ring, where


async def _accumulate(dut, *shape, **options):
    run = _Run(*shape, **options)
    await begin(dut)
    run.check(await trace(dut, run.inputs(), ["drained"]))
    return run


@cocotb.test()
async def test_one_token(dut):
    """M = 1: the same address of the group accumulator is used in consecutive cycles."""
    await _accumulate(dut, 1, 2, 5, 3)


@cocotb.test()
async def test_all_tokens(dut):
    """As many tokens as the ring is designed for, and more output tiles than it holds."""
    await _accumulate(dut, config().max_tokens, 2, 3, 5)


@cocotb.test()
@cocotb.parametrize(tokens=[1, 2, 3])
async def test_gaps(dut, tokens):
    """Cycles without a token between the others, with as many tokens as the hardware supports."""
    await _accumulate(dut, min(tokens, config().max_tokens), 3, 4, 4, gap=0.5)


@cocotb.test()
@cocotb.parametrize(kind=["minimum", "maximum", "bound", "negative_bound", "zero_rows"])
async def test_extremes(dut, kind):
    """K = max_k in the longest groups: with ``bound`` every accumulator reaches the largest value of its width."""
    size = config().max_group_size // config().tile
    await _accumulate(dut, 1, size, config().max_k // config().max_group_size, 1, kind=kind)
