# SPDX-License-Identifier: Apache-2.0
"""The epilogue against loops over single values, written for this test from the text of the documentation."""

from itertools import product

import numpy as np
import pytest

from hw.spec.config import ConfigError
from hw.spec.control.descriptor import DATA_ALIGNMENT, VectorDescriptor, result_pitch
from hw.spec.numerics.float32 import add, mul
from hw.spec.numerics.functions import UNIT_BITS, sigma
from hw.spec.numerics.linear import to_float32
from hw.spec.numerics.reciprocal import reciprocal_of_integer, rsqrt
from hw.spec.ops.base import State
from hw.spec.ops.epilogue import FLAGS, float_bits, write_outputs

BYTES = 1 << 18
ADDEND, FACTOR, TABLE, RESULTS, SECOND = 0x2000, 0x8000, 0xA000, 0x10000, 0x20000
EPS = 1e-5
NAMES = [field.name for field in FLAGS]
VALID = [
    flags
    for values in product((0, 1), repeat=len(NAMES))
    if not (flags := dict(zip(NAMES, values, strict=True)))["silu"]
    * (flags["rotary"] + flags["second"] + flags["pieces"] + flags["squares"])
    and not flags["second"] * flags["pieces"]
    and flags["quiet"] <= flags["second"] + flags["pieces"]
]
"""Every set of parts that a descriptor may have."""


