# SPDX-License-Identifier: Apache-2.0
"""The register map: no overlaps, and the RTL can build it."""

import pytest

from hw.rtl.control.register_bank import CONTROL_ADDRESS_BITS, RegisterBank
from hw.spec.config import OPERATORS, AcceleratorConfig
from hw.spec.control import registers
from hw.spec.control.registers import (
    BY_NAME,
    ERROR_TEXTS,
    REGISTERS,
    WINDOW_BYTES,
    Access,
    ErrorCode,
    Register,
    errors_of,
    registers_of,
)

WITH_FIELDS = [register for register in REGISTERS if register.fields]


def test_offsets_ascend_without_overlap():
    end = 0
    for register in REGISTERS:
        assert register.offset >= end, register.name
        assert register.offset % (8 if register.wide else 4) == 0, register.name
        end = register.end
        assert end - register.offset == 4 * (2 if register.wide else register.words)
    assert end <= WINDOW_BYTES <= 1 << CONTROL_ADDRESS_BITS


def test_names_are_unique():
    assert len(BY_NAME) == len(REGISTERS)
    for register in WITH_FIELDS:
        assert len({field.name for field in register.fields}) == len(register.fields), register.name


@pytest.mark.parametrize("register", WITH_FIELDS, ids=lambda register: register.name)
def test_fields_fit(register: Register):
    """Fields are ascending, disjoint and within the word: the sum of their masks has as many bits as they have."""
    lows = [field.low for field in register.fields]
    assert lows == sorted(lows)
    union = 0
    for field in register.fields:
        assert union & field.mask == 0, field.name
        union |= field.mask
        assert field.mask == ((1 << field.width) - 1) << field.low
        assert field.get(field.mask) == (1 << field.width) - 1
        assert field.get(0xFFFF_FFFF & ~field.mask) == 0
    assert union < 1 << 32
    assert union.bit_count() == sum(field.width for field in register.fields)
    assert not register.wide and register.words == 1
    assert register.reset & ~union == 0


def test_kinds_of_registers():
    """Properties that the register bank relies on."""
    for register in REGISTERS:
        assert register.text
        if register.access in (Access.COMMAND, Access.CLEAR):
            assert register.fields and register.reset == 0, register.name
        if register.access is Access.READ:
            assert register.reset == 0, register.name
        if register.words > 1:
            assert not register.wide and register.reset == 0, register.name
        assert register.reset < 1 << (64 if register.wide else 32)


@pytest.mark.parametrize("operators", OPERATORS)
def test_bank_has_a_member_for_every_register(operators: str):
    config = AcceleratorConfig(operators=operators)
    bank, names = RegisterBank(config), {register.name for register in registers_of(config)}
    # Amaranth warns of components that are thrown away unused, as this one is on purpose.
    bank._MustUse__silence = True
    members = set(bank.signature.members)
    assert names <= members
    extra = {"ctrl", "forget"}
    extra |= {f"set_{r.name}" for r in REGISTERS if r.access is Access.CLEAR}
    extra |= {f"{r.name}_index" for r in REGISTERS if r.access is Access.READ and r.words > 1}
    assert members - names == extra


def test_registers_of_programs():
    """Hardware without programs has neither their registers nor their fields, and all others at the same places."""
    decoder = {register.name for register in registers_of(AcceleratorConfig(operators="decoder"))}
    linear = {register.name: register for register in registers_of(AcceleratorConfig(operators="linear"))}
    assert decoder - set(linear) == {"program_address", "program_length", "failed"}
    gone = {
        (name, field.name)
        for name, register in linear.items()
        for field in set(BY_NAME[name].fields) - set(register.fields)
    }
    assert gone == {("control", "start"), ("status", "fetching")}
    assert all(register.offset == BY_NAME[name].offset for name, register in linear.items())


def test_registers_of_attention():
    """Hardware without attention has neither its registers nor its error."""
    decoder, attention = AcceleratorConfig(operators="decoder"), AcceleratorConfig(operators="decoder", score_words=64)
    assert registers_of(attention) == REGISTERS
    gone = set(BY_NAME) - {register.name for register in registers_of(decoder)}
    assert gone == {"cache_first", "cache_end"}
    assert all(BY_NAME[name].reset == 0 for name in gone), "nothing can be written before software allows it"
    assert errors_of(attention) == tuple(ErrorCode)
    assert errors_of(decoder) == tuple(ErrorCode)[:-1]
    assert set(errors_of(attention)) - set(errors_of(decoder)) == {ErrorCode.CACHE}


def test_offset_and_field_by_name():
    for register in REGISTERS:
        count = (register.end - register.offset) // 4
        assert [registers.offset(register.name, word) for word in range(count)] == [
            *range(register.offset, register.end, 4)
        ]
        for word in (-1, count):
            with pytest.raises(IndexError, match=f"^register {register.name} has no word {word}$"):
                registers.offset(register.name, word)
        for field in register.fields:
            assert register.field(field.name) is field
        with pytest.raises(KeyError, match=f"register {register.name} has no field colour"):
            register.field("colour")
    with pytest.raises(KeyError, match="colour"):
        registers.offset("colour")


def test_values_fit_where_they_are_read():
    capabilities, completions = BY_NAME["capabilities"], BY_NAME["completion_cycles"]
    for name, value in dict(queue_depth=registers.QUEUE_DEPTH, completions=registers.COMPLETIONS, ports=4).items():
        assert value < 1 << capabilities.field(name).width
    assert BY_NAME["status"].field("queued").get(0xFFFF_FFFF) >= registers.QUEUE_DEPTH
    assert completions.words == registers.COMPLETIONS > registers.QUEUE_DEPTH
    assert registers.IDENTIFICATION.to_bytes(4, "big") == b"GRST"


def test_every_error_code_has_a_text():
    assert set(ERROR_TEXTS) == set(ErrorCode)
    assert all(ERROR_TEXTS.values()) and len(set(ERROR_TEXTS.values())) == len(ErrorCode)


def test_config_digest_differs_between_configs():
    digests = [registers.config_digest(AcceleratorConfig(tile=tile)) for tile in (4, 8, 16, 32)]
    assert len(set(digests)) == 4
    assert all(0 <= digest < 1 << 32 for digest in digests)
    assert f"{digests[2]:08x}" == AcceleratorConfig().digest[:8]
