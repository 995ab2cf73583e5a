# SPDX-License-Identifier: Apache-2.0
"""The register map as SVD and as C header: valid, complete, and equal to hw.spec."""

import subprocess
from pathlib import Path

import cmsis_svd
import pytest
from lxml import etree  # pyright: ignore[reportAttributeAccessIssue]  # compiled, without type stubs

from hw.interface.c_header import c_header
from hw.interface.svd import svd
from hw.spec.config import AcceleratorConfig
from hw.spec.control.descriptor import (
    DATA_ALIGNMENT,
    DESCRIPTOR_WORDS,
    WEIGHT_ALIGNMENT,
    Descriptor,
    VectorDescriptor,
    Wait,
)
from hw.spec.control.registers import REGISTERS, Access, ErrorCode
from hw.spec.memory.geometry import LayerLayout
from hw.spec.ops import OPS
from sim.bench.descriptors import AnyDescriptor, op_of

SCHEMA = Path(str(cmsis_svd.__file__)).parent / "schemas" / "CMSIS-SVD_1_3_10.xsd"
COMPILERS = (("gcc", "c", "-std=c99"), ("g++", "c++", "-std=c++11"))
EPILOGUE: dict[str, int] = dict(
    scale=1, add=1, rotary=1, quiet=1, second=1, squares=1, head=64, rotary_heads=0x9A5, result_pitch=0x12_3480,
    addend=0x7B_1000_0080, addend_pitch=0x100_0080, second_pitch=0x10_0080, factor=0x45_6789_0100,
    second_results=0x12_3456_7880, table=0x1_0000_0000, table_pitch=0x1FF_FF80, eps=0x3586_37BD,
)  # fmt: skip
EXAMPLES: tuple[AnyDescriptor, ...] = (
    Descriptor.from_layer(
        LayerLayout(AcceleratorConfig(), k=896, n=1150, group_size=128),
        2,
        activations=0x21_1000_0080,
        results=0x32_1001_0000,
        weights=0x13_2000_0000,
        reuse=True,
        interrupt=True,
        wait=Wait.WEIGHTS,
        **EPILOGUE,
    ),
    VectorDescriptor(
        tokens=200,
        out_features=1 << 18,
        activations=0x21_1000_0080,
        source_pitch=0x100_0080,
        results=0x32_1001_0000,
        wait=Wait.ACTIVATIONS,
        **EPILOGUE,
    ),
)


@pytest.fixture(scope="module")
def tree():
    """The SVD; it is validated with CMSIS' own schema."""
    parsed = etree.fromstring(svd().encode())
    etree.XMLSchema(etree.parse(str(SCHEMA))).assertValid(parsed)
    return parsed


def test_schema_refuses_another_order(tree):
    """The order of elements is easily wrong, and the schema checks it."""
    changed = etree.fromstring(svd().encode())
    register = changed.find(".//register")
    register.append(register.find("name"))
    schema = etree.XMLSchema(etree.parse(str(SCHEMA)))
    assert not schema.validate(changed)


def test_svd_has_every_word_once(tree):
    found = {}
    for register in tree.iterfind(".//register"):
        count = int(register.findtext("dim", "1"))
        for index in range(count):
            offset = int(register.findtext("addressOffset"), 16) + index * int(register.findtext("dimIncrement", "0"))
            assert offset not in found
            found[offset] = register.findtext("name").replace("[%s]", "")
    expected = {}
    for register in REGISTERS:
        halves = ("_low", "_high") if register.wide else ("",)
        names = [register.name + half for _ in range(register.words) for half in halves]
        expected |= {register.offset + 4 * index: name for index, name in enumerate(names)}
    assert found == expected