class Array:
    """The memory: an array of bytes."""

    def __init__(self, seed: int = 1):
        # Random bits would be huge numbers and NaNs, too.
        values = np.random.default_rng(seed).standard_normal(BYTES // 4).astype(np.float32)
        self.bytes = values.view(np.uint8).copy()

    def view(self, address: int, size: int) -> np.ndarray:
        assert address >= 0 and address + size <= BYTES
        return self.bytes[address : address + size]

    def number(self, address: int) -> np.float32:
        return self.bytes[address : address + 4].view(np.float32)[0]


def scalar(value) -> np.float32:
    return np.float32(np.asarray(value).reshape(()))


def negative(value: np.float32) -> np.float32:
    return (np.float32(value).view(np.uint32) ^ np.uint32(1 << 31)).view(np.float32)


def silu(gate: np.float32, up: np.float32) -> np.float32:
    share = to_float32(sigma(np.array([gate])), np.array([-UNIT_BITS]))[0]
    return scalar(mul(scalar(mul(gate, share)), up))


def row_by_loops(d: dict[str, int], v: list[np.float32], m: int, memory: Array, r: np.ndarray | None):
    """One token: the bits of its results, those of the second output, and r; each None if it is not written."""
    if d["scale"]:
        assert r is not None
        v = [scalar(mul(value, r[m])) for value in v]
    if d["add"]:
        start = d["addend"] + m * d["addend_pitch"]
        v = [scalar(add(value, memory.number(start + 4 * n))) for n, value in enumerate(v)]
    if d["rotary"]:
        start = d["table"] + m * d["table_pitch"]
        for n in range(0, d["rotary_heads"] * d["head"], 2):
            place = start + 4 * (n % d["head"])
            a, b, c, s = v[n], v[n + 1], memory.number(place), memory.number(place + 4)
            v[n] = scalar(add(mul(a, c), negative(scalar(mul(b, s)))))
            v[n + 1] = scalar(add(mul(b, c), mul(a, s)))
    if d["silu"]:
        v = [silu(v[2 * n], v[2 * n + 1]) for n in range(len(v) // 2)]
    second = None
    if d["second"]:
        second = [scalar(mul(value, memory.number(d["factor"] + 4 * n))).view(np.uint32) for n, value in enumerate(v)]
    if d["pieces"]:
        second = []
        for first in range(0, len(v), 256):
            piece = v[first : first + 256]
            best = max(range(len(piece)), key=lambda n, piece=piece: (piece[n], -n))
            second += [piece[best].view(np.uint32), np.uint32(best)]
    sums = [np.float32(0)] * 16
    for n, value in enumerate(v):
        sums[n % 16] = scalar(add(sums[n % 16], mul(value, value)))
    for half in (8, 4, 2, 1):
        sums = [scalar(add(sums[n], sums[n + half])) for n in range(half)]
    mean = mul(sums[0], reciprocal_of_integer(len(v)))
    root = scalar(rsqrt(np.asarray(add(mean, np.float32(EPS)))))
    results = None if d["quiet"] else [value.view(np.uint32) for value in v]
    return results, second, root if d["squares"] else None


def descriptor(tokens: int, n: int, **fields: int) -> dict[str, int]:
    """A descriptor with the operands' usual places: rows at the least pitch, and 16 columns in a head."""
    columns = n >> fields.get("silu", 0)
    second = result_pitch(columns) if fields.get("second") else DATA_ALIGNMENT
    heads = dict(head=16, rotary_heads=n // 16) if fields.get("rotary") else {}
    places = dict(
        addend=ADDEND, addend_pitch=result_pitch(n), factor=FACTOR, table=TABLE, table_pitch=2 * DATA_ALIGNMENT,
        results=RESULTS, result_pitch=result_pitch(columns), second_results=SECOND, second_pitch=second,
        eps=float_bits(EPS), **heads,
    )  # fmt: skip
    made = VectorDescriptor(tokens=tokens, out_features=n, activations=0, source_pitch=0, **places | fields)
    made.to_words()
    return {field.name: getattr(made, field.name) for field in made.op_fields}


def check(d: dict[str, int], seed: int = 1, r: np.ndarray | None = None) -> State:
    """The epilogue of random values, against the loops: all of the memory, and r."""
    values = np.random.default_rng(seed).standard_normal((d["tokens"], d["out_features"])).astype(np.float32)
    memory, expected = Array(seed), Array(seed)
    state, roots = State(r=r), [] if r is None else [*r]
    for m, row in enumerate(values):
        results, second, root = row_by_loops(d, [*row], m, expected, r)
        for bits, address, pitch in ((results, "results", "result_pitch"), (second, "second_results", "second_pitch")):
            if bits is not None:
                raw = np.array(bits, np.uint32).view(np.uint8)
                expected.view(d[address] + m * d[pitch], len(raw))[:] = raw
        if root is not None:
            roots[m : m + 1] = [root]
    write_outputs(d, values, memory, state)
    wrong = np.flatnonzero(memory.bytes != expected.bytes)
    assert not len(wrong), f"{len(wrong)} bytes are wrong, the first at {wrong[0]:#x}"
    assert (state.r is None) == (not roots)
    if roots:
        assert state.r is not None and state.r.dtype == np.float32
        assert state.r.view(np.uint32).tolist() == np.array(roots, np.float32).view(np.uint32).tolist()
    return state


R = np.array([0.7, -1.3, 2.9], np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_one_part(name: str):
    flags = {name: 1} | ({"second": 1} if name == "quiet" else {})
    check(descriptor(3, 288, **flags), r=R)


@pytest.mark.parametrize("start", range(8))
def test_all_combinations(start: int):
    """Every set of parts."""
    assert len(VALID) == 4 * (2 * 5 * 2 + 1)
    for flags in VALID[start::8]:
        check(descriptor(2, 48, **flags), seed=start, r=R)


def test_more_than_one_piece():
    """The last piece may have any number of columns, and a row of pieces takes 8 bytes for each."""
    for n in (1, 255, 256, 257, 513):
        check(descriptor(2, n, pieces=1))
    check(descriptor(2, 1024, pieces=1, quiet=1, add=1))


def test_equal_maxima():
    """The first of equal maxima counts; the position counts from the piece's first column."""
    memory, values = Array(), np.full((1, 600), -1, np.float32)
    values[0, [5, 9, 258, 300, 599]] = 4
    write_outputs(descriptor(1, 600, pieces=1), values, memory, State())
    found = memory.view(SECOND, 24)
    assert found.view(np.float32)[::2].tolist() == [4, 4, 4] and found.view(np.uint32)[1::2].tolist() == [5, 2, 87]


@pytest.mark.parametrize(("head", "heads", "n"), [(16, 1, 64), (16, 3, 64), (64, 1, 64), (64, 2, 200), (32, 2, 64)])
def test_rotary_of_some_heads(head: int, heads: int, n: int):
    check(descriptor(2, n, rotary=1, head=head, rotary_heads=heads))


@pytest.mark.parametrize("name", ["addend_pitch", "table_pitch"])
@pytest.mark.parametrize("pitch", [0, 0x180, 0x400])
def test_pitch_of_operands(name: str, pitch: int):
    """A pitch of 0 is one row for all tokens."""
    check(descriptor(3, 80, add=1, rotary=1, **{name: pitch}))


def test_pitch_of_outputs():
    """Bytes between the rows stay."""
    check(descriptor(3, 40, second=1, result_pitch=0x300, second_pitch=0x500))
    check(descriptor(3, 40, pieces=1, result_pitch=0x300, second_pitch=0x500))


def test_one_token_needs_no_pitch():
    pitches = dict.fromkeys(("result_pitch", "second_pitch", "addend_pitch", "table_pitch"), 0)
    check(descriptor(1, 64, add=1, rotary=1, second=1, **pitches))


def test_r_stays():
    """A descriptor with fewer tokens replaces only their r, and one without ``squares`` replaces none."""
    state = check(descriptor(3, 48, squares=1))
    first = state.r
    assert first is not None
    state = check(descriptor(1, 48, squares=1), seed=2, r=first)
    assert state.r is not None and state.r[0] != first[0] and (state.r[1:] == first[1:]).all()
    assert check(descriptor(2, 48, scale=1), seed=3, r=state.r).r is state.r


def test_scale_before_squares():
    """``scale`` uses the r of earlier descriptors, not the one that the same descriptor computes."""
    check(descriptor(2, 48, scale=1, squares=1), r=R[:2])
    with pytest.raises(AssertionError, match="an earlier descriptor computes r"):
        write_outputs(descriptor(2, 48, scale=1), np.zeros((2, 48), np.float32), Array(), State(r=R[:1]))


def test_special_values():
    """NaN, infinity, zeros and subnormal numbers pass through every part without a warning, with the defined bits."""
    special = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, -1e-40, 3e38], np.float32)
    memory, values = Array(), np.tile(special, (1, 2))
    memory.view(ADDEND, 64).view(np.float32)[:] = np.repeat(special, 2)
    d = descriptor(1, 16, add=1, rotary=1, second=1, squares=1)
    expected = row_by_loops(d, [*values[0]], 0, memory, None)
    state = State()
    write_outputs(d, values, memory, state)
    assert memory.view(RESULTS, 64).view(np.uint32).tolist() == expected[0]
    assert memory.view(SECOND, 64).view(np.uint32).tolist() == expected[1]
    assert state.r is not None and state.r.view(np.uint32).tolist() == np.array([expected[2]]).view(np.uint32).tolist()


def test_units():
    """Values that are no multiple of the unit have no field."""
    with pytest.raises(ConfigError, match=r"^descriptor field addend is a multiple of 128, not 64$"):
        descriptor(1, 16, addend=64)
