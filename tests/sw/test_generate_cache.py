# SPDX-License-Identifier: Apache-2.0
"""``python -m sw.generate`` with a cache that an earlier run has saved."""

import pytest

from sw.common.errors import UserError
from tests.sw.test_generate import PROMPT_IDS, model, run

__all__ = ["model"]


def test_saved_cache(model, tmp_path, capsys):
    """The second run computes only the prompt's last token, in a context of the same size, and answers the same."""
    file = tmp_path / "cache"
    first = run(capsys, model, "--max-new-tokens", 3, "--context", 30, "--save-cache", file)
    again = run(capsys, model, "--max-new-tokens", 3, "--load-cache", file)
    assert again["ids"] == first["ids"] and again["context"] == 30
    assert (first["prefill"]["tokens"], again["prefill"]["tokens"]) == (PROMPT_IDS, 1)
    with pytest.raises(UserError, match="another model, other hardware, or another --context"):
        run(capsys, model, "--context", 29, "--load-cache", file)
    with pytest.raises(
        UserError, match=r"^the prompt has 31 tokens, more than --context, or the cache in .*, holds \(30\)$"
    ):
        run(capsys, model, "--prompt", "x" * 29, "--load-cache", file)
    with pytest.raises(UserError, match="nothing is not a complete cache"):
        run(capsys, model, "--load-cache", tmp_path / "nothing")
