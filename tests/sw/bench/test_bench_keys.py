# SPDX-License-Identifier: Apache-2.0
"""The figures of keys with a bias: docs/attention.md has them, and the rule for 16 bits agrees with them."""

from sw.bench_keys import CASES, lines, measure
from sw.pages.store import ROOT


def test_page():
    """The page is that of `python -m sw.bench_keys`."""
    page = (ROOT / "docs" / "attention.md").read_text(encoding="utf-8")
    assert "\n".join(lines()) in page


def test_remedies():
    """Factors help in pairs that turn fast, the centre in slow ones, and 8 bits are chosen where they are enough."""
    found = {case.name: measure(case) for case in CASES}
    fast, slow = found["30, a fast pair"], found["30, a slow pair"]
    assert fast["centre"] > 0.99 * fast["8 bits"] and fast["centre, factors"] < fast["8 bits"] / 3
    assert slow["centre"] < 1.05 * found["none"]["8 bits"] < slow["8 bits"] / 5
    for errors in found.values():
        assert errors["all"] < 0.001
        assert (errors["centre, factors"] < 0.02) == (errors["auto"] == 8)
