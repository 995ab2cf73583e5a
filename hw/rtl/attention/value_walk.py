# SPDX-License-Identifier: Apache-2.0
"""A descriptor of values as the layers and the regions of weights that it consists of."""

from amaranth.hdl import Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, stream
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.walker import command_layout
from hw.rtl.core.activation_unit import unit_command_layout
from hw.rtl.memory.weight_fetch import weights_layout
from hw.spec.config import AcceleratorConfig
from hw.spec.memory.kv_cache import (
    chunk_bits,
    chunk_groups,
    tile_step_bits,
    value_chunk,
    value_planes,
)
from hw.spec.ops.epilogue import MAX_HEAD


def layers_layout(command: data.StructLayout, config: AcceleratorConfig) -> data.StructLayout:
    """A layer, or the values of a descriptor.

    command : the layer; of values its ``tokens``, and ``out_tiles`` as the number of column tiles
    values : the descriptor is one of values
    chunks : its chunks
    last_groups : groups of positions in the last one
    """
    groups = chunk_groups(config).bit_length()
    return data.StructLayout({"command": command, "values": 1, "chunks": chunk_bits(), "last_groups": groups})


def _tiles_of_chunks(
    m: Module, config: AcceleratorConfig, taken: Signal, tiles: Value, chunks: Value
) -> tuple[Value, Signal, Signal]:
    """Counts column tiles, and chunks around them; one more with ``taken``.

    Returns the number of the chunk, from 1, and whether tile and chunk are the last ones.
    """
    tile, chunk = Signal(range(MAX_HEAD // config.tile + 2), init=1), Signal(len(chunks), init=1)
    last_tile, last_chunk = Signal(), Signal()
    # From 1: so that a comparison has no adder before it.
    m.d.comb += [last_tile.eq(tile == tiles), last_chunk.eq(chunk == chunks)]
    with m.If(taken):
        m.d.sync += tile.eq(Mux(last_tile, 1, tile + 1))
        with m.If(last_tile):
            m.d.sync += chunk.eq(Mux(last_chunk, 1, chunk + 1))
    return chunk, last_tile, last_chunk


class ValueLayers(Block):
    """Sends layers as they are, and values as one layer for each column tile of each chunk.

    Parameters
    ----------
    unit : whether the layers are those of the activation unit, which counts a group once for all of its planes

    Members
    -------
    layers : layers and values
    commands : the layers

    Latency 0 cycles, throughput 1 layer per cycle.
    """

    def __init__(self, config: AcceleratorConfig, unit: bool = False):
        self.config, self.unit = config, unit
        command = unit_command_layout(config) if unit else command_layout(config)
        super().__init__(
            {
                "layers": In(stream.Signature(layers_layout(command, config))),
                "commands": Out(stream.Signature(command)),
            }
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        layers, commands = self.layers, self.commands
        asked, chosen = layers.payload, commands.payload
        taken = Signal()
        _, last_tile, last_chunk = _tiles_of_chunks(m, self.config, taken, asked.command.out_tiles, asked.chunks)
        m.d.comb += [
            commands.valid.eq(layers.valid),
            layers.ready.eq(commands.ready & (~asked.values | (last_chunk & last_tile))),
            taken.eq(commands.valid & commands.ready & asked.values),
        ]
        m.d.comb += chosen.eq(asked.command)
        with m.If(asked.values):
            m.d.comb += [chosen[name].eq(value) for name, value in self._chunk(asked, last_chunk).items()]
        return m

    def _chunk(self, asked: data.View, last: Value) -> dict[str, Value | int]:
        """The fields of a chunk's layer, besides the number of tokens."""
        layer, planes = value_chunk(self.config), value_planes(self.config)
        most, per_group = chunk_groups(self.config), layer.body_words // chunk_groups(self.config)
        groups = Mux(last, asked.last_groups, most)
        fields: dict[str, Value | int] = {
            "groups": groups if self.unit else groups * planes,
            "group_slices": layer.group_slices,
            "out_tiles": 1,
            "last_columns": self.config.tile,
            "header_beats": layer.header_beats,
            "body_words": groups * per_group,
            "reuse": 0,
            "paired": 0,
            "spare_records": (most - groups)[: most.bit_length()] * planes,
        }
        return fields | ({"planes": planes, "values": 1, "short": 1} if self.unit else {})


def tiles_layout(config: AcceleratorConfig) -> data.StructLayout:
    """The weights of a layer, or of values.

    chunks : of values; a layer has 1
    tiles : column tiles; on every port the weights of a column tile are ``step`` bytes after those of the one before,
        and those of a chunk follow those of the chunk before. A layer has 1
    beats : of the layer, or of a column tile of the first chunk
    last_beats : of a column tile of the last chunk; those between the first and the last one are full
    """
    counts = {"tiles": range(MAX_HEAD // config.tile + 1), "chunks": unsigned(chunk_bits())}
    sizes = {"last_beats": range(value_chunk(config).tile_beats + 1), "step": unsigned(tile_step_bits(config))}
    return data.StructLayout({**weights_layout().members, **counts, **sizes})


class ValueRegions(Block):
    """Sends the weights of each column tile of each chunk as a region of its own, in the order of the layers.

    Members
    -------
    tiles : the weights of a descriptor
    regions : for :class:`hw.rtl.memory.weight_fetch.WeightFetch`

    Latency 0 cycles, throughput 1 region per cycle, but the weights of a descriptor are taken 1 cycle after their last
    region.
    """

    def __init__(self, config: AcceleratorConfig):
        self.config = config
        super().__init__(
            {
                "tiles": In(stream.Signature(tiles_layout(config))),
                "regions": Out(stream.Signature(weights_layout())),
            }
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        tiles, regions = self.tiles, self.regions
        asked, taken = tiles.payload, Signal()
        chunk, last_tile, last_chunk = _tiles_of_chunks(m, self.config, taken, asked.tiles, asked.chunks)
        # Registers: this is not the descriptor's first region; it is in the last chunk; it is the first one of a chunk.
        later, ends, begins = Signal(), Signal(), Signal()
        # All regions are taken: a register, because the way from the ports through the weight fetch is long.
        done = Signal()
        # The next region's address as a sum, so that no choice comes before the adder. The chunk's first region.
        address, origin, first = (Signal.like(asked.address, name=name) for name in ("address", "origin", "first"))
        start, step = Signal.like(asked.address), Signal.like(asked.step)
        whole, bytes_per_beat = value_chunk(self.config).tile_beats, self.config.port_width // 8
        m.d.comb += [
            regions.valid.eq(tiles.valid & ~done),
            tiles.ready.eq(done),
            # This cannot wrap: a descriptor's addresses are below 2^40 - 2^34.
            address.eq(origin + step),
            regions.payload.stride.eq(asked.stride),
            regions.payload.address.eq(Mux(later, address, asked.address)),
            regions.payload.beats.eq(Mux(later, Mux(ends, asked.last_beats, whole), asked.beats)),
            start.eq(Mux(later & ~begins, first, regions.payload.address)),
        ]
        m.d.comb += taken.eq(regions.valid & regions.ready)
        m.d.sync += done.eq(taken & last_tile & last_chunk)
        with m.If(taken):
            m.d.sync += [
                later.eq(~(last_tile & last_chunk)),
                ends.eq(Mux(last_tile, chunk + 1 == asked.chunks, last_chunk)),
                begins.eq(last_tile),
                origin.eq(Mux(last_tile, start, regions.payload.address)),
                step.eq(Mux(last_tile, whole * bytes_per_beat, asked.step)),
                first.eq(start),
            ]
        return m
