# SPDX-License-Identifier: Apache-2.0
"""The check against hw.spec.control.refusal: valid descriptors pass, with the values derived from them; others fail."""

from dataclasses import replace
from typing import Any

import cocotb
from cocotb.triggers import RisingEdge

from hw.spec.config import MAX_N
from hw.spec.control.descriptor import FLOAT_BYTES, Descriptor, activation_beats
from hw.spec.control.program import LENGTH_BITS
from hw.spec.control.refusal import Accepted, refusal
from hw.spec.control.registers import ErrorCode
from hw.spec.memory.geometry import LayerLayout
from hw.spec.memory.kv_cache import PAIRED_BITS
from hw.spec.numerics.attention import CHUNK
from hw.spec.numerics.block_float import BLOCK
from hw.spec.ops import SCORES, VALUES, Opcode
from hw.spec.ops.append import AppendDescriptor
from hw.spec.ops.command import LayerCommand, command_fields
from hw.spec.ops.scores import ScoresDescriptor
from sim.bench.attention.descriptors import (
    AttentionDescriptor,
    attention_rules,
    random_append,
    random_attention,
)
from sim.bench.descriptors import (
    AnyDescriptor,
    cases,
    fields_of,
    mutations,
    random_linear,
    random_vector,
)
from sim.bench.dut import begin, config, latency, payload
from sim.bench.layers import random_layer
from sim.bench.streams import Stall, StreamSink, StreamSource, cycle, never, randomly, rng, until
from sim.harness import settings

LONG = settings().get("long", False)
"""All changes of every descriptor."""

HAS_VECTOR = config().has_vector_unit


def _number(words: list[int]) -> int:
    return sum(word << 32 * index for index, word in enumerate(words))


