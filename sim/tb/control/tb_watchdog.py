# SPDX-License-Identifier: Apache-2.0
"""The watchdog: when it reports a client that owes an answer, and when it does not."""

import cocotb
import numpy as np

from sim.bench.dut import begin, config, trace
from sim.bench.streams import rng

WATCHED = config().ports + 1
ALL = (1 << WATCHED) - 1
SLACK = 4
"""Cycles of delay in the counter and in the output register."""


async def _late(dut, timeout, owes, progress) -> np.ndarray:
    """The reported bits, bool [cycles, WATCHED]. Each argument is a number per cycle, or one number for all cycles."""
    inputs = dict(timeout=timeout, owes=owes, progress=progress)
    length = max(len(value) for value in inputs.values() if not isinstance(value, int))
    lists = {name: [value] * length if isinstance(value, int) else value for name, value in inputs.items()}
    for name, value in lists.items():
        getattr(dut, name).value = int(value[0])
    await begin(dut)
    record = await trace(dut, lists, ("late",))
    return _bits(record.raw("late", range(length)))


def _bits(values) -> np.ndarray:
    return np.array(values)[:, None] >> np.arange(WATCHED) & 1 == 1


@cocotb.test()
@cocotb.parametrize(timeout=[1, 2, 7, 100], client=range(WATCHED))
async def one_to_two_timeouts(dut, timeout, client):
    """Only a client that owes and does not move is reported, after one to two timeouts, in any phase."""
    for start in rng(1).permutation(2 * timeout + 3)[:12].tolist():
        owes = [0] * start + [1 << client] * (3 * timeout + 3 * SLACK)
        late = await _late(dut, timeout, owes, 0)
        assert not np.delete(late, client, axis=1).any()
        first = int(np.flatnonzero(late[:, client])[0]) - start
        assert timeout < first <= 2 * timeout + SLACK, f"reported after {first} cycles"


@cocotb.test()
@cocotb.parametrize(event=["progress", "nothing_owed"])
async def starts_anew(dut, event):
    """A single cycle with progress, or without a debt, counts as an answer."""
    timeout = 20
    for gap in rng(1).integers(1, timeout, 6).tolist():
        # Each answer comes just in time, and then no more answers come.
        times = list(range(gap, 15 * timeout, gap))
        length = times[-1] + 3 * timeout + SLACK
        owes, progress = [ALL] * length, [0] * length
        for time in times:
            if event == "progress":
                progress[time] = ALL
            else:
                owes[time] = 0
        late = await _late(dut, timeout, owes, progress)
        first = int(np.flatnonzero(late.any(axis=1))[0]) - times[-1]
        assert timeout < first <= 2 * timeout + SLACK, f"reported after {first} cycles"


@cocotb.test()
async def never(dut):
    """With a timeout of 0, the watchdog never reports."""
    assert not (await _late(dut, 0, [ALL] * 2000, 0)).any()


@cocotb.test()
@cocotb.parametrize(before=[0, 5000, 0xFFFF_FFFF])
async def another_timeout(dut, before):
    """A new timeout counts from the cycle when it is set, also after none or a much longer one."""
    after, at = 30, 100
    late = await _late(dut, [before] * at + [after] * 200, [ALL] * 300, 0)
    first = int(np.flatnonzero(late.any(axis=1))[0])
    assert at + after < first <= at + 2 * after + SLACK
    # Back to no timeout.
    late = await _late(dut, [after] * 10 + [0] * 300, [ALL] * 310, 0)
    assert not late.any()


@cocotb.test()
async def random_traffic(dut):
    """A reported client has been silent for the timeout. A client that is silent for two timeouts is reported."""
    random, cycles = rng(1), 6000
    for timeout in (3, 17, 60):
        busy = random.random((cycles, WATCHED)) < 1.5 / timeout
        owes = np.repeat(random.random((cycles // 50, WATCHED)) < 0.8, 50, axis=0)
        weights = 1 << np.arange(WATCHED)
        late = await _late(dut, timeout, (owes @ weights).tolist(), (busy @ weights).tolist())
        silent = np.zeros(WATCHED, np.int64)
        unreported = np.zeros(WATCHED, np.int64)
        for cycle in range(cycles - 1):
            still = owes[cycle] & ~busy[cycle]
            silent, unreported = (silent + 1) * still, (unreported + 1) * still
            reported = late[cycle + 1]
            assert (silent[reported] > timeout).all(), f"reported after {silent[reported]} cycles"
            unreported[reported] = 0
            assert (unreported <= 2 * timeout + SLACK).all(), f"silent for {unreported} cycles"
        assert late.any()
