# SPDX-License-Identifier: Apache-2.0
"""Settings for all tests: which of them build a simulator, and how they are distributed to the cores."""

from collections.abc import Iterator

import pytest
from xdist.scheduler import LoadScopeScheduling

from sim import harness
from sw.devices import library

SIMULATED = ("rtl", "kv260")
"""Devices that a test simulates: the fake board of a test connects a driver's files to the simulated device."""
LONG = ("test_measured_designs.py::", "test_quantize_models.py::")
"""Files whose tests take minutes and have no fixture in common."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of simulated devices, and put the long tests first: LONG, then benches, large before small.

    Then come the files that build simulated devices. A long test that starts last would leave the other cores idle.
    """
    for item in items:
        names = [value[0] if isinstance(value, tuple) and value else value for value in _values(item)]
        if any(isinstance(name, str) and name in SIMULATED for name in names):
            item.add_marker("simulator")
    benches = [item for item in items if _is_bench(item.nodeid)]
    long = [item for item in items if _is_alone(item.nodeid) and not _is_bench(item.nodeid)]
    others = [item for item in items if not _is_alone(item.nodeid)]
    building = {_file(item.nodeid) for item in others if item.get_closest_marker("simulator")}
    others.sort(key=lambda item: _file(item.nodeid) not in building)
    items[:] = [*long, *reversed(benches), *others]


def _values(item: pytest.Item) -> list[object]:
    callspec = getattr(item, "callspec", None)
    return list(callspec.params.values()) if callspec else []


def _file(nodeid: str) -> str:
    return nodeid.split("::")[0]


def _is_bench(nodeid: str) -> bool:
    return "test_sim.py::test_bench[" in nodeid


def _is_alone(nodeid: str) -> bool:
    """Whether a worker takes this test by itself."""
    return _is_bench(nodeid) or any(file in nodeid for file in LONG)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A test without the mark must neither build a simulator nor use a built one, because `make test-quick` runs it."""
    with pytest.MonkeyPatch.context() as patch:
        if not item.get_closest_marker("simulator"):

            def refuse(*arguments: object, **options: object):
                pytest.fail("this test builds a simulator; mark it with pytest.mark.simulator")

            patch.setattr(harness, "_build", refuse)
            patch.setattr(library, "_start_builder", refuse)
        return (yield)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log) -> LoadScopeScheduling:
    """A worker takes a whole file, because fixtures of a module are expensive; long tests are distributed alone."""

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if _is_alone(nodeid) else _file(nodeid)

    config.option.loadscopereorder = False
    return Scheduling(config, log)
