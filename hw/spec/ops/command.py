# SPDX-License-Identifier: Apache-2.0
"""The core's command: one layer, as the bounds of its walkers' loops."""

from dataclasses import asdict, dataclass

from hw.spec.config import MAX_N, AcceleratorConfig, ConfigError
from hw.spec.memory.geometry import LayerLayout, StreamLayout, ceil_div
from hw.spec.memory.kv_cache import value_chunk


def command_fields(config: AcceleratorConfig) -> dict[str, int]:
    """Name and width in bits of every field, from the lowest bit up."""
    stream = StreamLayout(config)
    slices = config.max_k // config.tile
    attention = {"paired": 1, "spare_records": value_chunk(config).groups.bit_length()} if config.has_attention else {}
    return {
        "tokens": config.max_tokens.bit_length(),
        "groups": slices.bit_length(),
        "group_slices": (config.max_group_size // config.tile).bit_length(),
        "out_tiles": ceil_div(MAX_N, config.tile).bit_length(),
        "last_columns": config.tile.bit_length(),
        "header_beats": max_header_beats(config).bit_length(),
        "body_words": (slices * stream.words_per_slice).bit_length(),
        "reuse": 1,
        **attention,
    }


def stored_slices(config: AcceleratorConfig) -> int:
    """Token slices of the largest layer: the activation unit holds this number, and each bank of the core."""
    return config.max_tokens * (config.max_k // config.tile)


def is_short(config: AcceleratorConfig, tokens: int, slices: int) -> bool:
    """Whether a layer is short: its activations take at most half of the activation unit.

    ``slices`` : K-slices, without the copies for planes. With attention, the unit takes in one short layer while it
    sends another one. Layers of attention are short in every config that has attention
    (:data:`hw.spec.config.ATTENTION_K`).
    """
    return tokens * slices <= stored_slices(config) // 2


def max_header_beats(config: AcceleratorConfig) -> int:
    """Beats of the longest possible header: ``max_k`` in the shortest legal groups."""
    for size in range(config.tile, config.max_group_size + 1, config.tile):
        try:
            return LayerLayout(config, config.max_k // size * size, config.tile, size).header_beats
        except ConfigError:
            continue
    raise ConfigError(f"no group_size up to {config.max_group_size} fits tile {config.tile}")


def stream_bounds(config: AcceleratorConfig) -> dict[str, tuple[int, int]]:
    """Least and greatest value of each field of :data:`hw.spec.ops.base.STREAM_FIELDS`."""
    stream, max_slices = StreamLayout(config), config.max_k // config.tile
    return {
        "groups": (1, max_slices),
        "group_slices": (stream.min_group_slices, config.max_group_size // config.tile),
        "header_beats": (1, max_header_beats(config)),
        "body_words": (1, max_slices * stream.words_per_slice),
    }


@dataclass(frozen=True)
class LayerCommand:
    """One layer for the core. Every count is 1 or more.

    Attributes
    ----------
    tokens : M
    groups : groups along K
    group_slices : K-slices of a group
    out_tiles : output tiles
    last_columns : columns in use in the last output tile
    header_beats, body_words : the weight stream of one output tile (:class:`hw.spec.memory.geometry.LayerLayout`)
    reuse : 1 to use the activations of the previous command instead of new ones
    paired : with attention: 1 if a byte of the body holds one column of two successive rows (the keys of a KV cache)
    spare_records : with attention: records at the end of the header that the layer does not have (a chunk of values
        that is not full)
    """

    tokens: int
    groups: int
    group_slices: int
    out_tiles: int
    last_columns: int
    header_beats: int
    body_words: int
    reuse: int = 0
    paired: int = 0
    spare_records: int = 0

    @classmethod
    def from_layer(cls, layer: LayerLayout, tokens: int, reuse: bool = False) -> "LayerCommand":
        """The command that computes ``layer`` for ``tokens`` tokens.

        Raises
        ------
        ConfigError : more tokens than the config holds, or fewer than 1
        """
        if not 1 <= tokens <= layer.config.max_tokens:
            raise ConfigError(f"M is 1 to max_tokens ({layer.config.max_tokens}), not {tokens}")
        return cls(
            tokens=tokens,
            groups=layer.groups,
            group_slices=layer.group_slices,
            out_tiles=layer.out_tiles,
            last_columns=layer.last_columns,
            header_beats=layer.header_beats,
            body_words=layer.body_words,
            reuse=int(reuse),
        )

    def fields(self, config: AcceleratorConfig) -> dict[str, int]:
        """The fields that hardware of this config has."""
        values = asdict(self)
        return {name: values[name] for name in command_fields(config)}

    def to_int(self, config: AcceleratorConfig) -> int:
        """The command as a number, for the core's command port."""
        values, position, word = asdict(self), 0, 0
        for name, width in command_fields(config).items():
            if values[name] >> width:
                raise ConfigError(f"command field {name} holds {width} bits, not {values[name]}")
            word |= values[name] << position
            position += width
        return word
