# SPDX-License-Identifier: Apache-2.0
"""The weight stream: the place of every bit of a layer's weights, scales and zero points. Only this file defines it.

A layer is one sequential stream of beats. For each output tile (``tile`` consecutive output rows):

- header: ``tile`` row exponents; then per group one *record*: ``tile`` scale mantissas, ``tile`` zero points.
  Packed without gaps, padded once to a beat.
- body: for each group, for each K-slice, ``tile x tile`` weights, row (along K) major, column n in ascending bits.

Everything is little-endian: the first element is in the lowest bits of the first byte. The RTL handles the body in
*words*: as many whole K rows as a beat holds, and at least one; with narrow ports a word takes several beats.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd

from hw.spec.config import EXPONENT_BITS, MAX_K, MAX_N, SCALE_BITS, AcceleratorConfig, ConfigError


def ceil_div(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


@dataclass(frozen=True)
class StreamLayout:
    """The properties of the stream that depend only on the config, not on the layer."""

    config: AcceleratorConfig

    # Body

    @property
    def row_bits(self) -> int:
        """Bits of one K row of a slice: ``tile`` weights."""
        return self.config.tile * self.config.weight_bits

    @property
    def beats_per_word(self) -> int:
        """Beats of one word; more than 1 only if a beat is shorter than a row."""
        return ceil_div(self.row_bits, self.config.beat_bits)

    @property
    def word_bits(self) -> int:
        """Bits of a word, including unused ones."""
        return self.beats_per_word * self.config.beat_bits

    @property
    def slices_per_word(self) -> int:
        """Slices in one word; more than 1 only if a slice is at most half a beat."""
        return max(1, self.word_bits // self.row_bits // self.config.tile)

    @property
    def rows_per_word(self) -> int:
        """Rows in one word: a part of one slice, or all of ``slices_per_word`` slices."""
        rows = self.word_bits // self.row_bits
        return min(rows, self.slices_per_word * self.config.tile)

    @property
    def words_per_slice(self) -> int:
        """Words of one slice (1 if a word holds several slices): the cycles of a slice at M = 1."""
        return ceil_div(self.config.tile, self.rows_per_word)

    def row_delay(self, row: int) -> int:
        """Cycles between the pop of the word that holds ``row`` and the arrival of the first token at that row."""
        return row - row // self.rows_per_word

    @property
    def word_fifo_depth(self) -> int:
        """Depth of the FIFO before the array: two slices, and the words that arrive while a header is read."""
        return 1 << (2 * self.words_per_slice + 15).bit_length()

    # Header

    @property
    def exponents_bits(self) -> int:
        """Bits of the row exponents at the start of a header."""
        return self.config.tile * EXPONENT_BITS

    @property
    def record_bits(self) -> int:
        """Bits of one group's scale mantissas and zero points."""
        return self.config.tile * (SCALE_BITS + self.config.zero_point_bits)

    @property
    def unit_bits(self) -> int:
        """Unit of the header: exponents, records and beats are whole multiples of it."""
        return gcd(self.exponents_bits, self.record_bits, self.config.beat_bits)

    @property
    def beat_units(self) -> int:
        """Units of one beat."""
        return self.config.beat_bits // self.unit_bits

    @property
    def exponents_units(self) -> int:
        """Units of the row exponents."""
        return self.exponents_bits // self.unit_bits

    @property
    def record_units(self) -> int:
        """Units of one record."""
        return self.record_bits // self.unit_bits

    @property
    def exponents_cycles(self) -> int:
        """Cycles to read the row exponents: one to check that they are available, and one for each beat's worth."""
        return 1 + ceil_div(self.exponents_units, self.beat_units)

    @property
    def record_cycles(self) -> int:
        """Cycles to read one record, like the exponents."""
        return 1 + ceil_div(self.record_units, self.beat_units)

    @property
    def min_group_slices(self) -> int:
        """Slices of the shortest group whose body takes long enough to read the next group's record."""
        return ceil_div(self.record_cycles, self.words_per_slice)

    @property
    def overhead(self) -> float:
        """Bits of the typical layer's stream over its ideal bits (weights, scales and zero points only), minus 1."""
        layer = self.typical_layer
        ideal = self.config.tile * layer.k * self.config.weight_bits + layer.groups * self.record_bits
        return layer.beats * self.config.beat_bits / ideal - 1

    @property
    def typical_layer(self) -> "LayerLayout":
        """One output tile with K = 896 in groups of 128, or with the largest values that the config allows."""
        config = self.config
        size = min(128, config.max_group_size, config.max_k)
        return LayerLayout(config, k=min(896, config.max_k) // size * size, n=config.tile, group_size=size)

    @property
    def array_factor(self) -> float:
        """Slices in a beat, divided by the one slice that the array takes per cycle; above 1 the array is the limit."""
        return self.slices_per_word / self.beats_per_word


@dataclass(frozen=True)
class LayerLayout:
    """One layer's part of the stream. ``k`` is already padded to whole groups; ``n`` is the true N.

    Raises
    ------
    ConfigError : the layer does not fit the config; the message names rule and value
    """

    config: AcceleratorConfig
    k: int
    n: int
    group_size: int

    def __post_init__(self) -> None:
        config, size = self.config, self.group_size
        if not 1 <= self.n <= MAX_N:
            raise ConfigError(f"N is 1 to {MAX_N:,}, not {self.n:,}")
        if size < 1 or size % config.tile:
            raise ConfigError(f"group_size is a multiple of the tile ({config.tile}), not {size}")
        if size > config.max_group_size:
            raise ConfigError(f"group_size is at most max_group_size ({config.max_group_size}), not {size}")
        if self.k < 1 or self.k % size:
            raise ConfigError(f"K is a whole number of groups of {size}, not {self.k:,}")
        if self.k > config.max_k:
            larger = f"; hardware built with --max-k {self.k} takes it" if self.k <= MAX_K else ""
            raise ConfigError(f"K is at most max_k ({config.max_k:,}), not {self.k:,}{larger}")
        # A group's record is read from the header while the body of the previous group is streamed.
        least = self.stream.min_group_slices
        if self.group_slices < least:
            raise ConfigError(
                f"group_size is at least {least * config.tile} at tile {config.tile}, so that a group's scales are read"
                f" in the time that its weights take, not {size}"
            )

    @cached_property
    def stream(self) -> StreamLayout:
        """The config's part of the layout."""
        return StreamLayout(self.config)

    @cached_property
    def groups(self) -> int:
        """Groups along K."""
        return self.k // self.group_size

    @cached_property
    def group_slices(self) -> int:
        """Slices of one group."""
        return self.group_size // self.config.tile

    @cached_property
    def out_tiles(self) -> int:
        """Output tiles; the last one may be partly filled."""
        return ceil_div(self.n, self.config.tile)

    @cached_property
    def last_columns(self) -> int:
        """Columns in use in the last output tile."""
        return self.n - (self.out_tiles - 1) * self.config.tile

    @cached_property
    def slices(self) -> int:
        """K-slices of one output tile."""
        return self.groups * self.group_slices

    @cached_property
    def header_cycles(self) -> int:
        """Cycles to read one output tile's header."""
        return self.stream.exponents_cycles + self.groups * self.stream.record_cycles

    @cached_property
    def header_beats(self) -> int:
        """Beats of one output tile's header."""
        units = self.stream.exponents_units + self.groups * self.stream.record_units
        return ceil_div(units, self.stream.beat_units)

    @cached_property
    def body_words(self) -> int:
        """Words of one output tile's body."""
        return ceil_div(self.slices, self.stream.slices_per_word) * self.stream.words_per_slice

    @cached_property
    def tile_beats(self) -> int:
        """Beats of one output tile."""
        return self.header_beats + self.body_words * self.stream.beats_per_word

    @cached_property
    def beats(self) -> int:
        """Beats of the whole layer."""
        return self.out_tiles * self.tile_beats


def fit_layer(config: AcceleratorConfig, k: int, n: int, group_size: int) -> LayerLayout:
    """The cheapest layout, in beats, of a layer with in_features ``k`` and groups of ``group_size``.

    A group may be split into equal parts that share scale and zero point: all sums are exact, so no result changes.
    In this way groups longer than ``max_group_size`` fit, also a single group over all of K, and a K that is not a
    whole number of groups needs less padding.

    Raises
    ------
    ConfigError : no layout fits; the message names rule and value
    """
    try:
        return _cheapest(config, k, n, group_size)
    except ConfigError as error:
        if (tile := _smaller_tile(config, k, n, group_size)) is None:
            raise
        raise ConfigError(f"{error}; hardware built with --tile {tile} takes it") from None


def _smaller_tile(config: AcceleratorConfig, k: int, n: int, group_size: int) -> int | None:
    """The largest smaller tile on which a layer fits, for example one with short groups."""
    tile = config.tile // 2
    while tile:
        try:
            _cheapest(replace(config, tile=tile, lanes=min(tile, config.lanes)), k, n, group_size)
        except ConfigError:
            tile //= 2
        else:
            return tile
    return None


def _cheapest(config: AcceleratorConfig, k: int, n: int, group_size: int) -> LayerLayout:
    if k < 1 or group_size < 1:
        raise ConfigError(f"K and group_size are at least 1, not {k} and {group_size}")
    if group_size >= k:
        sizes = range(config.tile, config.max_group_size + 1, config.tile)
    elif group_size % config.tile:
        raise ConfigError(f"group_size is a multiple of the tile ({config.tile}), not {group_size}")
    else:
        sizes = [
            size
            for size in range(config.tile, min(group_size, config.max_group_size) + 1, config.tile)
            if group_size % size == 0
        ]
    layouts, reason = [], None
    for size in sizes:
        try:
            layouts.append(LayerLayout(config, ceil_div(k, size) * size, n, size))
        except ConfigError as error:
            reason = error
    if not layouts:
        assert reason is not None
        raise reason
    return min(layouts, key=lambda layout: (layout.beats, -layout.group_size))


# Packing