def test_svd_fields_resets_and_errors(tree):
    by_name = {register.findtext("name"): register for register in tree.iterfind(".//register")}
    for register in REGISTERS:
        if register.wide or register.words > 1 or register.name == "error_code":
            continue
        element = by_name[register.name]
        fields = [(f.findtext("name"), f.findtext("bitOffset"), f.findtext("bitWidth")) for f in element.iter("field")]
        assert fields == [(field.name, str(field.low), str(field.width)) for field in register.fields]
        if register.access is not Access.READ:
            assert int(element.findtext("resetValue"), 16) == register.reset
            assert element.findtext("resetMask") == "0xffffffff"
        assert (element.findtext("modifiedWriteValues") == "oneToClear") == (register.access is Access.CLEAR)
    values = by_name["error_code"].iter("enumeratedValue")
    assert {value.findtext("name"): int(value.findtext("value")) for value in values} == dict(ErrorCode.__members__)


def expressions() -> dict[str, int]:
    """C expressions and their expected values."""
    values: dict[str, int] = {f"GRISTMILL_ERROR_{code.name}": code for code in ErrorCode}
    values |= {f"GRISTMILL_OPCODE_{opcode.name}": opcode for opcode in OPS}
    values["GRISTMILL_DESCRIPTOR_WORDS"] = DESCRIPTOR_WORDS
    values |= {"GRISTMILL_WEIGHT_UNIT": WEIGHT_ALIGNMENT, "GRISTMILL_DATA_UNIT": DATA_ALIGNMENT}
    for register in REGISTERS:
        name = register.name.upper()
        values[f"GRISTMILL_REG_{name}"] = register.offset
        for field in register.fields:
            values[f"GRISTMILL_{name}_{field.name.upper()}_SHIFT"] = field.low
            values[f"GRISTMILL_{name}_{field.name.upper()}_MASK"] = field.mask
    return values


def run(folder: Path, compiler: tuple[str, str, str], lines: list[str]) -> list[int]:
    """The output of a program, one number per line."""
    program, language, standard = compiler
    (folder / "gristmill.h").write_text(c_header())
    body = "\n    ".join(lines)
    source = folder / "main.c"
    source.write_text(
        f'#include "gristmill.h"\n#include <stdio.h>\n\nint main(void) {{\n    {body}\n    return 0;\n}}\n'
    )
    strict = ["-Wall", "-Wextra", "-Wconversion", "-pedantic", "-Werror"]
    command = [program, "-x", language, standard, *strict, str(source), "-o", str(folder / "main")]
    built = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([folder / "main"], capture_output=True, text=True, timeout=60, check=True)
    return [int(line) for line in done.stdout.split()]


@pytest.mark.parametrize("compiler", COMPILERS, ids=["C99", "C++11"])
def test_header_compiles_and_has_the_values(compiler: tuple[str, str, str], tmp_path: Path):
    expected = expressions()
    lines = [f'printf("%ld\\n", (long){name});' for name in expected]
    assert dict(zip(expected, run(tmp_path, compiler, lines), strict=True)) == expected


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: op_of(example).opcode.name)
@pytest.mark.parametrize("compiler", COMPILERS, ids=["C99", "C++11"])
def test_header_packs_a_descriptor(compiler: tuple[str, str, str], example: AnyDescriptor, tmp_path: Path):
    """The result equals to_words; a value that is too large is refused, and nothing is written."""
    name = op_of(example).opcode.name.lower()
    fields = [field for field in example.op_fields if field.name != "opcode"]
    values = {field.name: getattr(example, field.name) // field.unit for field in fields}
    too_large = {field.name: 1 << field.width for field in fields if field.width not in (8, 16, 32)}
    assert {"interrupt", "result_pitch", "head", "scale"} <= set(too_large)
    call = 'printf("%d\\n", gristmill_pack_' + f"{name}(&d, words));"
    lines = [f"struct gristmill_{name} d;", "uint32_t words[GRISTMILL_DESCRIPTOR_WORDS];", "unsigned index;"]
    lines += [f"d.{field} = {value}u;" for field, value in values.items()]
    lines += [call]
    for field, value in too_large.items():
        lines += [f"d.{field} = {value}u;", call, f"d.{field} = {values[field]}u;"]
    lines += ["for (index = 0; index < GRISTMILL_DESCRIPTOR_WORDS; index++)"]
    lines += ['    printf("%lu\\n", (unsigned long)words[index]);']
    found = run(tmp_path, compiler, lines)
    assert found == [0, *[-1] * len(too_large), *example.to_words()]
