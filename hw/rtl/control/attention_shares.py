# SPDX-License-Identifier: Apache-2.0
"""The shares of a descriptor in hardware with attention: changes of the others, and those of attention's own units."""

from collections.abc import Callable
from dataclasses import replace

from amaranth.hdl import Cat, Const, Mux, Value
from amaranth.lib import data

from hw.rtl.attention.cache.layouts import append_layout, job_layout
from hw.rtl.attention.chunk_sums import sums_layout
from hw.rtl.attention.layouts import scores_layout
from hw.rtl.attention.value_rows import values_layout
from hw.rtl.attention.value_walk import layers_layout, tiles_layout
from hw.rtl.common.walker import command_layout
from hw.rtl.control.descriptor_check import ATTENTION_FIELDS
from hw.rtl.control.share import JOBS_AHEAD, Share, Side
from hw.rtl.core.activation_unit import unit_command_layout
from hw.rtl.memory.axi import ADDRESS_BITS
from hw.rtl.memory.row_pieces import pieces_layout
from hw.rtl.vector.layouts import Target
from hw.spec.config import AcceleratorConfig
from hw.spec.control.program import LENGTH_BITS
from hw.spec.ops.command import command_fields

_VALUE_FIELDS = ("values", "chunks", "last_groups")
WEIGHTS_OF_ATTENTION = (*_VALUE_FIELDS, "weight_tiles", "last_beats", "tile_step")
"""The fields of attention that the weights side needs."""
ACTIVATIONS_OF_ATTENTION = (
    *("append", "scores", *_VALUE_FIELDS, "weights", "weights_stride"),
    *(*ATTENTION_FIELDS, "fetch_rows", "fetch_pitch", "unit_groups"),
)
"""The fields of attention that the activations side needs."""
BY_PIECES = ("by_pieces", "last_slice", "row_end", "results_end")
"""The same in hardware that reads activations by pieces."""


def uses_array(work: data.View) -> Value:
    """Whether a descriptor uses the array."""
    return ~work.vector & ~work.append


def writes_results(work: data.View) -> Value:
    """Whether the gatherer writes results."""
    return ~work.quiet & ~work.append & ~work.scores


def unit_layers_layout(config: AcceleratorConfig) -> data.StructLayout:
    """The layers for the activation unit, with the address of their activations and the descriptor's index."""
    layers = layers_layout(unit_command_layout(config), config)
    return data.StructLayout({**layers.members, "address": ADDRESS_BITS, "index": LENGTH_BITS})


def with_attention(config: AcceleratorConfig, share: Share) -> Share:
    """A share that has more fields with attention."""
    change: Callable[[AcceleratorConfig, Share], Share] | None = _CHANGES.get(share.name)
    return change(config, share) if change else share


def _core(config: AcceleratorConfig, share: Share) -> Share:
    def fields(work: data.View) -> dict[str, Value]:
        command = Cat(work.command[name] for name in command_fields(config))
        return {"command": command, **{name: work[name] for name in _VALUE_FIELDS}}

    # With the FIFO, the layers of values have no path to the table.
    return replace(share, layout=layers_layout(command_layout(config), config), fields=fields, ahead=2)


def _regions(config: AcceleratorConfig, share: Share) -> Share:
    def fields(work: data.View) -> dict[str, Value]:
        values = {"chunks": work.chunks, "last_beats": work.last_beats, "step": work.tile_step}
        return {**share.fields(work), "tiles": work.weight_tiles, **values}

    # The exponents of values are read while the array works, so not all of them are requested before.
    return replace(share, layout=tiles_layout(config), fields=fields, apart=lambda work: work.values)


def _unit(config: AcceleratorConfig, share: Share) -> Share:
    def fields(work: data.View) -> dict[str, Value]:
        command = {
            **{name: work.command[name] for name in command_fields(config)},
            "groups": work.unit_groups,
            "planes": work.planes,
            "values": work.values,
            "short": work.scores | work.values,
            **({name: work[name] for name in ("by_pieces", "last_slice")} if config.reads_by_pieces else {}),
        }
        return {
            "command": Cat(command[name] for name, _ in unit_command_layout(config)),
            **{name: work[name] for name in _VALUE_FIELDS},
            "address": work.activations,
            "index": work.index,
        }

    return replace(share, layout=unit_layers_layout(config), fields=fields)


