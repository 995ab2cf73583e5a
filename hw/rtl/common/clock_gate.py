# SPDX-License-Identifier: Apache-2.0
"""Clock gates of the simulated device, which then spends no time on blocks that have nothing to do."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from amaranth.hdl import Cat, ClockDomain, DomainRenamer, Fragment, Module, ResetSignal, Signal, Value, ValueLike
from amaranth.hdl._ir import PortDirection
from amaranth.lib import wiring

from hw.spec.simulation import CLOCKS_NEEDED, GATED_DOMAIN

SETTLING = 16
"""Cycles that are enough for a block without long pipelines to come to rest after an event."""


class ClockGates:
    """The platform of the simulated device. Hardware for any other platform has one clock and no gates.

    A gated block has a clock of its own, the port ``gated_<n>_clk`` of the design. This clock has its edges together
    with the other clock, but only in cycles in which bit n of the port ``clocks_needed`` is 1. A block whose clock is
    not needed would not change its state, so results and cycles are the same as without gates.
    """

    def __init__(self):
        self._clocks: list[Signal] = []
        self._needed: list[Signal] = []

    def add(self) -> tuple[ClockDomain, Signal]:
        """A new clock domain, and the signal that says whether its clock is needed."""
        domain = ClockDomain(GATED_DOMAIN.format(len(self._clocks)))
        needed = Signal(name=f"needed_{len(self._needed)}")
        self._clocks.append(domain.clk)
        self._needed.append(needed)
        return domain, needed

    def ports(self, design: Fragment) -> dict[str, tuple[Signal, PortDirection]]:
        """The additional ports of an elaborated design, in the form of :func:`hw.flows.lower.port_map`."""
        needed = Signal(max(1, len(self._needed)), name=CLOCKS_NEEDED)
        design.add_statements("comb", needed.eq(Cat(self._needed)))
        clocks = {clock.name: (clock, PortDirection.Input) for clock in self._clocks}
        return {**clocks, CLOCKS_NEEDED: (needed, PortDirection.Output)}


def _handshakes(component: wiring.Component) -> Iterator[tuple[Value, Value]]:
    """``valid`` and ``ready`` of all streams of a component."""
    ports = {path: Value.cast(value) for path, _, value in component.signature.flatten(component)}
    for (*port, part), value in ports.items():
        if part == "valid" and (*port, "ready") in ports:
            yield value, ports[*port, "ready"]


def _changes(m: Module, values: Sequence[Value], name: str) -> list[Value]:
    """Whether each value is another one than in the cycle before."""
    before = [Signal(len(value), name=f"{name}_before_{index}") for index, value in enumerate(values)]
    m.d.sync += [register.eq(value) for register, value in zip(before, values, strict=True)]
    return [register != value for register, value in zip(before, values, strict=True)]


def gate(
    m: Module,
    platform,
    *blocks: wiring.Component,
    name: str,
    cycles: int = 0,
    events: Iterable[ValueLike] = (),
    watch: Iterable[ValueLike] = (),
    pipeline: tuple[ValueLike, int] | None = None,
) -> list:
    """``blocks``, for the module's submodules; in the simulated device with a clock that stops without work.

    A transfer at one of the blocks' streams is an event, and so is a change of a stream's ``valid`` or ``ready``. The
    caller names all others: what comes in outside of streams, and the steps of work that goes on by itself. A block
    inside of a gated block must come to rest before it.

    Parameters
    ----------
    cycles : maximum number of cycles from an event until the blocks wait for the next one
    events : values whose bits are events
    watch : values whose changes are events
    pipeline : a value comes in, and the number of cycles that it takes to the end of the blocks' longest pipeline
    """
    if not isinstance(platform, ClockGates):
        return list(blocks)
    domain, needed = platform.add()
    m.domains += domain
    handshakes = [found for block in blocks for found in _handshakes(block)]
    entering, latency = pipeline or (0, 0)
    left, event = Signal(range(max(cycles, latency) + 1), name=f"{name}_left"), Signal(name=f"{name}_event")
    happens = [
        *(valid & ready for valid, ready in handshakes),
        *(Value.cast(value).any() for value in events),
        *_changes(m, [*chain(*handshakes), *(Value.cast(value) for value in watch)], name),
    ]
    m.d.comb += [
        event.eq(Cat(*happens).any()),
        needed.eq(event | Value.cast(entering).any() | (left != 0) | ResetSignal()),
        domain.rst.eq(ResetSignal()),
    ]
    with m.If(entering):
        m.d.sync += left.eq(max(cycles, latency))
    with m.Elif(event & (left < cycles)):
        m.d.sync += left.eq(cycles)
    with m.Elif(left != 0):
        m.d.sync += left.eq(left - 1)
    return [DomainRenamer(domain.name)(block) for block in blocks]
