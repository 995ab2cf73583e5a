# SPDX-License-Identifier: Apache-2.0
"""docs/models.md has the table of the registry, and a tiny model for each of its lines."""

from pathlib import Path

from sw.model.families import FAMILIES, of_architecture, table
from tests.sw.fixtures.families.models import CONFIGS

PAGE = Path(__file__).resolve().parents[3] / "docs" / "models.md"


def test_table():
    assert "\n".join(["", *table(), ""]) in PAGE.read_text(), (
        "docs/models.md needs the lines of sw.model.families.table()"
    )


def test_every_family_has_a_model():
    """The other tests beside this one check what the table says with these models."""
    assert {config["model_type"] for config in CONFIGS.values()} == FAMILIES.keys()
    assert of_architecture("llama")[0] == "llama"