def _blocks(config: AcceleratorConfig, share: Share) -> Share:
    def fields(work: data.View) -> dict[str, Value]:
        return {
            **share.fields(work),
            "pitch": work.fetch_pitch,
            "rows": work.fetch_rows,
            "exponents": work.values,
            "chunks": work.chunks,
            **({"by_pieces": work.by_pieces} if config.reads_by_pieces else {}),
        }

    return replace(share, layout=pieces_layout(config), fields=fields)


def _epilogue(config: AcceleratorConfig, share: Share) -> Share:
    def fields(work: data.View) -> dict[str, Value]:
        return {
            **share.fields(work),
            "vector": work.vector | work.append,
            "target": Mux(work.scores, Target.SCORES, Mux(work.append, Target.CACHE, Target.MEMORY)),
            # A float32 in the same place of a descriptor.
            "factor": work.eps,
            "inverse": work.values,
            "bank": work.bank,
        }

    return replace(share, fields=fields)


def _expected(config: AcceleratorConfig, share: Share) -> Share:
    def fields(work: data.View) -> dict[str, Value]:
        outputs = Cat(writes_results(work), work.second | work.pieces, work.append, work.scores)
        return {"outputs": outputs, "interrupt": work.interrupt}

    return replace(share, fields=fields)


def _source(config: AcceleratorConfig, share: Share) -> Share:
    def fields(work: data.View) -> dict[str, Value]:
        return {**share.fields(work), "pitch": Mux(work.append, work.fetch_pitch, work.source_pitch)}

    return replace(share, fields=fields, wanted=lambda work: work.vector | work.append)


_CHANGES = {
    "core": _core,
    "regions": _regions,
    "unit": _unit,
    "blocks": _blocks,
    "epilogue": _epilogue,
    "expected": _expected,
    "source": _source,
}


def _job(config: AcceleratorConfig, work: data.View) -> Value:
    """An append, for the cache writer."""
    fields = {
        **{name: work[name] for name in ("keys", "planes", "slot", "slots", "exponents")},
        "tokens": work.command.tokens,
        "columns": work.out_features,
        "address": work.weights,
        "stride": work.weights_stride,
    }
    return Cat(_sized(fields[name], field.width) for name, field in job_layout(config))


def _sized(value: Value, width: int) -> Value:
    """A number that fits so many bits, in exactly so many."""
    return value[:width] if len(value) >= width else Cat(value, Const(0, width - len(value)))


def attention_shares(config: AcceleratorConfig) -> tuple[Share, ...]:
    """The shares of the units that only attention has."""

    def rows(work: data.View, positions: Value) -> dict[str, Value]:
        return {"bank": work.bank, "tokens": work.command.tokens, "positions": positions}

    def share(name: str, layout: data.StructLayout, wanted: Callable, fields: Callable, ahead: int = 2) -> Share:
        return Share(name, Side.ACTIVATIONS, layout, fields, ahead=ahead, wanted=wanted)

    return (
        share(
            "sums",
            sums_layout(config),
            uses_array,
            lambda work: {
                "values": work.values,
                "chunks": work.chunks,
                "tiles": work.command.out_tiles,
                "tokens": work.command.tokens,
            },
            JOBS_AHEAD,
        ),
        share(
            "scores_job",
            scores_layout(config),
            lambda work: work.scores,
            lambda work: {
                **rows(work, work.out_features),
                **{name: work[name] for name in ("turn", "slots", "window", "causal")},
            },
        ),
        share(
            "values_job",
            values_layout(config),
            lambda work: work.values,
            lambda work: {**rows(work, work.positions), "tiles": work.command.out_tiles},
        ),
        share(
            "append_job",
            append_layout(config),
            lambda work: work.append,
            lambda work: {"job": _job(config, work), "rows": work.activations, "index": work.index},
        ),
    )
