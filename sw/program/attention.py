# SPDX-License-Identifier: Apache-2.0
"""The KV caches of a decoder in a device's memory, and attention as jobs.

A unit is what one job of scores and one of values compute: query heads of one token that share a KV head, or tokens of
one query head. The array computes the scores of a unit while the softmax of the one before is computed, so the jobs'
order is scores 0, scores 1, values 0, scores 2, values 1, ...
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np

from hw.spec.config import AcceleratorConfig, ConfigError
from hw.spec.memory.geometry import ceil_div
from hw.spec.memory.kv_cache import KEY_BITS, KeyCache, ValueCache
from hw.spec.memory.operands import FLOAT_BYTES
from hw.spec.ops import Wait
from hw.spec.ops.scores import BANKS, bank_words
from sw.common.errors import UserError
from sw.devices.base import PAGE, Buffer, Device
from sw.devices.jobs import AppendJob, Job, Keys, Rows, ScoresJob, Values, ValuesJob, View
from sw.devices.pack import plan_layer
from sw.graph.file import OnnxFile
from sw.graph.linears import read_linear
from sw.model.linear import QuantizedLinear
from sw.model.parts import Attention, Decoder, Mismatch
from sw.program.heads import pad_columns, padded_size
from sw.program.keys import AUTO_BITS, KeyForm
from sw.program.load import attention_of
from sw.program.obstacles import Obstacle

KEY_CHOICES = (AUTO_BITS, *map(str, KEY_BITS))
"""Values of --key-bits."""


class _Block(NamedTuple):
    """A block's attention, and of its KV heads the caches, and what is added to the keys."""

    name: str
    attention: Attention
    keys: list[Keys]
    values: list[Values]
    centres: list[Buffer | None]

    @property
    def capacity(self) -> int:
        """Positions of each cache."""
        return self.keys[0].cache.positions

    @property
    def per_kv_head(self) -> int:
        """Query heads that share a KV head."""
        return self.attention.heads // self.attention.kv_heads


class _Caches(NamedTuple):
    """The layouts of a KV head's caches."""

    keys: KeyCache
    values: ValueCache

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Bytes of keys, values, and the values' exponents."""
        return self.keys.bytes, self.values.bytes, self.values.exponent_bytes


class _Unit(NamedTuple):
    """Rows of queries that run at once: heads of token `first`, from `head` on; or, if `causal`, tokens of one head."""

    head: int
    first: int
    rows: int
    causal: bool


def check_attention(config: AcceleratorConfig, attentions: Sequence[Attention], context: int) -> list[Attention]:
    """The attention of each block as the device computes it: heads are padded, see sw.program.heads.

    context: positions. Raises Obstacle if the hardware cannot compute the attention of a block.
    """
    padded = [replace(attention, head_size=padded_size(attention.head_size)) for attention in attentions]
    for index, attention in enumerate(padded):
        if problem := _problem(config, attention, context):
            raise Obstacle(Mismatch(f"layers.{index}.self_attn", problem))
    return padded


def check_padding(config: AcceleratorConfig, file: OnnxFile, decoder: Decoder) -> None:
    """Raises Obstacle if a layer o does not fit the hardware with the padding of its heads."""
    for index, block in enumerate(decoder.blocks):
        size = attention_of(block).head_size
        if padded_size(size) == size:
            continue
        layer = read_linear(file, block.o_proj)
        assert isinstance(layer, QuantizedLinear), "check_decoder refuses other layers"
        try:
            plan_layer(config, pad_columns(layer, size, config.tile))
        except UserError as error:
            problem = f"heads of {size} elements with padding to {padded_size(size)}, {error}"
            raise Obstacle(Mismatch(f"layers.{index}.self_attn", problem)) from None


def capacity_of(attention: Attention, context: int, max_tokens: int) -> int:
    """Positions of a cache. With a window, tokens of one call overwrite only positions that none of them sees."""
    return min(context, attention.window + max_tokens) if attention.window else context


def _problem(config: AcceleratorConfig, attention: Attention, context: int) -> str:
    if not config.has_attention:
        return "the hardware has score_words 0"
    if attention.softcap:
        return "its scores have a softcap"
    if bank_words(1, context) > config.score_words:
        return f"a context of {context:,} positions is longer than score_words ({config.score_words:,})"
    try:
        KeyCache(config, attention.head_size, context, max(KEY_BITS))
        ValueCache(config, attention.head_size, context)
    except ConfigError as error:
        return str(error)
    return ""


