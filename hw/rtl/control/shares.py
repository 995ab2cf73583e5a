# SPDX-License-Identifier: Apache-2.0
"""The shares of a descriptor: which unit gets which of its fields, in which order, and after what."""

import enum
from collections.abc import Callable
from dataclasses import dataclass

from amaranth.hdl import Const, Value
from amaranth.lib import data

from hw.rtl.common.walker import command_layout
from hw.rtl.control.descriptor_check import work_layout
from hw.rtl.memory.activation_fetch import fetch_layout
from hw.rtl.memory.axi import ADDRESS_BITS
from hw.rtl.memory.gatherer import gather_layout
from hw.rtl.memory.weight_fetch import weights_layout
from hw.spec.config import AcceleratorConfig
from hw.spec.ops.command import command_fields

JOBS_AHEAD = 4
"""Number of layers whose jobs wait for the gatherer."""


class Side(enum.Enum):
    """The two halves of a descriptor, which are sent at different times; the fields of the work that each needs."""

    WEIGHTS = ("command", "wait", "weights", "weights_stride", "weight_beats")
    ACTIVATIONS = (
        "command",
        "wait",
        "activations",
        "activation_beats",
        "results",
        "result_pitch",
        "interrupt",
    )

    def layout(self, config: AcceleratorConfig) -> data.StructLayout:
        """The side's fields of the checked descriptor."""
        whole = work_layout(config)
        return data.StructLayout({name: whole[name].shape for name in self.value})


@dataclass(frozen=True)
class Share:
    """The fields of a layer for one unit.

    name : name of the dispatcher's output
    side : the side to which it belongs
    layout : layout of the output's payload
    fields : function from the side's fields to the payload
    ahead : depth of the FIFO before the unit, a power of two; 0 if there is none
    wanted : function from the side's fields to whether the unit needs this layer
    after : name of a share of the activations side: send this share only after that one is sent and its bursts are
        requested, unless the activations side waits
    """

    name: str
    side: Side
    layout: data.StructLayout
    fields: Callable[[data.View], dict[str, Value]]
    ahead: int = 0
    wanted: Callable[[data.View], Value] = lambda work: Const(1)
    after: str = ""


def unit_layout(config: AcceleratorConfig) -> data.StructLayout:
    """A layer, and the address of its activations."""
    return data.StructLayout({"command": command_layout(config), "address": ADDRESS_BITS})


def shares(config: AcceleratorConfig) -> tuple[Share, ...]:
    """The share of each unit."""
    counts = ("tokens", "out_tiles", "last_columns")
    return (
        Share(
            "core",
            Side.WEIGHTS,
            command_layout(config),
            lambda work: {name: work.command[name] for name in command_fields(config)},
        ),
        Share(
            "regions",
            Side.WEIGHTS,
            weights_layout(),
            lambda work: {"address": work.weights, "stride": work.weights_stride, "beats": work.weight_beats},
            after="blocks",
        ),
        Share(
            "unit",
            Side.ACTIVATIONS,
            unit_layout(config),
            lambda work: {"command": work.command, "address": work.activations},
            ahead=2,
        ),
        Share(
            "blocks",
            Side.ACTIVATIONS,
            fetch_layout(config),
            lambda work: {"address": work.activations, "beats": work.activation_beats},
            wanted=lambda work: ~work.command.reuse,
        ),
        Share(
            "jobs",
            Side.ACTIVATIONS,
            gather_layout(config),
            lambda work: {
                **{name: work.command[name] for name in counts},
                "address": work.results,
                "pitch": work.result_pitch,
                "interrupt": work.interrupt,
            },
            ahead=JOBS_AHEAD,
        ),
    )
