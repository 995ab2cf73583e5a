# SPDX-License-Identifier: Apache-2.0
"""Fixtures that the software's tests share."""

import shutil

import pytest

from sw.export.resolve import resolve_model


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """SmolLM2 as ONNX, exported into a cache of its own."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRISTMILL_CACHE", str(cache))
        yield resolve_model("smollm2")
    shutil.rmtree(cache)
