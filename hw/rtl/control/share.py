# SPDX-License-Identifier: Apache-2.0
"""A share of a descriptor: the fields for one unit."""

import enum
from collections.abc import Callable
from dataclasses import dataclass

from amaranth.hdl import Const, Value
from amaranth.lib import data

JOBS_AHEAD = 4
"""Number of layers whose jobs wait for the gatherer."""


class Side(enum.Enum):
    """The two halves of a descriptor, which are sent at different times."""

    WEIGHTS = enum.auto()
    ACTIVATIONS = enum.auto()


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
    early : it may be sent while the layer waits for a row that is being written
    apart : function from the side's fields to whether the bursts of the other share need not be requested yet
    """

    name: str
    side: Side
    layout: data.StructLayout
    fields: Callable[[data.View], dict[str, Value]]
    ahead: int = 0
    wanted: Callable[[data.View], Value] = lambda work: Const(1)
    after: str = ""
    early: bool = False
    apart: Callable[[data.View], Value] = lambda work: Const(0)
