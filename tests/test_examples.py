# SPDX-License-Identifier: Apache-2.0
"""The examples run, and their output is right."""

import importlib.util
import re
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def load(name: str):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("device", "last"),
    [
        ("reference", r"no cycles: the reference device has no hardware"),
        ("rtl", r"[\d,]+ cycles, simulated"),
    ],
)
def test_one_layer(device: str, last: str, capsys):
    load("one_layer").main(["--device", device])
    first, second = capsys.readouterr().out.splitlines()
    error = re.fullmatch(r"y is float32 \[2, 1152\], relative error (\S+) against the float32 product", first)
    # The weights' scales and the activations have 16 bits, so about four digits are right.
    assert error and 0 < float(error[1]) < 2e-4
    assert re.fullmatch(last, second)
