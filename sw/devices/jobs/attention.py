# SPDX-License-Identifier: Apache-2.0
"""Attention as jobs: keys and values are appended to a cache, and read from it. hw.spec.ops has the definitions."""

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

from hw.spec.config import SCORE_UNIT
from hw.spec.memory.geometry import ceil_div
from hw.spec.memory.kv_cache import KeyCache, ValueCache
from hw.spec.memory.operands import FLOAT_BYTES, result_pitch
from hw.spec.ops import APPEND, SCORES, VALUES, Op, Wait
from hw.spec.ops.append import AppendDescriptor
from hw.spec.ops.epilogue import float_bits
from hw.spec.ops.scores import ScoresDescriptor, bank_words
from hw.spec.ops.values import ValuesDescriptor
from sw.devices.jobs.layers import Job
from sw.devices.jobs.moves import Move, Reach, seen_of, slot_of, turn_of
from sw.devices.jobs.operands import EXPONENTS, NO_EPILOGUE, NOWHERE, WEIGHTS, Access, Buffer, Rows


class Keys(NamedTuple):
    """The keys of one KV head. cache: their layout. stream: uint8 [cache.bytes], begun as `cache.image()`."""

    cache: KeyCache
    stream: Buffer


class Values(NamedTuple):
    """The values of one KV head. exponents: uint8 [cache.exponent_bytes]; the rest as for Keys."""

    cache: ValueCache
    stream: Buffer
    exponents: Buffer


class View(NamedTuple):
    """The positions that each row sees.

    Members
    -------
    total: the last row sees position `total - 1`, and no later one.
    window: positions that a row sees; 0: all.
    causal: each row sees one position more than the row before.
    """

    total: int
    window: int = 0
    causal: bool = False

    def moved(self, by: int) -> "View":
        """The view `by` positions later."""
        return self._replace(total=self.total + by)


class AttentionJob(Job):
    """What these jobs have in common. op: the operation."""

    op: ClassVar[Op]
    epilogue = NO_EPILOGUE
    results = NOWHERE
    result_pitch = 0


@dataclass(frozen=True)
class AppendJob(AttentionJob):
    """Appends keys or values of one KV head.

    Members, besides those of Job
    -------
    source: float32 [tokens, head_size].
    place: the cache.
    position: position of the first token; its slot is this modulo the positions of the cache.
    centre: keys: float32 [head_size], which is added to each of them.
    """

    op = APPEND
    name: str
    tokens: int
    source: Rows
    place: Keys | Values
    position: int
    centre: Buffer | None = None
    wait: Wait = Wait.NOTHING

    @property
    def values(self) -> int:
        """See Job."""
        return self.place.cache.head_size

    @property
    def beats(self) -> int:
        """See Job."""
        return 0

    def descriptor(self, interrupt: bool = False) -> AppendDescriptor:
        """See Job."""
        cache, place = self.place.cache, self.place
        return AppendDescriptor(
            keys=int(isinstance(place, Keys)),
            planes=cache.planes,
            tokens=self.tokens,
            out_features=cache.head_size,
            activations=self.source.buffer.address,
            activation_pitch=self.source.pitch,
            weights=place.stream.address,
            weights_stride=cache.stride,
            slot=slot_of(self.position, cache.positions),
            slots=cache.positions,
            add=int(self.centre is not None),
            addend=self.centre.address if self.centre else 0,
            exponents=place.exponents.address if isinstance(place, Values) else 0,
            interrupt=int(interrupt),
            wait=self.wait,
        )

    def moved(self, by: int) -> "AppendJob":
        """See Job."""
        return replace(self, position=self.position + by)

    def moves(self) -> list[Move]:
        """See Job."""
        return [Move("slot", slot_of, self.position, self.place.cache.positions)]

    def reach(self) -> Reach:
        """See Job."""
        return Reach(-self.position)

    def sources(self) -> list[Access]:
        """See Job."""
        found = [self._rows("rows", self.source, self.values)]
        if self.centre:
            found.append(Access("centre", self.centre, FLOAT_BYTES * self.values))
        return found

    def writes(self) -> list[Access]:
        """See Job."""
        return _cache_accesses(self.place)


