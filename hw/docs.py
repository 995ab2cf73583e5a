# SPDX-License-Identifier: Apache-2.0
"""``python -m hw.docs``: writes the description of the accelerator's interface. ``--check`` only compares.

docs/README.md and docs/attention.md are the pages for people; docs/gristmill.svd and docs/gristmill.h are the register
map for other tools and for C.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from string import Template

from amaranth.hdl import Shape
from amaranth.lib.wiring import Out

from hw.interface.c_header import c_header
from hw.interface.svd import svd
from hw.rtl.control.register_bank import CONTROL_ADDRESS_BITS
from hw.rtl.memory.axi import AxiSignature, lite_signature, read_signature, write_signature
from hw.spec.cli import Parser, run_cli
from hw.spec.config import ATTENTION_K, MAX_N, AcceleratorConfig
from hw.spec.control import registers
from hw.spec.control.descriptor import (
    ADDRESS_BITS,
    ADDRESS_LIMIT,
    BANK_SPAN,
    DATA_ALIGNMENT,
    DESCRIPTOR_WORDS,
    WEIGHT_ALIGNMENT,
    Descriptor,
    DescriptorField,
)
from hw.spec.control.program import DESCRIPTOR_BYTES, PROGRAM_ALIGNMENT
from hw.spec.control.registers import ERROR_TEXTS, REGISTERS, WINDOW_BYTES, Access, Register
from hw.spec.memory.geometry import LayerLayout
from hw.spec.memory.kv_cache import KEY_BITS, LONGEST_CONTEXT, VALUE_GROUP, KeyCache, ValueCache
from hw.spec.numerics.attention import CHUNK
from hw.spec.numerics.block_float import BLOCK
from hw.spec.numerics.vector import PIECE
from hw.spec.ops import ATTENTION, OPS, Op
from hw.spec.ops.epilogue import EPILOGUE_FIELDS, HEAD_UNIT, MAX_HEAD

TEMPLATES = Path(__file__).resolve().parent.parent / "docs"
PAGE = TEMPLATES / "README.md"
_WORD = 32
_SYMBOLIC = {"data": "W", "strb": "W/8"}
"""Widths of a memory port's signals that depend on the config; W is its ``port_width``."""


def _table(head: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], f"|{'---|' * len(head)}", *lines[1:]])


def _bits(low: int, width: int) -> str:
    return f"bit {low}" if width == 1 else f"bits {low + width - 1}:{low}"


# Registers


def _offsets(register: Register) -> str:
    last = register.end - 4
    return f"`{register.offset:#05x}`" + (f" to `{last:#05x}`" if last > register.offset else "")


def _reset(register: Register) -> str:
    """Value after reset of a register that software writes; empty for registers that show the hardware's state."""
    return "" if register.access in (Access.READ, Access.COMMAND) else f"{register.reset:#x}" if register.reset else "0"


def _register_rows() -> Iterator[tuple[str, ...]]:
    for register in REGISTERS:
        size = f", {register.words} words" if register.words > 1 else ", 64 bits" if register.wide else ""
        name = f"**{register.name}**{size}"
        yield _offsets(register), name, register.access.value, _reset(register), register.description
        for field in register.fields:
            yield _bits(field.low, field.width), field.name, "", "", field.description


def register_table() -> str:
    """A table of every register, each followed by its fields."""
    return _table(("offset", "name", "access", "after reset", "meaning"), _register_rows())


def error_table() -> str:
    """A table of every error code."""
    rows = ((str(code.value), code.name, ERROR_TEXTS[code]) for code in registers.ErrorCode)
    return _table(("code", "name", "meaning"), rows)


# Descriptor


def _label(name: str, width: int) -> str:
    """A field's name if it fits, else its first letter."""
    return (name if len(name) <= width else name[0]).center(width)


