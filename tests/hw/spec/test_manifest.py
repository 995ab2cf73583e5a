# SPDX-License-Identifier: Apache-2.0
"""The manifest: the same bytes every time, a round trip, and messages that name a damaged file."""

import json
import re
from pathlib import Path

import pytest

from hw.spec.config import AcceleratorConfig
from hw.spec.manifest import Field, Manifest, ManifestError, Port


@pytest.fixture
def manifest() -> Manifest:
    return Manifest(
        block="core",
        config=AcceleratorConfig(tile=8, zero_point="fixed"),
        ports={"underrun": Port("out", 1, {"value": Field(0, 1, False)})},
        streams={"results": Port("out", 34, {"values": Field(0, 32, False, 1), "keep": Field(32, 1, True)})},
        properties={"latency": 51},
        verilog_sha256="ab" * 32,
    )


def test_round_trip(manifest: Manifest, tmp_path: Path):
    path = tmp_path / "manifest.json"
    path.write_text(manifest.to_json())
    assert Manifest.load(path) == manifest
    assert manifest.to_json() == Manifest.load(path).to_json()
    assert manifest.top == json.loads(path.read_text())["top"] == "gristmill_core"


def test_has_what_software_needs(manifest: Manifest):
    values = json.loads(manifest.to_json())
    assert values["config_digest"] == manifest.config.digest
    assert values["weight_stream"]["beat_bytes"] == 64
    assert values["widths"]["sum"] == manifest.config.sum_bits
    assert values["streams"]["results"]["fields"]["keep"] == [32, 1, True, 1]


def _changed(**changes):
    def change(text: str) -> str:
        values = json.loads(text)
        for key, value in changes.items():
            if value is None:
                del values[key]
            else:
                values[key] = value
        return json.dumps(values)

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "not a manifest (JSONDecodeError)"),
        (lambda text: "", "not a manifest (JSONDecodeError)"),
        (lambda text: "[]", "not a manifest (AttributeError)"),
        (_changed(gristmill=2), "manifest version 1 is needed, not 2"),
        (_changed(config_digest="0" * 64), "the config does not match its digest"),
        (_changed(config=None), "not a manifest (KeyError)"),
        (_changed(verilog_sha256=None), "not a manifest (KeyError)"),
        (_changed(config={"tile": 8}), "not a manifest (a config has the fields "),
        (_changed(config={**AcceleratorConfig().to_dict(), "tile": 5}), "not a manifest (tile is one of "),
    ],
)
def test_damage_is_refused(manifest: Manifest, tmp_path: Path, damage, message: str):
    path = tmp_path / "manifest.json"
    path.write_text(damage(manifest.to_json()))
    with pytest.raises(ManifestError, match="^" + re.escape(f"{path}: {message}")):
        Manifest.load(path)


def test_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ManifestError, match=re.escape(f"{tmp_path / 'none.json'}: no manifest there; python -m hw.bu")):
        Manifest.load(tmp_path / "none.json")
