# SPDX-License-Identifier: Apache-2.0
"""Nested loops over a layer, driven by commands: what sequencer, column heads, drain and header reader share."""

from collections.abc import Callable, Mapping

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import data, stream
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.spec.config import AcceleratorConfig
from hw.spec.ops.command import command_fields


def command_layout(config: AcceleratorConfig) -> data.StructLayout:
    """The core's command as an Amaranth layout."""
    return data.StructLayout(command_fields(config))


def command_signature(config: AcceleratorConfig) -> stream.Signature:
    """A stream of commands."""
    return stream.Signature(command_layout(config))


TOKEN_LOOPS = {
    "token": lambda command: command.tokens,
    "slice": lambda command: command.group_slices,
    "group": lambda command: command.groups,
    "tile": lambda command: command.out_tiles,
}
"""The loops of a layer in the order in which tokens pass the array."""


class Walker(Block):
    """Walks the nested loops of one command after another, without a cycle between two commands.

    Each loop counts down and keeps its first and last flags in registers, so ``step`` reaches a flag's users after
    one AND per nesting level: these flags set the clock of the whole core. For the same reason what a loop starts again
    with does not depend on ``step``: after a command's last step it is the next command's bound, also if there is none
    yet, and then nobody looks. Throughput 1 step per cycle.

    Parameters
    ----------
    loops : from the innermost outwards, the name of each loop and the function from a command to its bound

    Members
    -------
    command : commands, taken when the walker is idle or makes the last step of the one before
    active : a command is being walked
    current : that command
    step : advance; only while ``active``
    first, last : one flag per loop: it is in its first, its last iteration
    done : with ``step``: this is the command's last step
    bank : the bank of activations that the current command uses; every command that brings its own takes the other
    next_bank : the bank of the command that is offered
    tile_end : with ``step``: this is the last step of an iteration of the outermost loop
    """

    latency = 1
    """Cycles from a command's transfer to its first step, if the walker is idle."""

    def __init__(self, config: AcceleratorConfig, loops: Mapping[str, Callable[[data.View], Value]]):
        self.config, self.loops = config, dict(loops)
        flags = data.StructLayout(dict.fromkeys(self.loops, 1))
        super().__init__(
            {
                "command": In(command_signature(config)),
                "active": Out(1),
                "current": Out(command_layout(config)),
                "step": In(1),
                "first": Out(flags),
                "last": Out(flags),
                "done": Out(1),
                "bank": Out(1, init=1),
                "next_bank": Out(1),
                "tile_end": Out(1),
            }
        )

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency}

    def elaborate(self, platform) -> Module:
        m = Module()
        load, fresh = Signal(), Signal()
        outermost = list(self.loops)[-1]
        m.d.comb += [
            self.tile_end.eq(Cat(self.last[name] for name in list(self.loops)[:-1]).all()),
            self.done.eq(self.tile_end & self.last[outermost]),
            self.command.ready.eq(~self.active | (self.step & self.done)),
            load.eq(self.command.valid & self.command.ready),
            fresh.eq(~self.active | self.done),
            self.next_bank.eq(self.bank ^ ~self.command.payload.reuse),
        ]
        with m.If(load):
            m.d.sync += [
                self.active.eq(1),
                self.current.eq(self.command.payload),
                self.bank.eq(self.next_bank),
            ]
        with m.Elif(self.step & self.done):
            m.d.sync += self.active.eq(0)
        advance = self.step | (self.command.valid & ~self.active)
        for name, bound in self.loops.items():
            advance = self._loop(m, name, bound, fresh, advance)
        return m

    def _loop(self, m: Module, name: str, bound, fresh: Value, advance: Value) -> Value:
        """One loop; returns the condition on which the next outer one advances."""
        limit, next_limit = Value.cast(bound(self.current)), Value.cast(bound(self.command.payload))
        left = Signal(len(limit), name=f"{name}_left")
        first, last = self.first[name], self.last[name]
        wraps, again = Signal(name=f"{name}_wraps"), Signal(len(limit), name=f"{name}_again")
        m.d.comb += [wraps.eq(last | ~self.active), again.eq(Mux(fresh, next_limit, limit))]
        with m.If(advance):
            with m.If(wraps):
                m.d.sync += [left.eq(again), first.eq(1), last.eq(again == 1)]
            with m.Else():
                m.d.sync += [left.eq(left - 1), first.eq(0), last.eq(left == 2)]
        return advance & wraps


class CommandFork(Block):
    """Gives every command to several users, each at its own pace. Latency 1 cycle, throughput 1 command per cycle.

    One ring of commands with a read pointer per user; the slowest user decides when it is full.

    Parameters
    ----------
    users : how many
    depth : commands in the ring, a power of two

    Members
    -------
    command : the commands
    copies : the same commands, one stream per user
    """

    latency = 1

    def __init__(self, config: AcceleratorConfig, users: int, depth: int = 4):
        self.config, self.users, self.depth = config, users, depth
        signature = command_signature(config)
        super().__init__({"command": In(signature), "copies": Out(signature).array(users)})

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency, "depth": self.depth}

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.memory = memory = Memory(shape=command_layout(self.config), depth=self.depth, init=[])
        write_port = memory.write_port()
        # One bit more than the address tells a full ring from an empty one.
        written = Signal(range(2 * self.depth))
        push, full, filled = Signal(), Signal(), []
        for user, output in enumerate(self.copies):
            read_port = memory.read_port(domain="comb")
            read = Signal.like(written, name=f"read_{user}")
            taken, left = Signal(name=f"taken_{user}"), Signal.like(written, name=f"left_{user}")
            m.d.comb += [
                read_port.addr.eq(read),
                output.payload.eq(read_port.data),
                taken.eq(output.valid & output.ready),
                left.eq(written - read),
            ]
            # Registered: whether there is a command is the first that its users ask.
            m.d.sync += [read.eq(read + taken), output.valid.eq(push | (left > taken))]
            filled.append(left >= Mux(push, self.depth - 1, self.depth))
        m.d.sync += full.eq(Cat(filled).any())
        m.d.comb += [
            self.command.ready.eq(~full),
            push.eq(self.command.valid & self.command.ready),
            write_port.addr.eq(written),
            write_port.data.eq(self.command.payload),
            write_port.en.eq(push),
        ]
        m.d.sync += written.eq(written + push)
        return m
