# SPDX-License-Identifier: Apache-2.0
"""The drain, with a model of the columns at its chain: its results, their order and speed, and the entries it frees."""

import cocotb
import numpy as np
from cocotb.triggers import FallingEdge, RisingEdge

from hw.spec.config import EXPONENT_BITS
from hw.spec.memory.transfers import result_transfers
from hw.spec.numerics.linear import to_float32
from hw.spec.ops.command import LayerCommand
from sim.bench.dut import begin, config, latency, payload
from sim.bench.layers import random_layer
from sim.bench.monitor import Monitor, consecutive
from sim.bench.packing import pack_elements
from sim.bench.streams import StreamSink, StreamSource, cycle, never, randomly, rng


class _Layer:
    """One command, its sums and exponents, and the transfers that it must produce."""

    def __init__(self, random, whole, reuse):
        c = config()
        layer = random_layer(c, random, max_k=64, max_tiles=4)
        tokens, n = min(int(random.choice([1, 2, c.max_tokens])), c.max_tokens), layer.n
        if whole:
            n = -(-n // c.tile) * c.tile
            layer = type(layer)(c, layer.k, n, layer.group_size)
        self.command = LayerCommand.from_layer(layer, tokens, reuse)
        bound = c.max_k * c.centred_max * c.activation_max * c.scale_max
        shift = random.integers(0, bound.bit_length() - 1, (tokens, layer.out_tiles * c.tile))
        self.sums = random.integers(-bound, bound, shift.shape, endpoint=True) >> shift
        self.rows = random.integers(-60, 60, (layer.out_tiles, c.tile))
        self.token_exponents = random.integers(-60, 60, tokens)
        self.n, self.tokens, self.tiles = n, tokens, layer.out_tiles

    def use(self, token_exponents):
        """Uses the activations of the layer before: the drain sees only their exponents."""
        self.tokens = len(token_exponents)
        self.token_exponents = token_exponents

    def transfers(self):
        """(values, the other fields) in order."""
        c = config()
        exponents = self.token_exponents[:, None] + self.rows.reshape(1, -1) - 15 - c.fraction_bits
        y = to_float32(self.sums, exponents).view(np.uint32)
        transfers = result_transfers(c, self.tokens, self.n)
        return [(y[item.token, item.columns.start : item.columns.stop].tolist(), item.fields) for item in transfers]


class _Bench:
    """Models the columns, the activation buffer and the header reader."""

    def __init__(self, dut, random, count, whole, stalls):
        self.dut, self.random, c = dut, random, config()
        self.layers: list[_Layer] = []
        for number in range(count):
            layer = _Layer(random, whole, number > 0 and random.random() < 0.3)
            if layer.command.reuse:
                before = self.layers[-1]
                while layer.command.tokens != before.tokens:
                    layer = _Layer(random, whole, True)
                layer.use(before.token_exponents)
            self.layers.append(layer)
        self.command = StreamSource(dut, "command", dut.clk, stalls.get("command", never))
        self.exponents = StreamSource(dut, "exponents", dut.clk)
        self.results = StreamSink(dut, "results", dut.clk, stalls.get("results", never))
        self.tile_stall = stalls.get("tile_done", never)
        self.depth = 1 << (2 * c.max_tokens - 1).bit_length()
        self.ring = [None] * self.depth
        self.tiles = [(layer, tile) for layer in self.layers for tile in range(layer.tiles)]
        self.fresh = [layer for layer in self.layers if not layer.command.reuse]
        self.releases: list[int] = []
        self.written = self.released = self.banks = self.finished = 0
        for name in ("tile_done", "token_exponent", "drained"):
            getattr(dut, name).value = 0

    def _send(self):
        self.command.send(layer.command.to_int(config()) for layer in self.layers)
        for layer in self.layers:
            self.exponents.send(pack_elements(layer.rows, EXPONENT_BITS))

    async def run(self):
        """Drains all layers; returns the monitor of the streams."""
        dut = self.dut
        monitor = Monitor(dut, ("results",), ("ring_release", "bank_release", "tile_done"))
        self._send()
        wanted = [transfer for layer in self.layers for transfer in layer.transfers()]
        falling, rising, slots, idle = FallingEdge(dut.clk), RisingEdge(dut.clk), [], 0
        total = sum(layer.tokens * layer.tiles for layer in self.layers)
        while len(self.results.received) < len(wanted) or self.released < total:
            self._finish_tile()
            await falling
            self._answer_exponent()
            slots.append(self._fill(str(dut.slot.value)))
            if len(slots) > latency("chain_latency"):
                dut.drained.value = slots[-1 - latency("chain_latency")]
            await rising
            self.releases.append(int(dut.ring_release.value))
            self.released += self.releases[-1]
            self.banks += int(dut.bank_release.value)
            idle += 1
            assert idle < 40 * (len(wanted) + 400), f"{len(self.results.received)} of {len(wanted)} results"
        await cycle(dut.clk, 20)
        got = payload("results").unpack(self.results.received)
        for i, (values, fields) in enumerate(wanted):
            seen = [int(got["values"][i]) >> (32 * lane) & 0xFFFFFFFF for lane in range(len(values))]
            assert seen == values, f"transfer {i}: {list(map(hex, seen))}, not {list(map(hex, values))}"
            found = {name: int(got[name][i]) for name in fields}
            assert found == fields, f"transfer {i}: {found}, not {fields}"
        assert len(got["keep"]) == len(wanted)
        assert self.banks == len(self.fresh), f"{self.banks} banks released for {len(self.fresh)} commands"
        return monitor

    def _finish_tile(self):
        """Writes the sums of the next output tile when the ring has space for it, and signals it."""
        self.dut.tile_done.value = 0
        if self.finished == len(self.tiles) or self.tile_stall():
            return
        layer, tile = self.tiles[self.finished]
        # A token needs some cycles through the array, so a freed entry is not written again at once: by then the slot
        # has read it.
        freed = sum(self.releases[: max(0, len(self.releases) - latency("chain_latency") - 2)])
        if self.written - freed + layer.tokens > self.depth:
            return
        columns = slice(tile * config().tile, (tile + 1) * config().tile)
        for token in range(layer.tokens):
            self.ring[(self.written + token) % self.depth] = layer.sums[token, columns]
        self.written += layer.tokens
        self.finished += 1
        self.dut.tile_done.value = 1

    def _answer_exponent(self):
        """Answers with token exponents, in the cycle of the address; the other bank holds other values."""
        c, address = config(), int(str(self.dut.token_exponent_address.value), 2)
        bank, token = divmod(address, c.max_tokens)
        current = self.banks - 1
        value = 99
        if current >= 0 and bank == current % 2 and token < self.fresh[current].tokens:
            value = int(self.fresh[current].token_exponents[token])
        (self.dut.token_exponent.value,) = payload("token_exponent").pack(value=[value])

    def _fill(self, bits):
        """A slot as the columns return it."""
        if set(bits) - {"0", "1"}:
            return 0
        fields, width = payload("slot"), config().lanes
        slot = {name: int(values[0]) for name, values in fields.unpack([int(bits, 2)]).items() if name != "values"}
        entry = self.ring[slot["address"]]
        first = slot["columns"] * width
        values = np.zeros(width, np.int64) if entry is None else entry[first : first + width]
        return fields.pack(columns=slot["columns"], address=slot["address"], values=values[None])[0]


async def _drain(dut, count, whole=False, stalls=None):
    bench = _Bench(dut, rng(), count, whole, stalls or {})
    await begin(dut)
    return await bench.run(), bench


@cocotb.test()
async def test_full_throughput(dut):
    """``lanes`` results in every cycle, without a gap between tokens, tiles and layers."""
    monitor, bench = await _drain(dut, 12, whole=True)
    assert consecutive(monitor["results"])
    # The decision comes one cycle after the pulse, and the FIFO adds a cycle.
    assert monitor["results"][0] - monitor["tile_done"][0] == 1 + latency() + 1
    assert len(monitor["results"]) == sum(y.tokens * y.tiles for y in bench.layers) * config().tile // latency("lanes")


@cocotb.test()
async def test_partial_tiles(dut):
    await _drain(dut, 20)


@cocotb.test()
@cocotb.parametrize(speeds=[(0.5, 0.5, 0.5), (0.0, 0.9, 0.0), (0.9, 0.0, 0.9)])
async def test_random_stalls(dut, speeds):
    """A sink that stalls only fills the FIFO. Row exponents come in time: a tile starts only after them."""
    names = ("command", "results", "tile_done")
    await _drain(dut, 10, stalls={name: randomly(p, rng(n)) for n, (name, p) in enumerate(zip(names, speeds))})