@dataclass(frozen=True)
class ScoresJob(AttentionJob):
    """Scores of one KV head, which stay on chip.

    Members, besides those of Job
    -------
    tokens: rows: query heads of a token, or tokens of a query head.
    source: float32 [rows, head_size].
    place: the keys.
    view: the positions that each row sees.
    factor: the float32 by which the products are multiplied.
    bank: the place of the scores.
    """

    op = SCORES
    name: str
    tokens: int
    source: Rows
    place: Keys
    view: View
    factor: float
    bank: int = 0
    wait: Wait = Wait.NOTHING

    @property
    def slots(self) -> int:
        """Slots that are read, from the first one on."""
        return seen_of(self.view.total, self.place.cache.positions)

    @property
    def values(self) -> int:
        """See Job."""
        return self.slots

    @property
    def beats(self) -> int:
        """See Job."""
        cache = self.place.cache
        return ceil_div(self.slots, cache.config.tile) * cache.layer.tile_beats

    def descriptor(self, interrupt: bool = False) -> ScoresDescriptor:
        """See Job."""
        view, cache = self.view, self.place.cache
        return ScoresDescriptor.from_cache(
            cache,
            self.slots,
            tokens=self.tokens,
            activations=self.source.buffer.address,
            activation_pitch=self.source.pitch,
            weights=self.place.stream.address,
            turn=turn_of(view.total, cache.positions),
            window=view.window,
            causal=int(view.causal),
            score_factor=float_bits(self.factor),
            bank=self.bank,
            interrupt=int(interrupt),
            wait=self.wait,
        )

    def moved(self, by: int) -> "ScoresJob":
        """See Job."""
        return replace(self, view=self.view.moved(by))

    def moves(self) -> list[Move]:
        """See Job."""
        total, capacity = self.view.total, self.place.cache.positions
        return [Move("out_features", seen_of, total, capacity), Move("turn", turn_of, total, capacity)]

    @property
    def moving_stream(self) -> Hashable:
        """See Job."""
        return self.place.cache, self.view.total

    def reach(self) -> Reach:
        """See Job. Without a window the cache does not begin again; and the scores fit their bank."""
        (total, window, causal), cache = self.view, self.place.cache
        room = cache.config.score_words // bank_words(self.tokens, 1) * SCORE_UNIT
        ends = [Reach().most]
        if not window:
            ends.append(cache.positions - total)
        if room < cache.positions:
            ends.append(room - total)
        return Reach((self.tokens if causal else 1) - total, min(ends))

    def sources(self) -> list[Access]:
        """See Job."""
        return [*_cache_accesses(self.place), self._rows("rows", self.source, self.place.cache.head_size)]

    def writes(self) -> list[Access]:
        """See Job."""
        return []


@dataclass(frozen=True)
class ValuesJob(AttentionJob):
    """The softmax of scores on chip, times the values of one KV head.

    Members, besides those of Job
    -------
    tokens: rows, as many as the scores have.
    place: the values.
    total: positions so far, as in the view of the scores.
    output: float32 [rows, head_size].
    bank: the place of the scores.
    """

    op = VALUES
    name: str
    tokens: int
    place: Values
    total: int
    output: Rows
    bank: int = 0
    wait: Wait = Wait.NOTHING

    @property
    def slots(self) -> int:
        """Slots that are read, as many as the scores have."""
        return seen_of(self.total, self.place.cache.positions)

    @property
    def values(self) -> int:
        """See Job."""
        return self.place.cache.head_size

    @property
    def beats(self) -> int:
        """See Job."""
        return self.place.cache.beats_of(self.slots)

    def descriptor(self, interrupt: bool = False) -> ValuesDescriptor:
        """See Job."""
        cache = self.place.cache
        return ValuesDescriptor(
            tokens=self.tokens,
            out_features=cache.head_size,
            positions=self.slots,
            slots=cache.positions,
            weights=self.place.stream.address,
            weights_stride=cache.stride,
            exponents=self.place.exponents.address,
            results=self.output.buffer.address,
            result_pitch=self.output.pitch,
            bank=self.bank,
            interrupt=int(interrupt),
            wait=self.wait,
        )

    def moved(self, by: int) -> "ValuesJob":
        """See Job."""
        return replace(self, total=self.total + by)

    def moves(self) -> list[Move]:
        """See Job."""
        return [Move("positions", seen_of, self.total, self.place.cache.positions)]

    @property
    def moving_stream(self) -> Hashable:
        """See Job."""
        return self.place.cache, self.total

    def reach(self) -> Reach:
        """See Job. Its scores have the same bounds."""
        return Reach(1 - self.total)

    def sources(self) -> list[Access]:
        """See Job."""
        return _cache_accesses(self.place)

    def writes(self) -> list[Access]:
        """See Job."""
        size = (self.tokens - 1) * self.output.pitch + result_pitch(self.values)
        return [Access("results", self.output.buffer, size, self.output.pitch, FLOAT_BYTES * self.values)]


def _cache_accesses(place: Keys | Values) -> list[Access]:
    """The bytes of a cache. Its exponents are activations for the hardware, and the stream is weights."""
    found = [Access(WEIGHTS, place.stream, place.cache.bytes)]
    if isinstance(place, Values):
        found.append(Access(EXPONENTS, place.exponents, place.cache.exponent_bytes))
    return found
