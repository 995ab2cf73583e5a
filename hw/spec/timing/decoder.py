# SPDX-License-Identifier: Apache-2.0
"""The performance model of whole tokens and prompts of a decoder, from its shape alone.

The programs are those of hardware with attention, in which a call is one program: the norm, then for each block qkv,
appends, scores and values, o, gate and up, down; then the head. A test requires that they take as many cycles as the
programs of the runtime. All blocks of a shape take the same time, so two and three blocks are predicted, and the others
are like the third.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from hw.spec.config import AcceleratorConfig
from hw.spec.memory.geometry import LayerLayout, ceil_div, fit_layer
from hw.spec.memory.kv_cache import KEY_BITS, VALUE_BITS, KeyCache, ValueCache
from hw.spec.memory.operands import DATA_ALIGNMENT, FLOAT_BYTES
from hw.spec.ops import Wait
from hw.spec.ops.append import AppendDescriptor
from hw.spec.ops.linear import Descriptor
from hw.spec.ops.scores import BANKS, ScoresDescriptor, bank_words
from hw.spec.ops.values import ValuesDescriptor
from hw.spec.ops.vector import VectorDescriptor
from hw.spec.timing.program import AnyDescriptor, program_cycles

_EMBEDDED, _NORMED, _COPIED, _QKV, _ATTENDED, _MIDDLE, _GATED, _LOGITS = (index << 24 for index in range(1, 9))
"""Places in memory. Only whether two are the same has a meaning, and where rows end that another descriptor reads."""


@dataclass(frozen=True)
class DecoderShape:
    """What the cycles of a decoder depend on.

    hidden, layers, heads, kv_heads, head_size, intermediate, vocab : as in a Hugging Face configuration
    key_bits : of the cached keys, 8 or 16
    head_bits : of the weights of lm_head; more than ``weight_bits`` take two planes
    group_size : weights that share a scale
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocab: int
    key_bits: int = min(KEY_BITS)
    head_bits: int = 8
    group_size: int = 128


QWEN = DecoderShape(896, 24, 14, 2, 64, 4864, 151_936)
"""Qwen2.5-0.5B with 4-bit weights, and lm_head in int8."""


class Unit(NamedTuple):
    """Rows of queries that run at once. total : positions that the last row sees."""

    head: int
    rows: int
    total: int
    causal: bool


