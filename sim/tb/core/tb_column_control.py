# SPDX-License-Identifier: Apache-2.0
"""The control at the column heads against the loop nest: flags, tokens, ring entries, sums, scales, every cycle."""

from typing import NamedTuple

import cocotb
from cocotb.triggers import FallingEdge, RisingEdge

from hw.spec.config import SCALE_BITS
from hw.spec.memory.geometry import StreamLayout
from hw.spec.ops.command import LayerCommand
from sim.bench.dut import begin, config, latency, payload
from sim.bench.layers import random_layer
from sim.bench.packing import Layout
from sim.bench.streams import StreamSource, cycle, never, randomly, rng

RING_DELAY = latency("ring_delay")
"""Cycles from a psum to its group's addition to the ring: what :mod:`sim.tb.core.tb_columns` measures."""


class _Token(NamedTuple):
    """What column 0 must be told about one token."""

    token: int
    first_slice: int
    last_slice: int
    first_group: int
    sum_address: int
    entry: int
    record: int
    tile_done: int
    starts: int
    """Number of the command that this token belongs to."""


def _tokens(commands):
    """Every token of the layers, in order."""
    c = config()
    bank, base, entry, record = 1, c.max_tokens * (c.max_k // c.tile), 0, 0
    ring = 1 << (2 * c.max_tokens - 1).bit_length()
    for number, command in enumerate(commands):
        bank ^= not command.reuse
        for _ in range(command.out_tiles):
            for group in range(command.groups):
                for part in range(command.group_slices):
                    last = part == command.group_slices - 1
                    for token in range(command.tokens):
                        done = last and group == command.groups - 1 and token == 0
                        yield _Token(
                            token,
                            int(part == 0),
                            int(last),
                            int(group == 0),
                            bank * base + group * command.tokens + token,
                            (entry + token) % ring,
                            record,
                            int(done),
                            number,
                        )
                record += 1
            entry += command.tokens


class _Bench:
    def __init__(self, dut, random, count):
        self.dut, c = dut, config()
        self.commands = []
        for number in range(count):
            layer = random_layer(c, random, max_k=160, max_tiles=3)
            tokens = min(int(random.choice([1, 2, c.max_tokens])), c.max_tokens)
            self.commands.append(LayerCommand.from_layer(layer, tokens, number > 0 and random.random() < 0.3))
        self.tokens = list(_tokens(self.commands))
        bits = StreamLayout(c).record_bits
        groups = self.tokens[-1].record + 1
        self.records = [int.from_bytes(random.bytes(bits // 8 + 1), "little") % (1 << bits) for _ in range(groups)]
        bound = 1 << (c.activation_sum_bits - 1)
        self.sums = random.integers(-bound, bound, 2 * c.max_tokens * (c.max_k // c.tile))
        self.source = StreamSource(dut, "command", dut.clk)
        self.record_source = StreamSource(dut, "records", dut.clk)
        dut.token.value = dut.sum_data.value = 0
        self.sum_fields = Layout({"sum": (0, c.activation_sum_bits, True)})

    async def run(self, stall):
        """Feed tokens, answer the reads of sums, and check all outputs of every cycle."""
        dut, c, sent, log = self.dut, config(), 0, []
        self.source.send(cmd.to_int(c) for cmd in self.commands)
        self.record_source.send(self.records)
        falling, rising, addresses = FallingEdge(dut.clk), RisingEdge(dut.clk), []
        await cycle(dut.clk, 4)
        after = 0
        while after < latency("lead") + RING_DELAY + 8:
            after += sent == len(self.tokens)
            # A token only follows its command, which the walker takes with the last token of the one before.
            known = sent < len(self.tokens) and self.source.transfers > self.tokens[sent].starts
            fire = known and not stall()
            dut.token.value = int(fire)
            log.append(self.tokens[sent] if fire else None)
            sent += fire
            await falling
            addresses.append(str(dut.sum_address.value))
            if len(addresses) > latency("lead"):
                address = int(addresses[-1 - latency("lead")], 2)
                dut.sum_data.value = self.sum_fields.pack(sum=[self.sums[address]])[0]
            await rising
            self._check(log)
        assert self.record_source.transfers == len(self.records)
        assert not int(dut.underrun.value)
        return log

    def _check(self, log):
        """The outputs of the cycle that has just ended, cycle ``len(log) - 1``."""
        dut, lead = self.dut, latency("lead")

        def ago(cycles):
            return log[-1 - cycles] if len(log) > cycles else None

        token, flags, fields = ago(lead), str(dut.group.value)[::-1], payload("group").fields
        assert flags[fields["valid"].offset] == str(int(token is not None)), "group.valid"
        assert flags[fields["ends"].offset] == str(int(bool(token and token.last_slice))), "group.ends"
        if token:
            group = {name: int(values[0]) for name, values in payload("group").unpack([self._int("group")]).items()}
            assert (group["token"], group["first_slice"]) == (token.token, token.first_slice)
            if token.last_slice:
                assert group["sum"] == int(self.sums[token.sum_address]), f"sum of {token}"
                record, scale_bits = self.records[token.record], config().tile * SCALE_BITS
                assert self._int("scales") == record & ((1 << scale_bits) - 1)
                assert self._int("zero_points") == record >> scale_bits
        token = ago(lead + RING_DELAY)
        write = bool(token and token.last_slice)
        assert str(dut.ring.value)[-1] == str(int(write)), "ring.write"
        if token and write:
            ring = payload("ring").unpack([self._int("ring")])
            assert (int(ring["first_group"][0]), int(ring["address"][0])) == (token.first_group, token.entry)
        token = ago(lead + RING_DELAY + 1)
        assert self._int("tile_done") == int(bool(token and token.tile_done))

    def _int(self, name):
        return int(str(getattr(self.dut, name).value), 2)


@cocotb.test()
async def test_full_throughput(dut):
    """A token every cycle, from the first layer's first to the last layer's last."""
    bench = _Bench(dut, rng(), 12)
    await begin(dut)
    log = await bench.run(never)
    first = next(i for i, token in enumerate(log) if token)
    assert all(log[first : first + len(bench.tokens)])


@cocotb.test()
@cocotb.parametrize(p=[0.3, 0.8])
async def test_random_stalls(dut, p):
    bench = _Bench(dut, rng(), 8)
    await begin(dut)
    await bench.run(randomly(p, rng(1)))


@cocotb.test()
async def test_underrun(dut):
    """A group that ends without its record is noticed, and stays so."""
    bench = _Bench(dut, rng(), 1)
    await begin(dut)
    bench.source.send(bench.commands[0].to_int(config()))
    await cycle(dut.clk, 4)
    dut.token.value = 1
    # Up to the first token of the group's last slice, which is the first to want the record.
    await cycle(dut.clk, (bench.commands[0].group_slices - 1) * bench.commands[0].tokens + 1)
    dut.token.value = 0
    assert not int(dut.underrun.value)
    await cycle(dut.clk, latency("lead") + 4)
    assert int(dut.underrun.value)
    await cycle(dut.clk, 20)
    assert int(dut.underrun.value)
