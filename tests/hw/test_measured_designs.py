# SPDX-License-Identifier: Apache-2.0
"""The resources and the logic depth in docs/figures.json are what ``python -m hw.resources`` measures.

Each test writes its document to build/figures, from where ``python -m sw.figures --take SECTION=FILE`` takes it.
"""

import json
from pathlib import Path

import pytest

from hw import resources
from tests.hw.documented import config_of, sections_of

pytestmark = [pytest.mark.slow, pytest.mark.full, pytest.mark.timeout(5400)]

FOLDER = Path(__file__).resolve().parents[2] / "build" / "figures"
DESIGNS = {**sections_of("levels_"), **sections_of("resources_")}


@pytest.mark.parametrize("name", DESIGNS)
def test_design(name: str):
    documented, block = DESIGNS[name], "accelerator"
    config = config_of(documented)
    if name.startswith("levels_"):
        found = resources.levels_document(config, "kv260", block, resources.measure_levels(config, "kv260"))
    else:
        found = resources.document(config, "kv260", block, resources.measure(config, "kv260"))
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(found, indent=1))
    assert documented["figures"] == {key: found[key] for key in documented["figures"]}
