# SPDX-License-Identifier: Apache-2.0
"""Nested loops over a layer, driven by commands. Sequencer, column control, drain and header reader use them."""

from collections.abc import Callable, Mapping

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
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
"""The loops of a layer in the order of tokens in the array, from the innermost outwards."""


class Walker(Block):
    """Walks the nested loops of one command after another, without a cycle between two commands.

    Each loop counts down and keeps its first and last flags in registers. Whether several loops are in their last
    iteration together is a register too, so ``step`` reaches every loop through one gate: these flags are in the
    critical path of the whole core. For the same reason the value with which a loop restarts does not depend on
    ``step``: after a command's last step it is the next command's bound. If there is no next command yet, this value is
    not used. Throughput 1 step per cycle.

    Parameters
    ----------
    loops : from the innermost outwards, two or more: the name of each loop and the function from a command to its bound
    layout : of a command, if it is not that of the core

    Members
    -------
    command : commands, accepted while the walker is idle or makes the last step of the previous one
    active : there is a current command
    current : the current command
    step : advance; only while ``active``
    first, last : one flag per loop: it is in its first, its last iteration
    done : this is the command's last step; valid with ``step``
    bank : the bank of activations that the current command uses; a command with new activations uses the other bank
    next_bank : the bank of the command at the input
    tile_start, tile_end : this is the first, the last step of an iteration of the outermost loop; valid with ``step``
    """

    latency = 1
    """Cycles from a command's transfer to its first step, if the walker is idle."""

    def __init__(
        self,
        config: AcceleratorConfig,
        loops: Mapping[str, Callable[[data.View], Value]],
        layout: data.StructLayout | None = None,
    ):
        self.config, self.loops = config, dict(loops)
        layout = layout or command_layout(config)
        flags = data.StructLayout(dict.fromkeys(self.loops, 1))
        super().__init__(
            {
                "command": In(stream.Signature(layout)),
                "active": Out(1),
                "current": Out(layout),
                "step": In(1),
                "first": Out(flags),
                "last": Out(flags),
                "done": Out(1),
                "bank": Out(1, init=1),
                "next_bank": Out(1),
                "tile_start": Out(1),
                "tile_end": Out(1),
            }
        )

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency}

    def elaborate(self, platform) -> Module:
        m = Module()
        load, fresh, advance = Signal(), Signal(), Signal()
        # Bit k: the loops up to k, the innermost being 0, are all in their last iteration.
        ends = Signal(len(self.loops))
        m.d.comb += [
            self.tile_end.eq(ends[-2]),
            self.done.eq(ends[-1]),
            self.command.ready.eq(~self.active | (self.step & self.done)),
            load.eq(self.command.valid & self.command.ready),
            fresh.eq(~self.active | self.done),
            self.next_bank.eq(self.bank ^ ~self.command.payload.reuse),
            advance.eq(self.step | (self.command.valid & ~self.active)),
        ]
        with m.If(load):
            m.d.sync += [
                self.active.eq(1),
                self.current.eq(self.command.payload),
                self.bank.eq(self.next_bank),
            ]
        with m.Elif(self.step & self.done):
            m.d.sync += self.active.eq(0)
        firsts, lasts, once = [], [], []
        for index, (name, bound) in enumerate(self.loops.items()):
            turns = Const(1) if index == 0 else ends[index - 1]
            flags = self._loop(m, name, bound, fresh, advance, turns)
            for collected, flag in zip((firsts, lasts, once), flags, strict=True):
                collected.append(flag)
        with m.If(advance):
            m.d.sync += [
                self.tile_start.eq(fresh | Cat(firsts[:-1]).all()),
                *(
                    ends[index].eq(Mux(fresh, Cat(once[: index + 1]).all(), Cat(lasts[: index + 1]).all()))
                    for index in range(len(lasts))
                ),
            ]
        return m

    def _loop(self, m: Module, name: str, bound, fresh: Value, advance: Value, turns: Value) -> tuple[Value, ...]:
        """One loop, which goes on with ``advance`` if it ``turns``.

        Returns its next first and last flag within a command, and its first last flag in the next command. These two
        are separate to the end, because the next command is known late.
        """
        limit, next_limit = Value.cast(bound(self.current)), Value.cast(bound(self.command.payload))
        left, single = Signal(len(limit), name=f"{name}_left"), Signal(name=f"{name}_single")
        first, last = self.first[name], self.last[name]
        next_last, once = Signal(name=f"{name}_next_last"), Signal(name=f"{name}_once")
        m.d.comb += [next_last.eq(Mux(turns, Mux(last, single, left == 2), last)), once.eq(next_limit == 1)]
        next_first = Mux(turns, last, first)
        with m.If(advance):
            with m.If(fresh):
                m.d.sync += [left.eq(next_limit), first.eq(1), last.eq(once), single.eq(once)]
            with m.Else():
                m.d.sync += [first.eq(next_first), last.eq(next_last)]
                with m.If(turns):
                    m.d.sync += left.eq(Mux(last, limit, left - 1))
        return next_first, next_last, once


class CommandFork(Block):
    """Sends every command to several users, which take it independently. Latency 1 cycle, throughput 1 per cycle.

    It is a ring of commands with a read pointer per user; it is full if the slowest user has not read its oldest entry.

    Parameters
    ----------
    users : number of users
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
        # One bit more than the address distinguishes a full ring from an empty one.
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
            # valid is a register, because long paths start at it in the users.
            m.d.sync += output.valid.eq(push | Mux(taken, left > 1, left > 0))
            # As a condition, and not as a summand, ``taken`` does not have to pass an adder.
            with m.If(taken):
                m.d.sync += read.eq(read + 1)
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
