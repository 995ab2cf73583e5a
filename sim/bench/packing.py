# SPDX-License-Identifier: Apache-2.0
"""Conversion of numpy arrays to stream payloads and back.

A payload is one unsigned integer per transfer. A field of it holds one value, or equal elements side by side, with
element 0 in the low bits, as in Amaranth's ``ArrayLayout`` and in little-endian numpy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Field", "Layout", "pack_elements", "unpack_elements"]


def pack_elements(values: np.ndarray, bits: int) -> list[int]:
    """Pack ``values[t, i]`` into one integer per row ``t``, element 0 lowest, `bits` bits each (two's complement)."""
    values = np.atleast_2d(np.asarray(values)).astype(np.int64)
    low, high = -(1 << (bits - 1)), (1 << bits) - 1
    if values.size and bits < 63 and (values.min() < low or values.max() > high):
        worst = int(values.min() if values.min() < low else values.max())
        raise ValueError(f"Value {worst} does not fit an element of {bits} bits")
    if bits in (8, 16, 32, 64):
        raw = np.ascontiguousarray(values.astype(f"<i{bits // 8}")).view(np.uint8)
    else:
        # Bits after the 64th are copies of the sign.
        shifts = np.minimum(np.arange(bits), 63)
        bools = ((values[:, :, None] >> shifts) & 1).astype(np.uint8).reshape(len(values), -1)
        raw = np.packbits(bools, axis=1, bitorder="little")
    return [int.from_bytes(row.tobytes(), "little") for row in raw]


def unpack_elements(payloads: Sequence[int], bits: int, count: int, signed: bool = False) -> np.ndarray:
    """Inverse of `pack_elements`: an int64 array ``[len(payloads), count]``."""
    if bits > 64 or (bits == 64 and not signed):
        raise ValueError(f"Elements of {bits} bits do not fit a signed 64-bit integer")
    size = (bits * count + 7) // 8
    raw = np.frombuffer(b"".join(p.to_bytes(size, "little") for p in payloads), np.uint8).reshape(len(payloads), size)
    if bits in (8, 16, 32, 64):
        kind = "i" if signed else "u"
        return np.ascontiguousarray(raw).view(f"<{kind}{bits // 8}").astype(np.int64)
    bools = np.unpackbits(raw, axis=1, bitorder="little")[:, : bits * count].reshape(-1, count, bits).astype(np.int64)
    values = (bools << np.arange(bits)).sum(axis=2)
    return values - (bools[:, :, -1] << bits) if signed else values


@dataclass(frozen=True)
class Field:
    """The place of one field in a payload."""

    offset: int
    width: int
    signed: bool = False


class Layout:
    """The fields of one stream's payload.

    Parameters
    ----------
    fields : mapping of name to (offset, width, signed, ...)
        The entries of the manifest under ``streams``, ``fields``.
    """

    def __init__(self, fields: Mapping[str, Sequence[int]]):
        self.fields = {name: Field(int(o), int(w), bool(s)) for name, (o, w, s, *_) in fields.items()}
        self.width = max((f.offset + f.width for f in self.fields.values()), default=0)

    def pack(self, **values: object) -> list[int]:
        """Payloads of several transfers; fields that are not given are zero.

        A field is a scalar (the same in every transfer), ``[transfers]`` (numpy or Python integers of any size), or
        ``[transfers, elements]``, whose elements share the width of the field equally.
        """
        unknown = set(values) - set(self.fields)
        if unknown:
            raise ValueError(f"Payload has no field {', '.join(sorted(unknown))}; it has {', '.join(self.fields)}")
        lengths = {len(v) for v in values.values() if np.ndim(v)}  # type: ignore[arg-type]
        if len(lengths) > 1:
            raise ValueError(f"Fields describe {' and '.join(map(str, sorted(lengths)))} transfers")
        count = lengths.pop() if lengths else 1
        payloads = [0] * count
        for name, value in values.items():
            field = self.fields[name]
            for index, part in enumerate(self._field_payloads(name, field, value, count)):
                payloads[index] |= part << field.offset
        return payloads

    @staticmethod
    def _field_payloads(name: str, field: Field, value: object, count: int) -> list[int]:
        if np.ndim(value) == 2:  # type: ignore[arg-type]
            elements = np.asarray(value)
            bits, rest = divmod(field.width, elements.shape[1])
            if rest:
                raise ValueError(f"Field {name} of {field.width} bits does not hold {elements.shape[1]} equal elements")
            return pack_elements(elements, bits)
        scalars = [int(v) for v in value] if np.ndim(value) else [int(value)] * count  # type: ignore
        low = -(1 << (field.width - 1)) if field.signed else 0
        high = (1 << (field.width - field.signed)) - 1
        for scalar in scalars:
            if not low <= scalar <= high:
                raise ValueError(f"Value {scalar} does not fit field {name}: {low} to {high}")
        return [scalar & ((1 << field.width) - 1) for scalar in scalars]

    def unpack(self, payloads: Sequence[int], **elements: int) -> dict[str, np.ndarray]:
        """Every field as an array ``[transfers]``, or ``[transfers, n]`` for a field named with ``field=n`` elements.

        Fields wider than an int64 are Python integers in an object array.
        """
        out = {}
        for name, field in self.fields.items():
            mask = (1 << field.width) - 1
            parts = [(payload >> field.offset) & mask for payload in payloads]
            count = elements.get(name)
            if count is not None:
                out[name] = unpack_elements(parts, field.width // count, count, field.signed)
            else:
                if field.signed:
                    half = 1 << (field.width - 1)
                    parts = [(p ^ half) - half for p in parts]
                wide = field.width > (64 if field.signed else 63)
                out[name] = np.array(parts, dtype=object if wide else np.int64)
        return out
