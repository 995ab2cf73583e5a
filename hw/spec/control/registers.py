# SPDX-License-Identifier: Apache-2.0
"""The control port's registers: what the RTL builds, the driver reads and writes, and the documentation lists.

Registers are 32 bits wide, little-endian, at multiples of 4 bytes. A 64-bit register is two of them, low word first;
reading its low word freezes its high word until the next such read, so that the pair is of one moment.
"""

import enum
from dataclasses import dataclass

from hw.spec.config import AcceleratorConfig
from hw.spec.control.descriptor import DESCRIPTOR_WORDS

IDENTIFICATION = int.from_bytes(b"GRST", "big")
"""What the first register holds."""
VERSION = 1
"""Of the registers and the descriptor: hardware of another version needs another driver."""
QUEUE_DEPTH = 16
"""Descriptors that wait to be started."""
COMPLETIONS = 32
"""Completions whose cycle the hardware remembers. Software keeps no more descriptors queued and in flight."""
DEFAULT_TIMEOUT = 1 << 20
"""Cycles: 4 ms at 250 MHz, a thousand times what a memory takes."""
WINDOW_BYTES = 0x200
"""Size of the register space; accesses beyond get a DECERR."""


class ErrorCode(enum.IntEnum):
    """Why the accelerator stopped. Only a reset starts it again."""

    NONE = 0
    OPCODE = 1
    SHAPE = 2
    ALIGNMENT = 3
    NON_FINITE = 4
    EXPONENT = 5
    READ_BUS = 6
    WRITE_BUS = 7
    READ_TIMEOUT = 8
    WRITE_TIMEOUT = 9
    UNDERRUN = 10


ERROR_TEXTS = {
    ErrorCode.NONE: "no error",
    ErrorCode.OPCODE: "the descriptor's opcode is unknown, or a reserved bit of it is set",
    ErrorCode.SHAPE: "the descriptor's shape is impossible on this hardware, or contradicts itself",
    ErrorCode.ALIGNMENT: "an address or a pitch in the descriptor is not aligned, or too high",
    ErrorCode.NON_FINITE: "an activation is infinite or not a number",
    ErrorCode.EXPONENT: "a token's exponent does not fit its 8 bits",
    ErrorCode.READ_BUS: "memory answered a read with SLVERR or DECERR",
    ErrorCode.WRITE_BUS: "memory answered a write with SLVERR or DECERR",
    ErrorCode.READ_TIMEOUT: "memory did not answer a read in time",
    ErrorCode.WRITE_TIMEOUT: "memory did not answer a write in time",
    ErrorCode.UNDERRUN: "the core read a scale before it was there: a fault of the hardware",
}


class Access(enum.Enum):
    """What software may do with a register."""

    READ = "read"
    """Written by the hardware alone."""
    READ_WRITE = "read, write"
    """Holds what software wrote."""
    COMMAND = "write"
    """Every bit written as 1 does something once; reads as 0."""
    CLEAR = "read, write 1 to clear"
    """Set by the hardware, cleared bit by bit by writing 1."""


@dataclass(frozen=True)
class Field:
    """Bits ``low`` to ``low + width - 1`` of a register."""

    name: str
    low: int
    width: int
    text: str

    def get(self, value: int) -> int:
        """The field's part of a register's value."""
        return value >> self.low & ((1 << self.width) - 1)

    @property
    def mask(self) -> int:
        """A register's value with all bits of this field set."""
        return ((1 << self.width) - 1) << self.low


@dataclass(frozen=True)
class Register:
    """One register, or a run of ``words`` equal ones.

    Attributes
    ----------
    offset : bytes from the start of the control port's address space
    reset : value after reset, where that is a constant
    wide : 64 bits, low word first
    """

    name: str
    offset: int
    access: Access
    text: str
    fields: tuple[Field, ...] = ()
    reset: int = 0
    words: int = 1
    wide: bool = False

    @property
    def end(self) -> int:
        """Offset of what follows."""
        return self.offset + 4 * self.words * (2 if self.wide else 1)

    def field(self, name: str) -> Field:
        """A field by its name; raises KeyError."""
        for item in self.fields:
            if item.name == name:
                return item
        raise KeyError(f"register {self.name} has no field {name}")


def _flags(*names_and_texts: str, low: int = 0) -> tuple[Field, ...]:
    pairs = zip(names_and_texts[::2], names_and_texts[1::2], strict=True)
    return tuple(Field(name, low + index, 1, text) for index, (name, text) in enumerate(pairs))


