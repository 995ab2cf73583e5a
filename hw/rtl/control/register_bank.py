# SPDX-License-Identifier: Apache-2.0
"""The control port's registers, generated from their description."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.control.control_port import ControlPort
from hw.rtl.memory.axi import Response, lite_signature
from hw.spec.config import AcceleratorConfig
from hw.spec.control.registers import Access, Register, registers_of

CONTROL_ADDRESS_BITS = 12
"""Address bits of the control port: a page of 4 KiB, the least that a processor maps."""
_LINE = 8
"""A read selects one of this number of words in its first cycle, and one of the lines in the second."""


def register_members(register: Register) -> dict[str, wiring.Member]:
    """The members of the bank that belong to a register; see :class:`RegisterBank`."""
    name, run = register.name, register.words > 1
    if register.fields:
        shape = data.StructLayout({field.name: unsigned(field.width) for field in register.fields})
        init = {field.name: field.get(register.reset) for field in register.fields}
    else:
        shape, init = unsigned(64 if register.wide else 32), register.reset
    match register.access:
        case Access.COMMAND:
            return {name: Out(shape)}
        case Access.CLEAR:
            return {name: Out(shape), f"set_{name}": In(shape)}
        case Access.READ_WRITE if run:
            return {name: Out(32 * register.words)}
        case Access.READ_WRITE:
            return {name: Out(shape, init=init)}
        case Access.READ if run:
            return {name: In(shape), f"{name}_index": Out(range(register.words))}
        case Access.READ:
            return {name: In(shape)}


class RegisterBank(Block):
    """The registers of :func:`hw.spec.control.registers.registers_of` with an AXI4-Lite port.

    Members
    -------
    ctrl : the AXI4-Lite port
    forget : clear all bits of registers with access CLEAR

    and one for each register, with the register's name. It has the register's fields, side by side without gaps, or
    all of its bits.

    - READ: an input, the value for software. A run of words is read word by word: ``<name>_index`` is an output, and
      ``<name>`` is the word in the same cycle, so a memory with an asynchronous read port can hold the run.
    - READ_WRITE: an output, the last value that software wrote. A run of words is one number, with word 0 lowest.
    - COMMAND: an output; a field is 1 for one cycle when software writes a 1 to it.
    - CLEAR: an output, the pending bits, and an input ``set_<name>``. A bit that is set and cleared in the same cycle
      stays set.

    Latency: a written value is at the output ``write_latency`` cycles after the later transfer of AW and W. A read
    gives the values of the cycle after AR; throughput as :class:`ControlPort`.
    """

    write_latency, write_period = ControlPort.write_latency, ControlPort.write_period
    read_latency, read_period = ControlPort.read_latency, ControlPort.read_period

    def __init__(self, config: AcceleratorConfig):
        self.registers = registers_of(config)
        members = {name: member for register in self.registers for name, member in register_members(register).items()}
        super().__init__({"ctrl": In(lite_signature(CONTROL_ADDRESS_BITS)), "forget": In(1), **members})

    def register(self, name: str):
        """The member of this register."""
        if name not in {register.name for register in self.registers}:
            raise KeyError(f"there is no register {name}")
        return getattr(self, name)

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {
            "write_latency": self.write_latency,
            "write_period": self.write_period,
            "read_latency": self.read_latency,
            "read_period": self.read_period,
        }

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.port = port = ControlPort(CONTROL_ADDRESS_BITS)
        wiring.connect(m, wiring.flipped(self.ctrl), port.axi)
        self._check_writes(m, port)
        for register in self.registers:
            self._write(m, port, register)
        self._read(m, port)
        return m

    def _check_writes(self, m: Module, port: ControlPort) -> None:
        """The responses to writes."""
        with m.Switch(port.write_word):
            with m.Case(*(word for item in self.registers if item.access is not Access.READ for word in _words(item))):
                m.d.comb += port.write_response.eq(Response.OKAY)
            with m.Case(*(word for item in self.registers if item.access is Access.READ for word in _words(item))):
                m.d.comb += port.write_response.eq(Response.SLVERR)
            with m.Default():
                m.d.comb += port.write_response.eq(Response.DECERR)

    def _write(self, m: Module, port: ControlPort, register: Register) -> None:
        """The effect of a write to the register."""
        if register.access is Access.READ:
            return
        member = Value.cast(self.register(register.name))
        bits = _take_fields(register, port.write_data)
        words = [port.write & (port.write_word == word) for word in _words(register)]
        match register.access:
            case Access.READ_WRITE:
                for index, written in enumerate(words):
                    with m.If(written):
                        m.d.sync += member.word_select(index, len(bits)).eq(bits)
            case Access.COMMAND:
                m.d.sync += member.eq(Mux(words[0], bits, 0))
            case Access.CLEAR:
                cleared = Mux(words[0], bits, 0)
                causes = Value.cast(getattr(self, f"set_{register.name}"))
                m.d.sync += member.eq(Mux(self.forget, 0, member & ~cleared | causes))

    def _read(self, m: Module, port: ControlPort) -> None:
        """Selects a word of every line, with a register after it, and then a line. So the critical path does not depend
        on the number of registers.
        """
        lines: dict[tuple[int, ...], Signal] = {}
        singles: dict[int, dict[int, Value]] = {}
        for register in self.registers:
            words = _words(register)
            if register.access is Access.READ and register.words > 1:
                lines[tuple(sorted({word // _LINE for word in words}))] = self._read_run(m, port, register)
                continue
            for word, value in zip(words, self._values(m, port, register)):
                singles.setdefault(word // _LINE, {})[word % _LINE] = value
        for line, values in singles.items():
            lines[line,] = self._read_line(m, port, line, values)
        known = Signal()
        with m.If(port.read):
            m.d.sync += known.eq(0)
            with m.Switch(port.read_word), m.Case(*(word for register in self.registers for word in _words(register))):
                m.d.sync += known.eq(1)
        m.d.comb += port.read_response.eq(Mux(known, Response.OKAY, Response.DECERR))
        with m.Switch(port.read_word[_LINE.bit_length() - 1 :]):
            for numbers, picked in lines.items():
                with m.Case(*numbers):
                    m.d.comb += port.read_data.eq(picked)

    def _read_run(self, m: Module, port: ControlPort, register: Register) -> Signal:
        """The selected word of a run that is outside of the bank."""
        index = getattr(self, f"{register.name}_index")
        first = _words(register)[0]
        if first % register.words or register.words % _LINE:
            raise ValueError(f"run {register.name} starts at a multiple of its length, and that is of {_LINE} words")
        m.d.comb += index.eq(port.read_word[: len(index)])
        picked = Signal(32, name=f"run_{register.name}")
        with m.If(port.read):
            m.d.sync += picked.eq(self.register(register.name))
        return picked

    def _read_line(self, m: Module, port: ControlPort, line: int, values: dict[int, Value]) -> Signal:
        """The selected word of a line; 0 if there is no such word."""
        picked = Signal(32, name=f"line_{line}")
        with m.If(port.read), m.Switch(port.read_word[: _LINE.bit_length() - 1]):
            for index, value in values.items():
                with m.Case(index):
                    m.d.sync += picked.eq(value)
            with m.Default():
                m.d.sync += picked.eq(0)
        return picked

    def _values(self, m: Module, port: ControlPort, register: Register) -> list[Value]:
        """The value for a read of each of a register's words."""
        if register.access is Access.COMMAND:
            return [Const(0, 32)]
        member = Value.cast(self.register(register.name))
        if register.fields:
            return [_place_fields(register, member)]
        words = [member.word_select(index, 32) for index in range(len(_words(register)))]
        if register.access is Access.READ and register.wide:
            high = Signal(32, name=f"{register.name}_high")
            with m.If(port.read & (port.read_word == _words(register)[0])):
                m.d.sync += high.eq(words[1])
            words[1] = high
        return words


def _words(register: Register) -> range:
    """Word addresses of a register."""
    return range(register.offset // 4, register.end // 4)


def _take_fields(register: Register, word: Value) -> Value:
    """The fields of a 32-bit word, side by side."""
    if not register.fields:
        return word
    return Cat(word[field.low : field.low + field.width] for field in register.fields)


def _place_fields(register: Register, fields: Value) -> Value:
    """Inverse of :func:`_take_fields`: the fields at their places, 0 between them."""
    parts, taken, bit = [], 0, 0
    for field in register.fields:
        parts += [Const(0, field.low - bit), fields[taken : taken + field.width]]
        taken, bit = taken + field.width, field.low + field.width
    return Cat(*parts, Const(0, 32 - bit))