def _limits() -> list[LayerLayout]:
    """The largest and the smallest layers."""
    c = config()
    size, least = c.max_group_size, LayerLayout(c, c.max_k // c.max_group_size * c.max_group_size, 1, c.max_group_size)
    smallest = least.stream.min_group_slices * c.tile
    groups = c.max_k // smallest
    return [
        LayerLayout(c, least.k, 1, size),
        LayerLayout(c, size, MAX_N, size),
        LayerLayout(c, groups * smallest, c.tile + 1, smallest),
        LayerLayout(c, smallest, c.tile, smallest),
    ]


def _columns(random) -> int:
    """A number of columns for VECTOR."""
    return int(random.integers(1, random.choice([40, 1000, MAX_N]), endpoint=True))


def _expected(descriptor: AnyDescriptor, layer: LayerLayout | None) -> dict[str, int]:
    """The fields of ``work`` that matter for this operation; those of the command have the prefix ``command.``."""
    c, interesting = config(), payload("work").fields
    values = {field.name: getattr(descriptor, field.name) for field in fields_of(c, descriptor)}
    found = {name: value for name, value in values.items() if name in interesting}
    if c.has_attention:
        found |= {name: int(descriptor.opcode == Opcode[name.upper()]) for name in ("append", "scores", "values")}
    if isinstance(descriptor, AttentionDescriptor):
        return found | _attention(descriptor)
    if isinstance(descriptor, Descriptor):
        assert layer is not None
        found |= {"weight_beats": layer.beats, "activation_beats": activation_beats(c, descriptor.tokens, layer.slices)}
        counts = LayerCommand.from_layer(layer, descriptor.tokens, bool(descriptor.reuse)).__dict__
    else:
        columns = descriptor.out_features
        counts = {
            "tokens": descriptor.tokens,
            "out_tiles": -(-columns // c.tile),
            "last_columns": (columns - 1) % c.tile + 1,
        }
    if HAS_VECTOR:
        found["vector"] = int(layer is None)
    if c.has_attention and layer:
        found |= {"fetch_rows": 1, "weight_tiles": 1, "planes": 1, "unit_groups": layer.groups, "chunks": 1}
    if c.reads_by_pieces and layer:
        assert isinstance(descriptor, Descriptor)
        row = FLOAT_BYTES * layer.k
        found |= {"by_pieces": int(descriptor.tokens > 1), "last_slice": layer.slices - 1}
        found |= {"fetch_rows": descriptor.tokens, "fetch_pitch": row, "activation_beats": row * 8 // c.port_width}
        columns = descriptor.out_features >> descriptor.silu
        found |= {
            "row_end": descriptor.activations + row,
            "results_end": descriptor.results + FLOAT_BYTES * columns,
        }
    elif c.reads_by_pieces:
        found["by_pieces"] = 0
    present = command_fields(c)
    return found | {f"command.{name}": int(value) for name, value in counts.items() if name in present}


def _attention(descriptor: AttentionDescriptor) -> dict[str, int]:
    """The derived values of attention, and the flags that other operations have in the places of its fields."""
    c, found = config(), {"vector": 0, "rotary": 0, "silu": 0, "quiet": 0, "second": 0, "squares": 0, "pieces": 0}
    found |= {"scale": int(descriptor.opcode != Opcode.APPEND), "command.tokens": descriptor.tokens, "command.reuse": 0}
    if c.reads_by_pieces:
        found["by_pieces"] = 0
    if isinstance(descriptor, AppendDescriptor):
        return found | {"addend_pitch": 0, "fetch_pitch": descriptor.activation_pitch}
    if isinstance(descriptor, ScoresDescriptor):
        cache, paired = SCORES.cache(c, vars(descriptor)), int(c.weight_bits == PAIRED_BITS)
        command = LayerCommand.from_layer(cache.layer, descriptor.tokens).__dict__ | {"paired": paired}
        found |= {"weight_beats": cache.layer.beats, "weight_tiles": 1, "unit_groups": cache.head_size // BLOCK}
        found["chunks"] = 1
        found |= {"fetch_rows": descriptor.tokens, "fetch_pitch": descriptor.activation_pitch}
        found["activation_beats"] = FLOAT_BYTES * cache.head_size * 8 // c.port_width
        return found | {f"command.{name}": int(value) for name, value in command.items()}
    cache, positions = VALUES.cache(c, vars(descriptor)), descriptor.positions
    chunks = -(-positions // CHUNK)
    assert cache.beats_of(positions) % cache.column_tiles == 0
    return found | {
        "command.out_tiles": cache.column_tiles,
        "chunks": chunks,
        "last_groups": -(-((positions - 1) % CHUNK + 1) // cache.group),
        "weight_tiles": cache.column_tiles,
        "weight_beats": cache.beats_of(min(positions, CHUNK)) // cache.column_tiles,
        "last_beats": (cache.beats_of(positions) - cache.beats_of((chunks - 1) * CHUNK)) // cache.column_tiles,
        "activations": descriptor.exponents,
        "activation_beats": CHUNK * 8 // c.port_width,
        "fetch_rows": cache.column_tiles,
        "fetch_pitch": cache.exponent_pitch,
        **({"results_end": descriptor.results + FLOAT_BYTES * descriptor.out_features} if c.reads_by_pieces else {}),
        "planes": 1,
        "tile_step": cache.chunks * cache.layer.tile_beats * c.port_width // 8,
    }


class _Bench:
    def __init__(self, dut: Any, stall: Stall = never):
        self.dut = dut
        self.source = StreamSource(dut, "descriptors", dut.clk, stall)
        self.work = StreamSink(dut, "work", dut.clk, stall)
        self.index = 0
        """Index of the last descriptor: a different one for each."""
        if config().has_programs:
            dut.index.value = 0

    async def payload_comes_early(self) -> None:
        """The payload is there in the cycle before its valid."""
        edge, was_valid, before = RisingEdge(self.dut.clk), True, None
        while True:
            await edge
            valid, payload_now = str(self.dut.work_valid.value) == "1", str(self.dut.work_payload.value)
            assert was_valid or not valid or payload_now == before, "the payload changed with valid"
            was_valid, before = valid, payload_now

    async def accept(self, descriptor: AnyDescriptor, layer: LayerLayout | None = None) -> None:
        """A valid descriptor; `layer` is that of a linear layer."""
        if config().has_programs:
            self.index = (5 * self.index + 77) % (1 << LENGTH_BITS)
            self.dut.index.value = self.index
        self.source.send(_number(descriptor.to_words()))
        (raw,) = await self.work.take(1, cycles=200)
        fields = {name: int(values[0]) for name, values in payload("work").unpack([raw]).items()}
        command = fields.pop("command")
        for name, width in command_fields(config()).items():
            fields[f"command.{name}"], command = command & ((1 << width) - 1), command >> width
        expected = _expected(descriptor, layer) | ({"index": self.index} if config().has_programs else {})
        assert {name: fields[name] for name in expected} == expected

    async def outcome(self, words: list[int]) -> ErrorCode:
        """Send one descriptor, and find out whether it is refused."""
        self.source.send(_number(words))
        edge = RisingEdge(self.dut.clk)
        for _ in range(20):
            await edge
            if int(self.dut.error.value) or self.work.received:
                break
        code = ErrorCode(int(self.dut.error.value))
        assert len(self.work.received) == (code == ErrorCode.NONE), f"{len(self.work.received)} passed, error {code}"
        self.work.received.clear()
        return code

    async def reset(self) -> "_Bench":
        """Reset the block; returns the bench for what follows."""
        self.dut.rst.value = 1
        self.source._queue.clear()
        self.source._task.cancel()
        self.work._task.cancel()
        await cycle(self.dut.clk, 2)
        bench = _Bench(self.dut)
        self.dut.rst.value = 0
        await cycle(self.dut.clk, 2)
        return bench


async def _accept_many(dut: Any, stall: Stall) -> None:
    random, bench = rng(1), _Bench(dut, stall)
    await begin(dut)
    cocotb.start_soon(bench.payload_comes_early())
    for layer in [*_limits(), *(random_layer(config(), random, max_k=config().max_k, max_tiles=40) for _ in range(20))]:
        descriptor = random_linear(layer, random)
        assert refusal(config(), descriptor.to_words()) == ErrorCode.NONE
        await bench.accept(descriptor, layer)
        for _ in range(int(random.integers(3)) if HAS_VECTOR else 0):
            await bench.accept(random_vector(config(), random, _columns(random)))
        if random.integers(2):
            await bench.accept(random_linear(layer, random, reuse=descriptor), layer)
        for bank in range(int(random.integers(3)) if config().has_attention else 0):
            await bench.accept(random_append(config(), random))
            for made in random_attention(config(), random, bank):
                await bench.accept(made)
    assert int(dut.error.value) == ErrorCode.NONE


@cocotb.test()
async def good_ones(dut):
    """Random and extreme descriptors, with and without reuse: the work equals that of hw.spec."""
    await _accept_many(dut, never)


@cocotb.test()
async def good_ones_with_stalls(dut):
    """The same test with pauses."""
    await _accept_many(dut, randomly(0.5, rng(2)))


@cocotb.test()
async def time(dut):
    """The latency is the one that the block states."""
    random, bench = rng(1), _Bench(dut)
    await begin(dut)
    bench.source.send(_number(random_linear(_limits()[0], random).to_words()))
    await until(dut.clk, lambda: bench.source.transfers == 1, "the descriptor", cycles=50)
    # The source records a transfer one edge after it happens.
    assert await until(dut.clk, lambda: bool(int(dut.work_valid.value)), "work", cycles=50) == latency() - 1


@cocotb.test()
async def bad_ones(dut):
    """Every field one away from its valid value, at its limits, and with a bit flipped; every reserved bit.

    This is so for one descriptor of each operation, and for a part of the changes of the others.
    """
    random, bench, codes = rng(1), _Bench(dut), set()
    await begin(dut)
    descriptors: list[AnyDescriptor] = [random_linear(layer, random) for layer in _limits()]
    descriptors += [random_linear(random_layer(config(), random), random) for _ in range(3)]
    # Hardware without the vector unit refuses them.
    descriptors += [random_vector(config(), random, n) for n in (1, 512, MAX_N)]
    # With attention values need scores, which are accepted before them.
    before: dict[int, list[list[int]]] = {}
    if config().has_attention:
        scores, values = random_attention(config(), random, 1)
        descriptors += [random_append(config(), random), scores, values]
        before[Opcode.VALUES] = [scores.to_words()]
    complete: set[int] = set()
    for descriptor in descriptors:
        good, changed = descriptor.to_words(), mutations(config(), descriptor, random)
        if descriptor.opcode in complete and not LONG:
            # Every change of one descriptor of each operation; of the others some.
            changed = [changed[index] for index in random.choice(len(changed), 40, replace=False)]
        complete.add(descriptor.opcode)
        for words in changed:
            accepted = Accepted()
            for earlier in before.get(descriptor.opcode, []):
                assert accepted.take(config(), earlier) == ErrorCode.NONE == await bench.outcome(earlier)
            expected = accepted.take(config(), words)
            codes.add(expected)
            got = await bench.outcome(words)
            assert got == expected, f"{got.name}, not {expected.name}: {[f'{word:#x}' for word in words]}"
            # After an invalid descriptor, the block ignores all others until the reset.
            if expected:
                bench.source.send(_number(good))
                await cycle(dut.clk, 12)
                assert int(dut.error.value) == expected and not bench.work.received
            bench = await bench.reset()
    assert codes == {ErrorCode.NONE, ErrorCode.OPCODE, ErrorCode.SHAPE}


@cocotb.test()
async def rules(dut):
    """One step on either side of every rule of the epilogue."""
    bench = _Bench(dut)
    await begin(dut)
    for case, good, bad in cases(config()):
        assert await bench.outcome(good.to_words()) == ErrorCode.NONE, case
        assert await bench.outcome(bad.to_words()) == ErrorCode.SHAPE, case
        bench = await bench.reset()


@cocotb.test(skip=not config().has_attention)
async def attention_rules_hold(dut):
    """One step on either side of every rule of attention, also of those about the banks of scores."""
    bench = _Bench(dut)
    await begin(dut)
    for case in attention_rules(config()):
        for last, code in ((case.good, ErrorCode.NONE), (case.bad, ErrorCode.SHAPE)):
            accepted = Accepted()
            for made in case.before:
                assert (
                    accepted.take(config(), made.to_words()) == ErrorCode.NONE == await bench.outcome(made.to_words())
                )
            assert accepted.take(config(), last.to_words()) == code, case
            assert await bench.outcome(last.to_words()) == code, case
            bench = await bench.reset()


@cocotb.test(skip=not config().has_attention)
async def reuse_after_attention(dut):
    """Scores and values bring other activations; appending does not."""
    c, random, bench = config(), rng(6), _Bench(dut)
    await begin(dut)
    layer = random_layer(c, random)
    first = random_linear(layer, random)
    again, (scores, values) = random_linear(layer, random, reuse=first), random_attention(c, random, 0)
    for between, code in (
        ([random_append(c, random)], ErrorCode.NONE),
        ([scores], ErrorCode.SHAPE),
        ([scores, values], ErrorCode.SHAPE),
    ):
        for made in (first, *between):
            assert await bench.outcome(made.to_words()) == ErrorCode.NONE
        assert await bench.outcome(again.to_words()) == code
        bench = await bench.reset()


@cocotb.test()
async def reuse(dut):
    """The activations of the previous linear layer may be used again, also if other operations are in between."""
    c, random, bench = config(), rng(3), _Bench(dut)
    await begin(dut)
    layer = random_layer(c, random)
    first = random_linear(layer, random)
    again = random_linear(layer, random, reuse=first)
    other = replace(again, tokens=first.tokens % c.max_tokens + 1)
    between = [random_vector(c, random, 512).to_words()] if HAS_VECTOR else []
    if c.max_tokens > 1:
        # All pitches are large enough for several tokens.
        again, other = (
            replace(each, **dict.fromkeys(("result_pitch", *_pitches()), 4 * 4096)) for each in (again, other)
        )
    for before, last, code in (
        ([], again, ErrorCode.SHAPE),
        (between, again, ErrorCode.SHAPE),
        ([first.to_words()], again, ErrorCode.NONE),
        ([first.to_words(), *between], again, ErrorCode.NONE),
        ([first.to_words(), *between], other, ErrorCode.SHAPE if c.max_tokens > 1 else ErrorCode.NONE),
    ):
        for words in before:
            assert await bench.outcome(words) == ErrorCode.NONE
        assert await bench.outcome(last.to_words()) == code
        bench = await bench.reset()


def _pitches() -> list[str]:
    return ["second_pitch", "addend_pitch", "table_pitch"] if HAS_VECTOR else []
