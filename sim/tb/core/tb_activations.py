# SPDX-License-Identifier: Apache-2.0
"""The activation buffer: what is written can be read when it is said to be, sums too, and banks wait for release."""

import cocotb
import numpy as np
from cocotb.triggers import FallingEdge, RisingEdge

from hw.spec.numerics.linear import group_sums
from hw.spec.ops.command import LayerCommand
from sim.bench.dut import begin, config, latency, payload
from sim.bench.layers import Job, activation_payloads, activations_of, random_layer, weights_of
from sim.bench.monitor import consecutive
from sim.bench.packing import unpack_elements
from sim.bench.streams import StreamSource, cycle, never, randomly, rng


def _jobs(random, count, reuse=0.0, tokens=None):
    c, jobs = config(), []
    for _ in range(count):
        layer = random_layer(c, random, max_k=160, max_tiles=1)
        again = bool(jobs) and random.random() < reuse
        m = tokens or int(random.integers(1, c.max_tokens, endpoint=True))
        activations = jobs[-1].activations if again else activations_of(layer, m, random)
        jobs.append(Job(jobs[-1].layer if again else layer, weights_of(layer, random), activations, again))
    return jobs


class _Bench:
    """Drives the buffer; addresses are set in mid-cycle, so that a read happens in the very cycle that allows it."""

    def __init__(self, dut, jobs, stall=never, command_stall=never):
        self.dut, self.jobs = dut, [job for job in jobs if not job.reuse]
        self.command = StreamSource(dut, "command", dut.clk, command_stall)
        self.slices = StreamSource(dut, "slices", dut.clk, stall)
        for name in ("release", "read_address", "sum_address", "exponent_address"):
            getattr(dut, name).value = 0
        c = config()
        self.bank_slices = c.max_tokens * (c.max_k // c.tile)
        self.now, self.ready = 0, 0
        self.transfers, self.due = [], {}
        self.reads, self.sums = [], {}
        for job in jobs:
            self.command.send(LayerCommand.from_layer(job.layer, job.tokens, job.reuse).to_int(c))
            if not job.reuse:
                self.slices.send(activation_payloads(job, payload("slices")))
        self._plan()

    def _plan(self):
        """Contents of the memories, in the order of the transfers."""
        self.mantissas, self.group_sums, self.ends, self.slice_ends = [], [], [], []
        for number, job in enumerate(self.jobs):
            c, base = config(), number % 2 * self.bank_slices
            size = job.layer.group_size
            slices = job.activations.mantissas.reshape(job.tokens, -1, c.tile).transpose(1, 0, 2).reshape(-1, c.tile)
            sums = group_sums(job.activations, size)
            for index, values in enumerate(slices):
                part, token = divmod(index, job.tokens)
                self.mantissas.append((base + index, values))
                group, within = divmod(part, job.layer.group_slices)
                whole = within == job.layer.group_slices - 1
                self.group_sums.append((base + group * job.tokens + token, int(sums[token, group])) if whole else None)
                self.slice_ends.append(token == job.tokens - 1)
            self.ends.append(len(self.mantissas))

    async def run(self, until, release=lambda bench: False, limit=20_000):
        """Run until the condition holds; returns the releases that were given."""
        dut, rising, falling, released = self.dut, RisingEdge(self.dut.clk), FallingEdge(self.dut.clk), 0
        for _ in range(limit):
            await falling
            self._ask()
            await rising
            self._check()
            fire = release(self)
            dut.release.value = int(fire)
            released += fire
            self.now += 1
            if until(self):
                return released
        raise AssertionError(f"not done after {limit} cycles: {len(self.transfers)} slices taken")

    def _ask(self):
        """Set addresses for reads that are allowed from this very cycle on."""
        dut = self.dut
        if str(dut.slice_ready.value) == "1":
            self.ready += 1
            ends = [i + 1 for i, end in enumerate(self.slice_ends) if end]
            end = ends[self.ready - 1]
            assert end <= len(self.transfers), "slice_ready came before the slice"
            start = ends[self.ready - 2] if self.ready > 1 else 0
            self.reads += range(start, end)
        if self.reads:
            index = self.reads.pop()  # the slice's last token first: it was written last
            address, values = self.mantissas[index]
            dut.read_address.value = address
            self.due[self.now + latency("read_latency")] = ("read_data", values)
        if self.now in self.sums:
            address, value = self.sums[self.now]
            dut.sum_address.value = address
            self.due[self.now + latency("read_latency"), "sum"] = ("sum_data", value)

    def _check(self):
        """At the end of the cycle: data that is due, and whether a slice went in."""
        dut, c = self.dut, config()
        name, values = self.due.pop(self.now, (None, None))
        if name:
            seen = unpack_elements([int(str(dut.read_data.value), 2)], c.activation_bits, c.tile, True)[0]
            assert np.array_equal(seen, values), f"cycle {self.now}: {seen}, not {values}"
        name, value = self.due.pop((self.now, "sum"), (None, None))
        if name:
            seen = unpack_elements([int(str(dut.sum_data.value), 2)], c.activation_sum_bits, 1, True)[0, 0]
            assert seen == value, f"cycle {self.now}: sum {seen}, not {value}"
        if str(dut.slices_valid.value) == str(dut.slices_ready.value) == "1":
            wanted = self.group_sums[len(self.transfers)]
            if wanted is not None:
                self.sums[self.now + latency("sum_latency")] = wanted
            self.transfers.append(self.now)

    async def read_back(self, number):
        """Read a whole bank again, exponents too, whatever the other bank is doing."""
        job, start = self.jobs[number], self.ends[number - 1] if number else 0
        self.reads = list(range(start, self.ends[number]))
        for token in range(job.tokens):
            await FallingEdge(self.dut.clk)
            self.dut.exponent_address.value = number % 2 * config().max_tokens + token
            await RisingEdge(self.dut.clk)
            bits = str(self.dut.exponent_data.value)
            assert unpack_elements([int(bits, 2)], 8, 1, True)[0, 0] == job.activations.exponents[token]


@cocotb.test()
async def test_full_throughput(dut):
    """A slice every cycle, also from one command to the next; every read as early as it is allowed."""
    bench = _Bench(dut, _jobs(rng(), 2))
    await begin(dut)
    await bench.run(lambda b: b.ready == sum(b.slice_ends) and not b.reads, lambda b: b.now == 0)
    await bench.run(lambda b: not b.due)
    assert consecutive(bench.transfers)
    assert len(bench.transfers) == bench.ends[-1]


@cocotb.test()
async def test_sums_of_short_groups(dut):
    """One token, groups of one slice: a sum is complete in every cycle, and read in the cycle that first allows it."""
    c = config()
    layer = random_layer(c, rng(), max_k=160, max_tiles=1)
    job = Job(layer, weights_of(layer, rng()), activations_of(layer, 1, rng()))
    bench = _Bench(dut, [job])
    await begin(dut)
    await bench.run(lambda b: len(b.transfers) == b.ends[-1] and b.now > b.transfers[-1] + 8)
    assert not bench.due


@cocotb.test()
@cocotb.parametrize(stall=[0.0, 0.5])
async def test_banks(dut, stall):
    """Two banks fill, a third waits; each holds its data until it is released; reusing commands bring nothing."""
    random = rng()
    bench = _Bench(dut, _jobs(random, 14, reuse=0.4), randomly(stall, rng(1)), randomly(stall, rng(2)))
    await begin(dut)
    # The first release stands for the bank that is missing at the start: without it only one bank can be filled.
    await bench.run(lambda b: b.now > 2 * b.bank_slices + 50)
    assert len(bench.transfers) == bench.ends[0]
    for number in range(len(bench.jobs)):
        held = len(bench.transfers)
        await bench.run(lambda b: True, lambda b: True)
        target = bench.ends[min(number + 1, len(bench.jobs) - 1)]
        await bench.run(lambda b, target=target: len(b.transfers) >= target and not b.reads)
        await bench.run(lambda b: not b.due)
        await bench.run(lambda b, t=bench.now: b.now > t + 30)
        assert len(bench.transfers) == target, f"{len(bench.transfers) - held} slices went in after release {number}"
        await bench.read_back(number)
        await bench.run(lambda b: not b.reads and not b.due)
    await cycle(dut.clk, 8)
    assert bench.ready == sum(bench.slice_ends)