def descriptor_diagram(fields: Sequence[DescriptorField]) -> str:
    """A diagram of a descriptor's words, two characters per bit, highest bit left. Reserved end words are one."""
    used = max(field.low + field.width for field in fields)
    words = -(-used // _WORD)
    inside = 2 * _WORD - 1
    marks = "".join(f"{bit:<{2 * length}}" for bit, length in ((31, 7), (24, 8), (16, 8), (8, 8), (0, 1)))
    line = f"      +{'-' * inside}+"
    lines = [f"word   {marks.rstrip()}", line]
    for word in range(words):
        cells = reversed([_label(text, 2 * width - 1) for width, text in _cells(fields, word)])
        lines += [f"{word:5} |{'|'.join(cells)}|", line]
    if words < DESCRIPTOR_WORDS:
        last = DESCRIPTOR_WORDS - 1
        lines += [f"{words if words == last else f'{words}-{last}'} |{' ' * inside}|".rjust(len(line)), line]
    return "\n".join(lines)


def _cells(fields: Sequence[DescriptorField], word: int) -> Iterator[tuple[int, str]]:
    """(width, text) of a word's parts in order from bit 0; the text is empty for reserved bits."""
    bit, end = _WORD * word, _WORD * (word + 1)
    for field in fields:
        low, high = max(field.low, bit), min(field.low + field.width, end)
        if low < high:
            if low > bit:
                yield low - bit, ""
            half = "" if field.width <= _WORD else ", low word" if low == field.low else ", high word"
            yield high - low, field.name + half
            bit = high
    if bit < end:
        yield end - bit, ""


def descriptor_table(fields: Sequence[DescriptorField]) -> str:
    """A table of every field of a descriptor."""

    def place(low: int, width: int) -> str:
        first, last = low // _WORD, (low + width - 1) // _WORD
        if last > first:
            return f"words {first} and {last}"
        return f"word {first}" + ("" if width == _WORD else f", {_bits(low % _WORD, width)}")

    rows = ((f"`{field.name}`", place(field.low, field.width), field.text) for field in fields)
    return _table(("field", "place", "meaning"), rows)


def operation(op: Op) -> str:
    """The section of an operation: its diagram, and the fields that are not those of the epilogue."""
    shared = () if op.opcode in ATTENTION else EPILOGUE_FIELDS
    own = [field for field in op.fields if field not in shared]
    heading = f"### Opcode {op.opcode:d}: {op.title}"
    return f"{heading}\n\n```\n{descriptor_diagram(op.fields)}\n```\n\n{descriptor_table(own)}"


def example() -> str:
    """The words of an example descriptor, in hexadecimal."""
    layer = LayerLayout(AcceleratorConfig(), k=896, n=1150, group_size=128)
    descriptor = Descriptor.from_layer(
        layer, 2, activations=0x1000_0000, results=0x1001_0000, weights=0x2000_0000, interrupt=True
    )
    words = descriptor.to_words()
    lines = [" ".join(f"{word:08x}" for word in words[at : at + 8]) for at in range(0, len(words), 8)]
    return "\n".join(f"{8 * at:2}: {line}" for at, line in enumerate(lines))


# Ports


def _signals(prefix: str, signature: AxiSignature, symbols: dict[str, str]) -> list[tuple[str, ...]]:
    """A row for each channel: the signals that the manager drives, and those that the subordinate drives."""
    rows = []
    for channel, member in signature.members.items():
        forward = [
            f"{channel}{name}" + (f"[{symbols.get(name, width)}]" if width > 1 else "")
            for name, width in ((name, Shape.cast(part.shape).width) for name, part in _payload(member))
        ]
        sides = [", ".join([*forward, f"{channel}valid"]), f"{channel}ready"]
        rows.append((f"`{prefix}_*`, {channel.upper()}", *(sides if member.flow == Out else reversed(sides))))
    return rows


def _payload(member) -> Iterable:
    return member.signature.members["payload"].shape


def port_table() -> str:
    """A table of every signal of the AXI ports."""
    rows = _signals("s_axi_ctrl", lite_signature(CONTROL_ADDRESS_BITS), {})
    for half in (read_signature(128), write_signature(128)):
        rows += _signals("m_axi_hp0", half, _SYMBOLIC)
    return _table(("port, channel", "the manager drives", "the subordinate drives"), rows)


# The pages


def cache_table() -> str:
    """A table of the bytes that a position takes in the cache of one KV head."""
    rows = []
    for tile, size, bits in product((16, 32), (64, 128), KEY_BITS):
        config = AcceleratorConfig(tile=tile)
        keys, values = KeyCache(config, size, CHUNK, bits), ValueCache(config, size, CHUNK)
        parts = [cache.layer.beats * config.beat_bytes / CHUNK for cache in (keys, values)]
        parts.append(size // BLOCK)
        rows.append([str(tile), str(size), str(bits), *(f"{part:g}" for part in (*parts, sum(parts)))])
    head = ("tile", "head", "key bits", "keys", "values", "their powers of two", "all, in bytes")
    return _table(head, rows)


def attention_page() -> str:
    """The text of docs/attention.md."""
    values = {
        "operations": "\n\n".join(operation(op) for op in ATTENTION.values()),
        "cache": cache_table(),
        "chunk": CHUNK,
        "attention_max_k": 2 * ATTENTION_K,
        "block": BLOCK,
        "value_group": VALUE_GROUP,
        "longest": f"{LONGEST_CONTEXT:,}",
    }
    return _filled("attention", values)


def _filled(name: str, values: Mapping[str, object]) -> str:
    return Template((TEMPLATES / f"{name}.in.md").read_text()).substitute(values)


def page() -> str:
    """The text of docs/README.md."""
    values = {
        "registers": register_table(),
        "errors": error_table(),
        "operations": "\n\n".join(operation(op) for opcode, op in OPS.items() if opcode not in ATTENTION),
        "epilogue": descriptor_table(EPILOGUE_FIELDS),
        "example": example(),
        "ports": port_table(),
        "address_bits": ADDRESS_BITS,
        "address_limit": f"{ADDRESS_LIMIT:#x}",
        "bank_span": f"{BANK_SPAN:,}",
        "control_address_bits": CONTROL_ADDRESS_BITS,
        "data_alignment": DATA_ALIGNMENT,
        "descriptor_bytes": DESCRIPTOR_BYTES,
        "descriptor_words": DESCRIPTOR_WORDS,
        "identification": f"{registers.IDENTIFICATION:#x}",
        "version": registers.VERSION,
        "head_unit": HEAD_UNIT,
        "max_head": MAX_HEAD,
        "max_n": f"{MAX_N:,}",
        "piece": PIECE,
        "program_alignment": PROGRAM_ALIGNMENT,
        "queue_depth": registers.QUEUE_DEPTH,
        "completions": registers.COMPLETIONS,
        "timeout": f"{registers.DEFAULT_TIMEOUT:,}",
        "weight_alignment": f"{WEIGHT_ALIGNMENT:,}",
        "window_bytes": f"{WINDOW_BYTES:#x}",
        **{f"at_{register.name}": f"{register.offset:#05x}" for register in REGISTERS},
    }
    return _filled("README", values)


def files() -> dict[Path, str]:
    """Path and text of each generated file."""
    texts = {
        PAGE.name: page(),
        "attention.md": attention_page(),
        "gristmill.svd": svd(),
        "gristmill.h": c_header(),
    }
    return {PAGE.with_name(name): text for name, text in texts.items()}


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = Parser(prog="python -m hw.docs", description="Write the pages and headers for registers and descriptor.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is not up to date")
    check = parser.parse_args(arguments).check
    old = {path: text for path, text in files().items() if not path.exists() or path.read_text() != text}
    if check:
        for path in old:
            print(f"error: docs/{path.name} is not up to date; run python -m hw.docs", file=sys.stderr)
        return 1 if old else 0
    for path, text in old.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    run_cli(main)
