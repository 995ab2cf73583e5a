# SPDX-License-Identifier: Apache-2.0
"""The activation buffer: two banks of mantissas, group sums and token exponents."""

from amaranth.hdl import Module, Mux, Shape, Signal, Value, signed
from amaranth.lib import data, stream
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.delay import delay
from hw.rtl.common.fifo import Credits
from hw.rtl.common.ram import buffer_attributes
from hw.rtl.common.walker import Walker, command_signature
from hw.spec.config import EXPONENT_BITS, AcceleratorConfig
from hw.spec.ops.command import stored_slices

BANKS = 2
"""One bank is read while the other is filled for the next command."""


def activation_payload(config: AcceleratorConfig) -> data.StructLayout:
    """One token's K-slice as it enters the core."""
    return data.StructLayout(
        {
            "mantissas": data.ArrayLayout(signed(config.activation_bits), config.tile),
            "exponent": signed(EXPONENT_BITS),
        }
    )


def bank_slices(config: AcceleratorConfig) -> int:
    """Token slices that one bank holds."""
    return stored_slices(config)


def bank_start(config: AcceleratorConfig, bank: Value) -> Value:
    """Address of a bank's first slice."""
    return Mux(bank, bank_slices(config), 0)


class ActivationBuffer(Block):
    """Takes the activations of each command, K-slice by K-slice, all tokens of a slice in a row, and sums the groups.

    The array reads in slice-major order, too. So addresses are simple counters, and the array can start with a slice as
    soon as its tokens are stored. Commands that reuse the activations of the previous command have no slices.

    Members
    -------
    command : the layers
    slices : token slices, 1 per cycle; the token's exponent is stored with its first slice
    slice_ready : one cycle for each slice when all its tokens can be read
    release : the oldest bank is no longer read; one cycle
    read_address, read_data : mantissas, ``read_latency`` cycles later; bank b starts at ``b * bank_slices``
    sum_address, sum_data : group sums, slice-major like the mantissas, ``read_latency`` cycles later
    exponent_address, exponent_data : token exponents, in the same cycle
    """

    read_latency = 2
    """Cycles from an address to its data."""
    sum_latency = 4
    """Cycles from the last slice of a group until its sum can be read."""

    def __init__(self, config: AcceleratorConfig):
        self.config = config
        entries = range(BANKS * bank_slices(config))
        super().__init__(
            {
                "command": In(command_signature(config)),
                "slices": In(stream.Signature(activation_payload(config))),
                "slice_ready": Out(1),
                "release": In(1),
                "read_address": In(entries),
                "read_data": Out(data.ArrayLayout(signed(config.activation_bits), config.tile)),
                "sum_address": In(entries),
                "sum_data": Out(signed(config.activation_sum_bits)),
                "exponent_address": In(range(BANKS * config.max_tokens)),
                "exponent_data": Out(signed(EXPONENT_BITS)),
            }
        )

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"read_latency": self.read_latency, "sum_latency": self.sum_latency}

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.walker = walker = Walker(
            self.config,
            {
                "token": lambda command: command.tokens,
                "slice": lambda command: command.group_slices,
                "group": lambda command: command.groups,
            },
        )
        # The drain releases a bank when it takes the next command with new activations. So the first release comes with
        # the first command, before any bank was used: for this reason the initial count is one less.
        m.submodules.free_banks = free_banks = Credits(BANKS, init=BANKS - 1)
        fresh = ~self.command.payload.reuse
        may_load = fresh & free_banks.enough
        m.d.comb += [
            walker.command.payload.eq(self.command.payload),
            walker.command.valid.eq(self.command.valid & may_load),
            self.command.ready.eq(~fresh | (may_load & walker.command.ready)),
            free_banks.add.eq(self.release),
            free_banks.take.eq(walker.command.valid & walker.command.ready),
            self.slices.ready.eq(walker.active),
            walker.step.eq(self.slices.valid & walker.active),
        ]
        m.d.sync += self.slice_ready.eq(walker.step & walker.last.token)
        token = Signal(range(self.config.max_tokens))
        with m.If(walker.step):
            m.d.sync += token.eq(Mux(walker.last.token, 0, token + 1))
        self._store_mantissas(m, walker, platform)
        self._store_exponents(m, walker, token)
        self._store_sums(m, walker, token, platform)
        return m

    def _count(self, m: Module, walker: Walker, enable, restart, name: str) -> Signal:
        """A write address that restarts with each bank and counts with ``enable``."""
        address = Signal(range(BANKS * bank_slices(self.config)), name=name)
        with m.If(enable):
            m.d.sync += address.eq(address + 1)
        with m.If(restart):
            m.d.sync += address.eq(Mux(walker.bank, 0, bank_slices(self.config)))
        return address

    def _store_mantissas(self, m: Module, walker: Walker, platform) -> None:
        shape = data.ArrayLayout(signed(self.config.activation_bits), self.config.tile)
        depth = BANKS * bank_slices(self.config)
        attributes = buffer_attributes(platform, depth, Shape.cast(shape).width)
        m.submodules.mantissas = memory = Memory(shape=shape, depth=depth, init=[], attrs=attributes)
        write, read = memory.write_port(), memory.read_port()
        m.d.comb += [
            write.addr.eq(self._count(m, walker, walker.step, walker.step & walker.done, "slice_address")),
            write.data.eq(self.slices.payload.mantissas),
            write.en.eq(walker.step),
            read.addr.eq(self.read_address),
            read.en.eq(1),
            self.read_data.eq(delay(m, read.data, self.read_latency - 1, name="mantissas_read")),
        ]

    def _store_exponents(self, m: Module, walker: Walker, token: Signal) -> None:
        tokens = self.config.max_tokens
        m.submodules.exponents = memory = Memory(shape=signed(EXPONENT_BITS), depth=BANKS * tokens, init=[])
        write, read = memory.write_port(), memory.read_port(domain="comb")
        m.d.comb += [
            write.addr.eq(token + Mux(walker.bank, tokens, 0)),
            write.data.eq(self.slices.payload.exponent),
            write.en.eq(walker.step & walker.first.slice & walker.first.group),
            read.addr.eq(self.exponent_address),
            self.exponent_data.eq(read.data),
        ]

    def _store_sums(self, m: Module, walker: Walker, token: Signal, platform) -> None:
        """Adds the elements of each slice and then the slices of a group. There are registers after the input, after
        sums of four, and after the sum of these; the group's accumulator is the fourth step."""
        config = self.config
        shape = signed(config.activation_sum_bits)
        step, stages = walker.step, 3
        terms = list(self.slices.payload.mantissas)
        for stage, fan_in in enumerate((1, 4, len(terms))):
            parts = []
            for index in range(0, len(terms), fan_in):
                part = Signal(shape, name=f"sum_{stage}_{index}", reset_less=True)
                m.d.sync += part.eq(sum(terms[index : index + fan_in]))
                parts.append(part)
            terms = parts
            step = delay(m, step, 1, name=f"sum_step_{stage}", reset=True)
        first_slice = delay(m, walker.first.slice, stages, name="sum_first_slice")
        last_slice = delay(m, walker.last.slice, stages, name="sum_last_slice")
        done = delay(m, walker.step & walker.done, stages, name="sum_done", reset=True)
        write_token = delay(m, token, stages, name="sum_token")

        m.submodules.partial_sums = partial = Memory(shape=shape, depth=config.max_tokens, init=[])
        partial_write, partial_read = partial.write_port(), partial.read_port(domain="comb")
        total = Signal(shape)
        m.d.comb += [
            partial_read.addr.eq(write_token),
            total.eq(terms[0] + Mux(first_slice, 0, partial_read.data)),
            partial_write.addr.eq(write_token),
            partial_write.data.eq(total),
            partial_write.en.eq(step),
        ]
        depth = BANKS * bank_slices(config)
        attributes = buffer_attributes(platform, depth, shape.width)
        m.submodules.sums = memory = Memory(shape=shape, depth=depth, init=[], attrs=attributes)
        write, read = memory.write_port(), memory.read_port()
        # The walker may be at the next bank already, so this address has a bank of its own.
        address = Signal(range(BANKS * bank_slices(config)))
        bank = Signal()
        with m.If(step & last_slice):
            m.d.sync += address.eq(address + 1)
        with m.If(done):
            m.d.sync += [bank.eq(~bank), address.eq(Mux(bank, 0, bank_slices(config)))]
        m.d.comb += [
            write.addr.eq(address),
            write.data.eq(total),
            write.en.eq(step & last_slice),
            read.addr.eq(self.sum_address),
            read.en.eq(1),
            self.sum_data.eq(delay(m, read.data, self.read_latency - 1, name="sum_read")),
        ]