_R, _RW, _W, _W1C = Access.READ, Access.READ_WRITE, Access.COMMAND, Access.CLEAR

REGISTERS: tuple[Register, ...] = (
    Register("identification", 0x000, _R, f"{IDENTIFICATION:#x}, \"GRST\": this is a Gristmill accelerator"),
    Register("version", 0x004, _R, "version of this register map and of the descriptor"),
    Register("config_digest", 0x008, _R, "first 32 bits of the config's SHA-256: software refuses another hardware"),
    Register("capabilities", 0x00C, _R, "sizes that software adapts to", (
        Field("queue_depth", 0, 8, "descriptors that the queue holds"),
        Field("completions", 8, 8, "entries of completion_cycles"),
        Field("ports", 16, 8, "memory ports"),
        Field("outstanding", 24, 8, "bursts that a port may have under way"),
    )),
    Register("control", 0x010, _W, "commands", _flags(
        "push", "queue the descriptor in the window; ignored while the queue is full or resetting",
        "reset", "stop, let the memory finish what is under way, then forget everything but this port's settings",
        "clear_counters", "set all counters but cycles to 0",
    )),
    Register("status", 0x014, _R, "what the accelerator is doing", (
        *_flags("running", "descriptors are queued or in flight",
                "resetting", "a reset waits for the memory to finish what is under way",
                "error", "stopped; see error_code"),
        Field("queued", 8, 8, "descriptors in the queue"),
    )),
    Register("interrupt_pending", 0x018, _W1C, "causes of the interrupt line", _flags(
        "done", "a descriptor with its interrupt flag set is complete",
        "error", "the accelerator has stopped",
    )),
    Register("interrupt_enable", 0x01C, _RW, "which causes raise the interrupt line", _flags(
        "done", "see interrupt_pending", "error", "see interrupt_pending")),
    Register("completed", 0x020, _R, "descriptors completed since the last reset, modulo 2^32: results are in memory"),
    Register("error_code", 0x024, _R, "why it stopped: see the table of error codes"),
    Register("error_address", 0x028, _R, "for bus errors and timeouts the burst's address, for faulty activations"
             " theirs, else 0", wide=True),
    Register("timeout", 0x030, _RW, "cycles without any progress of a port that has transfers under way until that is"
             " an error; 0: never", reset=DEFAULT_TIMEOUT),
    Register("reads_under_way", 0x034, _R, "read bursts asked for and not yet complete", tuple(
        Field(f"port_{port}", 8 * port, 8, f"of port {port}") for port in range(4))),
    Register("writes_under_way", 0x038, _R, "write bursts not yet acknowledged"),
    Register("started", 0x03C, _R, "low word of cycles when status.running last became 1"),
    Register("cycles", 0x040, _R, "free-running cycle counter; only the reset pin clears it", wide=True),
    Register("busy", 0x048, _R, "cycles with a descriptor queued or in flight", wide=True),
    Register("beats", 0x050, _R, "beats of the weight stream that the core took", wide=True),
    Register("starved_weights", 0x058, _R, "cycles in which neither a beat moved nor the array worked, because weights"
             " were not there", wide=True),
    Register("starved_activations", 0x060, _R, "the same, because activations were not there", wide=True),
    Register("starved_output", 0x068, _R, "the same, because results could not leave", wide=True),
    Register("descriptor", 0x080, _RW, "the window that push takes", words=DESCRIPTOR_WORDS),
    Register("completion_cycles", 0x100, _R, "entry c modulo 32: low word of cycles when descriptor c was complete",
             words=COMPLETIONS),
)  # fmt: skip
"""The whole map, in order of offsets."""

BY_NAME = {register.name: register for register in REGISTERS}


EVENTS = ("busy", "beats", "starved_weights", "starved_activations", "starved_output")
"""Registers that count events, and that control.clear_counters clears."""


def offset(name: str, word: int = 0) -> int:
    """Offset in bytes of a register's word."""
    register = BY_NAME[name]
    if not 0 <= 4 * word < register.end - register.offset:
        raise IndexError(f"register {name} has no word {word}")
    return register.offset + 4 * word


def config_digest(config: AcceleratorConfig) -> int:
    """What register config_digest holds."""
    return int(config.digest[:8], 16)