def units(config: AcceleratorConfig, shape: DecoderShape, tokens: int, position: int, last: bool) -> Iterator[Unit]:
    """The fewest units for all heads of tokens from a position on; those of the last token alone if ``last`` is set.

    A unit is query heads of one token that share a KV head, or tokens of one query head.
    """
    total = position + tokens
    most = min(config.max_tokens, config.score_words // bank_words(1, total))
    first, shared = tokens - 1 if last else 0, shape.heads // shape.kv_heads
    count = tokens - first
    if count * shape.kv_heads * ceil_div(shared, most) <= shape.heads * ceil_div(count, most):
        for token in range(first, tokens):
            for kv_head in range(shape.kv_heads):
                for head in range(0, shared, most):
                    yield Unit(kv_head * shared + head, min(most, shared - head), position + token + 1, False)
    else:
        for head in range(shape.heads):
            for token in range(first, tokens, most):
                rows = min(most, tokens - token)
                yield Unit(head, rows, position + token + rows, True)


class _Program:
    """The program of a call. output : the head's best token of the last token; without, only what the cache needs."""

    def __init__(self, config: AcceleratorConfig, shape: DecoderShape, tokens: int, position: int, output: bool):
        self.config, self.shape, self.tokens, self.position, self.output = config, shape, tokens, position, output

    def descriptors(self) -> list[AnyDescriptor]:
        """All of them."""
        shape, tokens = self.shape, self.tokens
        program: list[AnyDescriptor] = [self._norm()]
        for layer in range(shape.layers):
            is_last = layer == shape.layers - 1
            columns = (shape.heads + 2 * shape.kv_heads) * shape.head_size
            first = {"scale": 1, "add": 1, "rotary": 1, "head": shape.head_size}
            program.append(self._linear(shape.hidden, columns, tokens, _NORMED, _QKV, **first))
            program += self._appends()
            if is_last and not self.output:
                return program
            program += self._attention(last=is_last)
            program += self._rest(1 if is_last else tokens, is_last)
        return program + self._head()

    def _norm(self) -> VectorDescriptor:
        return VectorDescriptor(
            tokens=self.tokens,
            out_features=self.shape.hidden,
            activations=_EMBEDDED,
            source_pitch=DATA_ALIGNMENT,
            quiet=1,
            second=1,
            squares=1,
            second_results=_NORMED,
            second_pitch=FLOAT_BYTES * self.shape.hidden,
        )

    def _linear(self, k: int, n: int, tokens: int, source: int, results: int, **epilogue: int) -> Descriptor:
        layer = fit_layer(self.config, k, n, self.shape.group_size)
        return self._layer(layer, tokens, source, results, **epilogue)

    def _layer(self, layer: LayerLayout, tokens: int, source: int, results: int, **epilogue: int) -> Descriptor:
        wait = Wait.ACTIVATIONS
        plain = Descriptor.from_layer(layer, tokens, activations=source, weights=0, results=results, wait=wait)
        return replace(plain, **epilogue)

    def _appends(self) -> Iterator[AppendDescriptor]:
        shape, config = self.shape, self.config
        for keys in (1, 0):
            for head in range(shape.kv_heads):
                yield AppendDescriptor(
                    keys=keys,
                    planes=(shape.key_bits if keys else VALUE_BITS) // config.weight_bits,
                    tokens=self.tokens,
                    out_features=shape.head_size,
                    activations=_QKV,
                    activation_pitch=DATA_ALIGNMENT,
                    weights=0,
                    weights_stride=0,
                    slot=self.position,
                    slots=self.position + self.tokens,
                    wait=Wait.NOTHING if head or not keys else Wait.ACTIVATIONS,
                )

    def _attention(self, last: bool) -> Iterator[ScoresDescriptor | ValuesDescriptor]:
        """Scores of a unit come before the values of the one before."""
        shape, config, before = self.shape, self.config, None
        for number, unit in enumerate(units(config, shape, self.tokens, self.position, last)):
            bank = number % BANKS
            yield ScoresDescriptor.from_cache(
                KeyCache(config, shape.head_size, unit.total, shape.key_bits),
                unit.total,
                tokens=unit.rows,
                activations=_QKV,
                activation_pitch=FLOAT_BYTES * shape.head_size,
                weights=0,
                turn=unit.total,
                score_factor=0,
                causal=int(unit.causal),
                bank=bank,
                wait=Wait.NOTHING if number else Wait.WEIGHTS,
            )
            if before:
                yield before
            before = ValuesDescriptor(
                tokens=unit.rows,
                out_features=shape.head_size,
                positions=unit.total,
                slots=ValueCache(config, shape.head_size, unit.total).positions,
                weights=0,
                weights_stride=0,
                exponents=0,
                results=_ATTENDED + FLOAT_BYTES * shape.head_size * unit.head,
                result_pitch=FLOAT_BYTES * shape.head_size * (shape.heads if unit.causal else 1),
                bank=bank,
            )
        assert before
        yield before

    def _rest(self, tokens: int, is_last: bool) -> list[Descriptor]:
        shape, pitch = self.shape, FLOAT_BYTES * self.shape.hidden
        norm = {"add": 1, "addend_pitch": pitch, "second": 1, "squares": 1}
        norm |= {"second_results": _NORMED, "second_pitch": pitch}
        gated = {"scale": 1, "silu": 1, "result_pitch": FLOAT_BYTES * shape.intermediate}
        return [
            self._linear(shape.heads * shape.head_size, shape.hidden, tokens, _ATTENDED, _MIDDLE, **norm),
            self._linear(shape.hidden, 2 * shape.intermediate, tokens, _NORMED, _GATED, **gated),
            self._linear(shape.intermediate, shape.hidden, tokens, _GATED, _EMBEDDED, quiet=int(is_last), **norm),
        ]

    def _head(self) -> list[AnyDescriptor]:
        """lm_head with more bits than the hardware's has planes, for each of which the activations are copied."""
        shape, config = self.shape, self.config
        planes = ceil_div(shape.head_bits, config.weight_bits)
        one = fit_layer(config, shape.hidden, shape.vocab, shape.group_size)
        layer = LayerLayout(config, planes * one.k, one.n, one.group_size)
        copy = VectorDescriptor(
            tokens=1,
            out_features=shape.hidden,
            activations=_NORMED,
            source_pitch=DATA_ALIGNMENT,
            results=_COPIED,
            wait=Wait.ACTIVATIONS,
        )
        head = self._layer(layer, 1, _NORMED, _LOGITS, scale=1, quiet=1, pieces=1)
        return [*[copy] * (planes - 1), head]


def call_cycles(config: AcceleratorConfig, shape: DecoderShape, tokens: int, position: int, output: bool = True) -> int:
    """Cycles of a call of 1 to max_tokens tokens, the first of which has this position.

    output : the best token after the last one is computed; otherwise only the cache is filled.
    Raises ConfigError if the hardware cannot have such layers or such a cache.
    """
    few = min(shape.layers, 3)
    counts = []
    for layers in range(max(1, few - 1), few + 1):
        program = _Program(config, replace(shape, layers=layers), tokens, position, output).descriptors()
        counts.append(program_cycles(config, program)[-1])
    return counts[-1] + (shape.layers - few) * (counts[-1] - counts[0])


def token_cycles(config: AcceleratorConfig, shape: DecoderShape, context: int) -> int:
    """Cycles of a token that sees ``context`` positions, itself included; see :func:`call_cycles`."""
    return call_cycles(config, shape, 1, context - 1)


def prompt_cycles(config: AcceleratorConfig, shape: DecoderShape, tokens: int) -> int:
    """Cycles of a prompt, in calls of ``max_tokens`` tokens, the last of which gives the next token."""
    starts = range(0, tokens, config.max_tokens)
    calls = ((start, min(config.max_tokens, tokens - start)) for start in starts)
    return sum(call_cycles(config, shape, count, start, start + count == tokens) for start, count in calls)
