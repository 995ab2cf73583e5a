# SPDX-License-Identifier: Apache-2.0
"""The control port's registers: the single definition for RTL, driver and documentation.

Registers are 32 bits wide, little-endian, at multiples of 4 bytes. A 64-bit register is two of them, low word first;
if only the hardware writes it, reading its low word freezes its high word until the next such read, so that both words
are from the same cycle.

Hardware without the vector unit runs no programs. It does not have the registers and fields with ``programs``.
Hardware without attention does not have the registers with ``attention``, nor its error codes.
"""

import enum
from dataclasses import dataclass, replace
from functools import cache

from hw.spec.config import AcceleratorConfig
from hw.spec.control.descriptor import DESCRIPTOR_WORDS
from hw.spec.control.program import LENGTH_BITS, PROGRAM_ALIGNMENT
from hw.spec.memory.access import BURST_BOUNDARY

IDENTIFICATION = int.from_bytes(b"GRST", "big")
"""The value of the first register."""
VERSION = 2
"""Version of the registers and the descriptor: hardware of another version needs another driver."""
QUEUE_DEPTH = 16
"""Depth of the descriptor queue."""
COMPLETIONS = 32
"""Number of completions whose cycles the hardware stores. Software keeps at most this many descriptors in flight."""
DEFAULT_TIMEOUT = 1 << 20
"""Timeout in cycles: 4 ms at 250 MHz, a thousand times the latency of a memory."""
WINDOW_BYTES = 0x200
"""Size of the register space in bytes; accesses beyond it get DECERR."""


_ONLY = "; only with operators decoder"
_ONLY_ATTENTION = "; only with score_words"


class ErrorCode(enum.IntEnum):
    """The reason why the accelerator stopped. Only a reset starts it again."""

    NONE = 0
    OPCODE = 1
    SHAPE = 2
    NON_FINITE = 3
    EXPONENT = 4
    READ_BUS = 5
    WRITE_BUS = 6
    READ_TIMEOUT = 7
    WRITE_TIMEOUT = 8
    UNDERRUN = 9
    PROGRAM = 10
    CACHE = 11


ERROR_TEXTS = {
    ErrorCode.NONE: "no error",
    ErrorCode.OPCODE: "the hardware does not have the descriptor's opcode, or a reserved bit is set",
    ErrorCode.SHAPE: "the descriptor's shape is impossible on this hardware, or contradicts itself",
    ErrorCode.NON_FINITE: "an activation is infinite or not a number",
    ErrorCode.EXPONENT: "a token's exponent does not fit its 8 bits",
    ErrorCode.READ_BUS: "memory answered a read with SLVERR or DECERR",
    ErrorCode.WRITE_BUS: "memory answered a write with SLVERR or DECERR",
    ErrorCode.READ_TIMEOUT: "memory did not answer a read in time",
    ErrorCode.WRITE_TIMEOUT: "memory did not answer a write in time",
    ErrorCode.UNDERRUN: "the core read a scale before it was available: an error of the hardware",
    ErrorCode.PROGRAM: "a program's address is too high, or not a multiple of its alignment",
    ErrorCode.CACHE: "an append to a KV cache outside of the addresses from cache_first to cache_end" + _ONLY_ATTENTION,
}
OF_ATTENTION = frozenset((ErrorCode.CACHE,))
"""Errors that only hardware with attention has; the last codes."""
ONE_DESCRIPTOR = frozenset((ErrorCode.OPCODE, ErrorCode.SHAPE, ErrorCode.NON_FINITE, ErrorCode.EXPONENT))
"""Errors of one descriptor, whose index is in the register ``failed``. After other errors it has that of the last one
that was begun."""


class Access(enum.Enum):
    """The access of software to a register."""

    READ = "read"
    """Only the hardware writes it."""
    READ_WRITE = "read, write"
    """It holds the value that software wrote."""
    COMMAND = "write"
    """Every bit that is written as 1 has an effect once; it reads as 0."""
    CLEAR = "read, write 1 to clear"
    """The hardware sets bits; software clears bits by writing 1 to them."""