class DeviceAttention:
    """The attention of all blocks on the device.

    attentions: of each block, which :func:`check_attention` accepts. keys: the form of each block's keys, by KV head.
    context: positions, which every cache holds; with a window it holds fewer.

    Raises DeviceError if the memory is full.
    """

    def __init__(
        self, device: Device, attentions: Sequence[Attention], keys: Sequence[Sequence[KeyForm]], context: int
    ):
        self._device, self._config, self.keys, self.context = device, device.config, keys, context
        blocks = [self._plan(attention, forms) for attention, forms in zip(attentions, keys, strict=True)]
        # All caches are in one buffer, which is the only place to which the device may append.
        sizes = [size for caches in blocks for cache in caches for size in cache.sizes]
        starts = [0, *accumulate(ceil_div(size, PAGE) * PAGE for size in sizes)]
        self._region = device.alloc(starts[-1])
        places = (Buffer(self._region.address + start, size) for start, size in zip(starts, sizes))
        self._blocks = [
            self._load(f"layers.{index}.self_attn", attention, forms, caches, places)
            for index, (attention, forms, caches) in enumerate(zip(attentions, keys, blocks, strict=True))
        ]
        # One block of each kind: how many rows are in a unit depends on nothing else.
        self._kinds = list({(block.per_kv_head, block.capacity): block for block in self._blocks}.values())

    def use(self) -> None:
        """Lets the device append to these caches. Another decoder may have used it meanwhile."""
        self._device.allow_appends(self._region)

    def limits(self, tokens: int, position: int) -> tuple[int, ...]:
        """Calls of as many tokens with the same limits have the same units, whatever their position is."""
        return tuple(min(self._most(block, position + tokens), max(block.per_kv_head, tokens)) for block in self._kinds)

    @property
    def capacities(self) -> list[int]:
        """Positions of each block's caches."""
        return [block.capacity for block in self._blocks]

    @property
    def form(self) -> str:
        """Everything but the config that the contents of the caches depend on: bits, centres and factors of keys."""
        whole = hashlib.sha256()
        for form in chain.from_iterable(self.keys):
            whole.update(b"" if form.centre is None else form.centre.tobytes())
            whole.update(form.factors.tobytes())
        bits = "".join(str(form.bits // 8) for form in chain.from_iterable(self.keys))
        return f"{bits} {whole.hexdigest()}"

    def arrays(self) -> dict[str, np.ndarray]:
        """The memory of all caches, uint8, by names."""
        return {name: self._device.read(buffer, np.uint8, (buffer.size,)) for name, buffer in self._buffers()}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes `arrays` of attention with the same form. Raises ValueError if a size differs."""
        for name, buffer in self._buffers():
            if arrays[name].shape != (buffer.size,):
                raise ValueError(f"{name} has {arrays[name].size:,} bytes, not {buffer.size:,}")
        for name, buffer in self._buffers():
            self._device.write(buffer, arrays[name])

    def _buffers(self) -> Iterator[tuple[str, Buffer]]:
        for block in self._blocks:
            for head, (keys, values) in enumerate(zip(block.keys, block.values, strict=True)):
                name = f"{block.name}.{head}"
                yield f"{name}.keys", keys.stream
                yield f"{name}.values", values.stream
                yield f"{name}.exponents", values.exponents

    def append_jobs(self, index: int, tokens: int, position: int, qkv: Rows) -> list[Job]:
        """Appends the keys and values of tokens from a position on. qkv: rows of q, k and v of the tokens."""
        block, jobs = self._blocks[index], []
        attention = block.attention
        none = [None] * attention.kv_heads
        for what, places, centres, first in (
            ("keys", block.keys, block.centres, attention.heads),
            ("values", block.values, none, attention.heads + attention.kv_heads),
        ):
            for head, (place, centre) in enumerate(zip(places, centres, strict=True)):
                source = _columns(qkv, (first + head) * attention.head_size)
                wait = Wait.NOTHING if jobs else Wait.ACTIVATIONS
                jobs.append(AppendJob(f"{block.name}.{what}.{head}", tokens, source, place, position, centre, wait))
        return jobs

    def jobs(self, index: int, tokens: int, position: int, qkv: Rows, output: Rows, *, last: bool) -> list[Job]:
        """Attention of tokens from a position on; those of `last` alone if it is set.

        Their keys and values are in the cache. output: rows of the tokens.
        """
        block = self._blocks[index]
        pairs = [
            self._unit_jobs(block, unit, position, number, qkv, output)
            for number, unit in enumerate(self._units(block, tokens, position + tokens, last))
        ]
        jobs: list[Job] = []
        for number, (scores, _) in enumerate(pairs):
            jobs.append(scores)
            if number:
                jobs.append(pairs[number - 1][1])
        return [*jobs, pairs[-1][1]]

    def _plan(self, attention: Attention, forms: Sequence[KeyForm]) -> list[_Caches]:
        """The caches of a block, one for each KV head."""
        config, size = self._config, attention.head_size
        capacity = capacity_of(attention, self.context, config.max_tokens)
        values = ValueCache(config, size, capacity)
        return [_Caches(KeyCache(config, size, capacity, form.bits), values) for form in forms]

    def _load(
        self,
        name: str,
        attention: Attention,
        forms: Sequence[KeyForm],
        caches: Sequence[_Caches],
        places: Iterator[Buffer],
    ) -> _Block:
        """Makes the empty caches of a block. places: of the parts of each, in the order of `_Caches.sizes`."""
        device, block = self._device, _Block(name, attention, [], [], [])
        for form, (key_cache, value_cache) in zip(forms, caches, strict=True):
            keys = Keys(key_cache, next(places))
            device.write(keys.stream, key_cache.image())
            values = Values(value_cache, next(places), next(places))
            device.write(values.stream, value_cache.image())
            centre = None
            if form.centre is not None:
                centre = device.alloc(form.centre.nbytes)
                device.write(centre, -form.centre)
            block.keys.append(keys)
            block.values.append(values)
            block.centres.append(centre)
        return block

    def _most(self, block: _Block, total: int) -> int:
        """Rows of a unit, at most, when the last token sees `total` positions."""
        return min(self._config.max_tokens, self._config.score_words // bank_words(1, min(total, block.capacity)))

    def _units(self, block: _Block, tokens: int, total: int, last: bool) -> Iterator[_Unit]:
        """The fewest units for all heads of the tokens."""
        attention, shared, most = block.attention, block.per_kv_head, self._most(block, total)
        first = tokens - 1 if last else 0
        count = tokens - first
        if count * attention.kv_heads * ceil_div(shared, most) <= attention.heads * ceil_div(count, most):
            for token in range(first, tokens):
                for kv_head in range(attention.kv_heads):
                    for head in range(0, shared, most):
                        yield _Unit(kv_head * shared + head, token, min(most, shared - head), False)
        else:
            for head in range(attention.heads):
                for token in range(first, tokens, most):
                    yield _Unit(head, token, min(most, tokens - token), True)

    def _unit_jobs(
        self, block: _Block, unit: _Unit, position: int, number: int, qkv: Rows, output: Rows
    ) -> tuple[ScoresJob, ValuesJob]:
        attention, bank = block.attention, number % BANKS
        size = attention.head_size
        final = unit.first + unit.rows - 1 if unit.causal else unit.first
        view = View(position + final + 1, attention.window or 0, unit.causal)
        kv_head = unit.head // block.per_kv_head
        name = f"{block.name}.head.{unit.head}"
        places = [_row(_columns(rows, unit.head * size), unit.first) for rows in (qkv, output)]
        if not unit.causal:
            places = [Rows(rows.buffer, FLOAT_BYTES * size) for rows in places]
        # The first job waits for the appended positions; then those of all are in memory.
        wait = Wait.NOTHING if number else Wait.WEIGHTS
        scores = ScoresJob(
            f"{name}, scores", unit.rows, places[0], block.keys[kv_head], view, attention.scale, bank, wait
        )
        values = ValuesJob(f"{name}, values", unit.rows, block.values[kv_head], view.total, places[1], bank)
        return scores, values


def _columns(rows: Rows, first: int) -> Rows:
    """The same rows from a column on."""
    return Rows(rows.buffer.part(FLOAT_BYTES * first), rows.pitch)


def _row(rows: Rows, index: int) -> Rows:
    """The rows from one on."""
    return Rows(rows.buffer.part(index * rows.pitch), rows.pitch)
