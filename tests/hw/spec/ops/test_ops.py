# SPDX-License-Identifier: Apache-2.0
"""One object per opcode: it says all that check, driver, reference and documentation ask, and a second one fits in."""

import pytest

from hw import docs
from hw.spec.control import refusal as refusals
from hw.spec.control.descriptor import DESCRIPTOR_WORDS, FIELDS
from hw.spec.control.registers import ErrorCode
from hw.spec.memory.geometry import fit_layer
from hw.spec.ops import LINEAR, OPS, Op, Wait
from hw.spec.ops.base import DescriptorField, Opcode, opcode_field
from hw.spec.ops.linear import Linear
from hw.spec.presets import preset

CONFIG = preset("small")


class Second(Linear):
    """Like the linear layer, with a bit that the linear layer does not have."""

    opcode = 2  # pyright: ignore[reportAssignmentType]
    title = "second"
    fields = (
        opcode_field(2, title),  # pyright: ignore[reportArgumentType]
        *LINEAR.fields[1:],
        DescriptorField("more", 384, 4, "more of it"),
    )


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.title)
def test_an_op_is_complete(op: Op):
    names = [field.name for field in op.fields]
    assert len(set(names)) == len(names)
    assert [field.low for field in op.fields] == sorted(field.low for field in op.fields)
    assert max(field.low + field.width for field in op.fields) <= 32 * DESCRIPTOR_WORDS
    assert names[0] == "opcode" and op.fields[0].text == f"{op.opcode}: {op.title}"
    assert set(op.bounds(CONFIG)) | set(op.alignments) | set(op.addresses) <= set(names)
    assert {field.name for field in op.fields} <= {field.name for field in FIELDS}


def test_every_opcode_has_an_object():
    assert set(OPS) == set(Opcode)
    assert all(opcode == op.opcode for opcode, op in OPS.items())


def test_what_an_op_makes_is_accepted():
    layer = fit_layer(CONFIG, 64, 8, 32)
    words = LINEAR.from_layer(layer, 2, activations=0x1000, weights=0x10000, results=0x8000).to_words()
    assert refusals.refusal(CONFIG, words) == ErrorCode.NONE
    assert LINEAR.cycles(layer, 2) > layer.beats


def test_waits():
    """Every wait is accepted, and the number that is none is a wrong shape."""
    layer, places = fit_layer(CONFIG, 64, 8, 32), dict(activations=0x1000, weights=0x10000, results=0x8000)
    for wait in Wait:
        words = LINEAR.from_layer(layer, 2, wait=wait, **places).to_words()
        assert words[0] >> 10 & 3 == wait and refusals.refusal(CONFIG, words) == ErrorCode.NONE
    words[0] |= 3 << 10
    assert refusals.refusal(CONFIG, words) == ErrorCode.SHAPE


def test_a_second_opcode(monkeypatch):
    """It is refused until there is an object for it. Then its own fields count, and the documentation has it."""
    layer = fit_layer(CONFIG, 64, 8, 32)
    words = LINEAR.from_layer(layer, 2, activations=0x1000, weights=0x10000, results=0x8000).to_words()
    words[0] += 1
    assert refusals.refusal(CONFIG, words) == ErrorCode.OPCODE
    monkeypatch.setitem(OPS, 2, Second())
    assert refusals.refusal(CONFIG, words) == ErrorCode.NONE
    words[12] = 15
    assert refusals.refusal(CONFIG, words) == ErrorCode.NONE
    words[12] = 16
    assert refusals.refusal(CONFIG, words) == ErrorCode.OPCODE
    assert "2: second" in docs.page() and "more of it" in docs.page()