CACHE_UNIT = BURST_BOUNDARY
"""Bytes of a unit of the registers cache_first and cache_end."""


@dataclass(frozen=True)
class Field:
    """Bits ``low`` to ``low + width - 1`` of a register. programs: only in hardware that runs programs."""

    name: str
    low: int
    width: int
    text: str
    programs: bool = False

    @property
    def description(self) -> str:
        """The text, and which hardware has it."""
        return self.text + _ONLY * self.programs

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
    reset : value after reset, if it is a constant
    wide : 64 bits, low word first
    programs : only in hardware that runs programs
    attention : only in hardware with attention
    """

    name: str
    offset: int
    access: Access
    text: str
    fields: tuple[Field, ...] = ()
    reset: int = 0
    words: int = 1
    wide: bool = False
    programs: bool = False
    attention: bool = False

    @property
    def description(self) -> str:
        """The text, and which hardware has it."""
        return self.text + _ONLY * self.programs + _ONLY_ATTENTION * self.attention

    @property
    def end(self) -> int:
        """Offset of the next register."""
        return self.offset + 4 * self.words * (2 if self.wide else 1)

    def field(self, name: str) -> Field:
        """A field by its name; raises KeyError."""
        for item in self.fields:
            if item.name == name:
                return item
        raise KeyError(f"register {self.name} has no field {name}")


def _flags(*names_and_texts: str) -> tuple[Field, ...]:
    pairs = zip(names_and_texts[::2], names_and_texts[1::2], strict=True)
    return tuple(Field(name, index, 1, text) for index, (name, text) in enumerate(pairs))


_R, _RW, _W, _W1C = Access.READ, Access.READ_WRITE, Access.COMMAND, Access.CLEAR

REGISTERS: tuple[Register, ...] = (
    Register("identification", 0x000, _R, f"{IDENTIFICATION:#x}, \"GRST\": this is a Gristmill accelerator"),
    Register("version", 0x004, _R, "version of this register map and of the descriptor"),
    Register("config_digest", 0x008, _R, "first 32 bits of the config's SHA-256: software must have the same config"),
    Register("capabilities", 0x00C, _R, "sizes for the driver", (
        Field("queue_depth", 0, 8, "descriptors that the queue holds"),
        Field("completions", 8, 8, "entries of completion_cycles"),
        Field("ports", 16, 8, "memory ports"),
        Field("outstanding", 24, 8, "bursts that a port may have under way"),
    )),
    Register("control", 0x010, _W, "commands", (
        *_flags(
            "push", "queue the descriptor in the window; ignored while the queue is full, fetching or resetting",
            "reset",
            "stop, wait until memory has answered all requests, then clear everything but this port's settings",
            "clear_counters", "set all counters but cycles to 0",
        ),
        Field("start", 3, 1, "fetch and run the program; ignored while fetching or resetting, and if its length is 0",
              programs=True),
    )),
    Register("status", 0x014, _R, "state of the accelerator", (
        *_flags("running", "descriptors are queued or in flight, or a program is fetched",
                "resetting", "a reset waits until memory has answered all requests",
                "error", "stopped; see error_code"),
        Field("fetching", 3, 1, "not all descriptors of the program are in the queue yet", programs=True),
        Field("queued", 8, 8, "descriptors in the queue"),
    )),
    Register("interrupt_pending", 0x018, _W1C, "causes of the interrupt line", _flags(
        "done", "a descriptor with its interrupt flag set is complete",
        "error", "the accelerator has stopped",
    )),
    Register("interrupt_enable", 0x01C, _RW, "causes that raise the interrupt line", _flags(
        "done", "see interrupt_pending", "error", "see interrupt_pending")),
    Register("completed", 0x020, _R, "completed descriptors (results in memory) since the last reset, modulo 2^32"),
    Register("error_code", 0x024, _R, "reason of the stop: see the table of error codes"),
    Register("error_address", 0x028, _R, "address of the burst for bus errors and timeouts, of the activations if they"
             " are faulty, else 0", wide=True),
    Register("timeout", 0x030, _RW, "a port with transfers under way and no progress for this many cycles is an error;"
             " 0: never", reset=DEFAULT_TIMEOUT),
    Register("reads_under_way", 0x034, _R, "read bursts requested and not yet complete", tuple(
        Field(f"port_{port}", 8 * port, 8, f"of port {port}") for port in range(4))),
    Register("writes_under_way", 0x038, _R, "write bursts not yet acknowledged"),
    Register("started", 0x03C, _R, "low word of cycles when status.running last became 1"),
    Register("cycles", 0x040, _R, "free-running cycle counter; only the reset pin clears it", wide=True),
    Register("busy", 0x048, _R, "cycles in which status.running was 1", wide=True),
    Register("beats", 0x050, _R, "beats of the weight stream that the core took", wide=True),
    Register("starved_weights", 0x058, _R, "cycles in which no beat moved and the array did not work, because weights"
             " were missing", wide=True),
    Register("starved_activations", 0x060, _R, "the same, because activations were missing", wide=True),
    Register("starved_output", 0x068, _R, "the same, because results could not leave", wide=True),
    Register("descriptor", 0x080, _RW, "the window for the descriptor that push queues", words=DESCRIPTOR_WORDS),
    Register("program_address", 0x0C0, _RW, f"address of the program, a multiple of {PROGRAM_ALIGNMENT}", wide=True,
             programs=True),
    Register("program_length", 0x0C8, _RW, "length of the program", (
        Field("descriptors", 0, LENGTH_BITS, "number of its descriptors"),
    ), programs=True),
    Register("failed", 0x0CC, _R, "after an error: the descriptor that failed, or the last one that was begun", (
        Field("index", 0, LENGTH_BITS, f"counted from its program's start or the reset, modulo 2^{LENGTH_BITS}"),
    ), programs=True),
    Register("cache_first", 0x0D0, _RW, f"first address to which appends to KV caches write, in units of"
             f" {CACHE_UNIT:,} bytes", attention=True),
    Register("cache_end", 0x0D4, _RW, f"address after the last one to which they write, in units of {CACHE_UNIT:,}"
             " bytes; with 0 they write nothing", attention=True),
    Register("completion_cycles", 0x100, _R, "entry c modulo 32: low word of cycles when descriptor c was complete",
             words=COMPLETIONS),
)  # fmt: skip
"""The complete map, in order of offsets: that of hardware with attention."""

BY_NAME = {register.name: register for register in REGISTERS}


EVENTS = ("busy", "beats", "starved_weights", "starved_activations", "starved_output")
"""Registers that count events; control.clear_counters clears them."""


@cache
def registers_of(config: AcceleratorConfig) -> tuple[Register, ...]:
    """The registers, with the fields, that hardware of this config has."""
    return tuple(
        replace(item, fields=tuple(field for field in item.fields if config.has_programs or not field.programs))
        for item in REGISTERS
        if (config.has_programs or not item.programs) and (config.has_attention or not item.attention)
    )


@cache
def errors_of(config: AcceleratorConfig) -> tuple[ErrorCode, ...]:
    """The error codes that hardware of this config has, in order, from 0 on."""
    return tuple(code for code in ErrorCode if config.has_attention or code not in OF_ATTENTION)


def offset(name: str, word: int = 0) -> int:
    """Offset in bytes of a register's word."""
    register = BY_NAME[name]
    if not 0 <= 4 * word < register.end - register.offset:
        raise IndexError(f"register {name} has no word {word}")
    return register.offset + 4 * word


def config_digest(config: AcceleratorConfig) -> int:
    """The value of register config_digest."""
    return int(config.digest[:8], 16)
