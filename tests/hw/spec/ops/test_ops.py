# SPDX-License-Identifier: Apache-2.0
"""One object per opcode: it says all that check, driver, reference and documentation ask, and another one fits in."""

import pytest

from hw import docs
from hw.spec.control import refusal as refusals
from hw.spec.control.descriptor import DESCRIPTOR_WORDS, FIELDS, Descriptor
from hw.spec.control.registers import ErrorCode
from hw.spec.memory.geometry import fit_layer
from hw.spec.ops import ATTENTION, LINEAR, OPS, Op
from hw.spec.ops.base import COMMON_FIELDS, DescriptorField, Opcode, in_order, opcode_field
from hw.spec.ops.epilogue import EPILOGUE_FIELDS
from hw.spec.ops.linear import Linear
from hw.spec.presets import preset

CONFIG = preset("small")


class Third(Linear):
    """Like the linear layer, with a bit that the linear layer does not have."""

    opcode = 9  # pyright: ignore[reportAssignmentType]
    title = "third"
    fields = in_order(
        [opcode_field(9, title)],  # pyright: ignore[reportArgumentType]
        LINEAR.fields[1:],
        [DescriptorField("more", 93, 2, "more of it")],
    )


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.title)
def test_an_op_is_complete(op: Op):
    names = [field.name for field in op.fields]
    assert len(set(names)) == len(names)
    assert [field.low for field in op.fields] == sorted(field.low for field in op.fields)
    assert max(field.low + field.width for field in op.fields) <= 32 * DESCRIPTOR_WORDS
    assert names[0] == "opcode" and op.fields[0].text == f"{op.opcode}: {op.title}"
    assert set(op.bounds(CONFIG)) <= set(names)
    epilogue = () if op.opcode in ATTENTION else EPILOGUE_FIELDS
    assert all(field in op.fields for field in (*op.fields_of(CONFIG), *epilogue, *COMMON_FIELDS))
    assert {field.name for field in op.fields} <= {field.name for field in FIELDS}


def test_every_opcode_has_an_object():
    assert set(OPS) == set(Opcode)
    assert all(opcode == op.opcode for opcode, op in OPS.items())


def test_what_an_op_makes_is_accepted():
    layer = fit_layer(CONFIG, 64, 8, 32)
    words = Descriptor.from_layer(layer, 2, activations=0x1000, weights=0x10000, results=0x8000).to_words()
    assert refusals.refusal(CONFIG, words) == ErrorCode.NONE
    assert LINEAR.cycles(layer, 2) > layer.beats


def test_another_opcode(monkeypatch):
    """It is refused until there is an object for it. Then its own fields count, and the documentation has it."""
    layer = fit_layer(CONFIG, 64, 8, 32)
    words = Descriptor.from_layer(layer, 2, activations=0x1000, weights=0x10000, results=0x8000).to_words()
    words[0] += 8
    assert refusals.refusal(CONFIG, words) == ErrorCode.OPCODE
    monkeypatch.setitem(OPS, 9, Third())
    assert refusals.refusal(CONFIG, words) == ErrorCode.NONE
    words[2] |= 3 << 29
    assert refusals.refusal(CONFIG, words) == ErrorCode.NONE
    words[2] |= 1 << 31
    assert refusals.refusal(CONFIG, words) == ErrorCode.OPCODE
    assert "9: third" in docs.page() and "more of it" in docs.page()
