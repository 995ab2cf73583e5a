# SPDX-License-Identifier: Apache-2.0
"""The shares of a descriptor: which unit gets which of its fields, in which order, and after what."""

from collections.abc import Callable

from amaranth.hdl import Cat, Const, Value
from amaranth.lib import data

from hw.rtl.common.walker import command_layout
from hw.rtl.control.attention_shares import (
    ACTIVATIONS_OF_ATTENTION,
    BY_PIECES,
    WEIGHTS_OF_ATTENTION,
    attention_shares,
    uses_array,
    with_attention,
    writes_results,
)
from hw.rtl.control.descriptor_check import epilogue_fields, work_layout
from hw.rtl.control.share import JOBS_AHEAD, Share, Side
from hw.rtl.memory.activation_fetch import fetch_layout
from hw.rtl.memory.axi import ADDRESS_BITS
from hw.rtl.memory.completion import expected_layout, expected_outputs
from hw.rtl.memory.gatherer import gather_layout
from hw.rtl.memory.operand_fetch import operand_layout
from hw.rtl.memory.weight_fetch import weights_layout
from hw.rtl.vector.layouts import epilogue_layout
from hw.spec.config import AcceleratorConfig
from hw.spec.control.program import LENGTH_BITS
from hw.spec.ops.command import command_fields
from hw.spec.ops.epilogue import FLAGS


def side_names(config: AcceleratorConfig, side: Side) -> tuple[str, ...]:
    """The fields of the checked descriptor that a side needs."""
    vector = ("vector",) if config.has_vector_unit else ()
    if side is Side.WEIGHTS:
        attention = WEIGHTS_OF_ATTENTION if config.has_attention else ()
        return ("command", "wait", "weights", "weights_stride", "weight_beats", *vector, *attention)
    rows = ("source_pitch", "out_features", "heads") if config.has_vector_unit else ()
    operands = ("activations", "activation_beats", "results", "interrupt")
    index = ("index",) if config.has_programs else ()
    names = ("command", "wait", *operands, *epilogue_fields(config), *rows, *vector, *index)
    if not config.has_attention:
        return names
    return names + ACTIVATIONS_OF_ATTENTION + (BY_PIECES if config.reads_by_pieces else ())


def side_layout(config: AcceleratorConfig, side: Side) -> data.StructLayout:
    """A side's fields."""
    whole = work_layout(config)
    return data.StructLayout({name: whole[name].shape for name in side_names(config, side)})


def unit_layout(config: AcceleratorConfig) -> data.StructLayout:
    """A layer, the address of its activations, and in hardware that runs programs the descriptor's index."""
    index = {"index": LENGTH_BITS} if config.has_programs else {}
    return data.StructLayout({"command": command_layout(config), "address": ADDRESS_BITS, **index})


def _always(work: data.View) -> Value:
    return Const(1)


def shares(config: AcceleratorConfig) -> tuple[Share, ...]:
    """The share of each unit."""
    if config.has_attention:
        found = (*_linear_shares(config, uses_array, writes_results), *_vector_shares(config))
        return (*(with_attention(config, share) for share in found), *attention_shares(config))
    if config.has_vector_unit:
        return (*_linear_shares(config, lambda work: ~work.vector, lambda work: ~work.quiet), *_vector_shares(config))
    return _linear_shares(config, _always, _always)


def _linear_shares(
    config: AcceleratorConfig, linear: Callable[[data.View], Value], written: Callable[[data.View], Value]
) -> tuple[Share, ...]:
    """The shares of a linear layer. linear, written: whether it is one, and whether its results are written."""
    return (
        Share(
            "core",
            Side.WEIGHTS,
            command_layout(config),
            lambda work: {name: work.command[name] for name in command_fields(config)},
            wanted=linear,
        ),
        Share(
            "regions",
            Side.WEIGHTS,
            weights_layout(),
            lambda work: {"address": work.weights, "stride": work.weights_stride, "beats": work.weight_beats},
            wanted=linear,
            after="blocks",
        ),
        Share(
            "unit",
            Side.ACTIVATIONS,
            unit_layout(config),
            lambda work: {
                "command": work.command,
                "address": work.activations,
                **({"index": work.index} if config.has_programs else {}),
            },
            ahead=2,
            wanted=linear,
            early=True,
        ),
        Share(
            "blocks",
            Side.ACTIVATIONS,
            fetch_layout(config),
            lambda work: {"address": work.activations, "beats": work.activation_beats},
            wanted=lambda work: linear(work) & ~work.command.reuse,
            early=True,
        ),
        Share(
            "results_job",
            Side.ACTIVATIONS,
            gather_layout(),
            lambda work: {"address": work.results, "pitch": work.result_pitch, "interrupt": work.interrupt},
            ahead=JOBS_AHEAD,
            wanted=written,
        ),
    )


def _vector_shares(config: AcceleratorConfig) -> tuple[Share, ...]:
    """The shares of the vector unit: the second output, the epilogue, and its operands."""

    def second(work: data.View) -> Value:
        return work.second | work.pieces

    def operand(name: str, address: str, pitch: str | None, columns: str, flag: str) -> Share:
        def fields(work: data.View) -> dict[str, Value]:
            counts = {"tokens": work.command.tokens, "columns": work[columns]}
            return {"address": work[address], "pitch": work[pitch] if pitch else Const(0), **counts}

        layout = operand_layout(config.max_tokens)
        return Share(name, Side.ACTIVATIONS, layout, fields, ahead=2, wanted=lambda work: work[flag])

    return (
        Share(
            "second_job",
            Side.ACTIVATIONS,
            gather_layout(),
            lambda work: {"address": work.second_results, "pitch": work.second_pitch, "interrupt": Const(0)},
            ahead=JOBS_AHEAD,
            wanted=second,
        ),
        Share(
            "epilogue",
            Side.ACTIVATIONS,
            epilogue_layout(config),
            lambda work: {
                "flags": Cat(work[field.name] for field in FLAGS),
                "vector": work.vector,
                "tokens": work.command.tokens,
                "columns": work.out_features,
                "rotated": work.heads,
                "eps": work.eps,
            },
            ahead=JOBS_AHEAD,
        ),
        Share(
            "expected",
            Side.ACTIVATIONS,
            expected_layout(expected_outputs(config)),
            lambda work: {"outputs": Cat(~work.quiet, second(work)), "interrupt": work.interrupt},
        ),
        operand("source", "activations", "source_pitch", "out_features", "vector"),
        operand("addend", "addend", "addend_pitch", "out_features", "add"),
        operand("table", "table", "table_pitch", "head", "rotary"),
        operand("factor", "factor", None, "out_features", "second"),
    )
