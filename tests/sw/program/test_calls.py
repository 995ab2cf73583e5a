# SPDX-License-Identifier: Apache-2.0
"""Programs of whole calls are prepared once and moved: at every position they are what a fresh preparation gives."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

from hw.spec.config import SCORE_UNIT, AcceleratorConfig
from hw.spec.control.program import program_image
from hw.spec.control.registers import offset as at
from sw.bench_decoder import InstantDevice, InstantPlatform
from sw.devices.base import DeviceError, PreparedBatch
from sw.devices.batches import Prepared
from sw.devices.driver import AcceleratorDevice
from sw.devices.reference import ReferenceDevice
from sw.graph.file import OnnxFile
from sw.program import lower
from sw.program.lower import Output, Programs
from sw.runtime import ProgramDecoder
from tests.sw.fixtures.random_decoder import write_random
from tests.sw.runtime.test_decoder import changed
from tests.sw.runtime.test_programs import hardware

CONTEXT = 200
SCORE_WORDS = 8 * SCORE_UNIT
"""Eight rows for contexts up to 64, two at 200."""


def narrow(graph: onnx.GraphProto) -> None:
    """A window in the second block alone, so the caches of the blocks differ."""
    nodes = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    nodes[1].attribute.append(onnx.helper.make_attribute("local_window_size", 9))


GRAPHS = {"plain": {}, "normed": {"head_norms": "qk"}, "window": {}}


@pytest.fixture(scope="module", params=GRAPHS)
def model(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    path = write_random(folder, head_size=32, context=CONTEXT, **GRAPHS[request.param])
    return changed(path, tmp_path_factory.mktemp("narrow"), narrow) if request.param == "window" else path


@pytest.fixture
def plain(tmp_path) -> Path:
    return write_random(tmp_path, head_size=32, context=CONTEXT)


def config() -> AcceleratorConfig:
    return hardware(score_words=SCORE_WORDS)


def programs_of(path: Path, device: AcceleratorDevice | ReferenceDevice) -> Programs:
    decoder = ProgramDecoder(OnnxFile(path), device, context=CONTEXT, tell=pytest.fail)
    assert decoder.whole and decoder._programs.attention
    decoder._programs.attention.use()
    return decoder._programs


def code_of(batch: PreparedBatch) -> tuple[Sequence[Sequence[int]], Sequence[int], np.ndarray]:
    """The words of a batch as they were prepared, its beats, and its program in memory."""
    assert isinstance(batch, Prepared) and isinstance(batch.device, AcceleratorDevice)
    code = batch.code
    return code.descriptors, code.beats.tolist(), batch.device.view(code.program)


@pytest.mark.parametrize(
    ("tokens", "output"), [(1, Output.BEST), (1, Output.PIECES), (3, Output.ALL), (8, Output.LAST), (8, None)]
)
def test_moved_programs_are_fresh_ones(model, tokens, output):
    """The words in memory, the beats and the jobs are those of a batch that is built and checked at this position."""
    programs = programs_of(model, device := InstantDevice(config()))
    made = []
    positions = [0, 1, 55, 56, 57, 63, 64, 127, 128, 30, 191, 0, CONTEXT - tokens]
    for position in sorted({*positions, *range(100, 130)}) + positions:
        batch = programs.call(tokens, position, output)
        made.append(batch)
        fresh = device.prepare(programs.whole(tokens, position, output))
        (_, beats, image), (words, expected, _) = code_of(batch), code_of(fresh)
        assert np.array_equal(image, program_image(words)), position
        assert beats == expected == [job.beats for job in fresh.jobs]
        assert isinstance(batch, Prepared) and tuple(batch.moving.jobs) == fresh.jobs
    # Eight, four and two rows of scores: few programs for all positions.
    assert len(set(map(id, made))) <= 3


def test_reference_follows(model):
    programs = programs_of(model, device := ReferenceDevice(config()))
    for position in (5, 0, 70, 71, 150):
        batch = programs.call(2, position, Output.BEST)
        assert isinstance(batch, Prepared)
        assert tuple(batch.moving.jobs) == tuple(programs.whole(2, position, Output.BEST))
        assert tuple(batch.moving.jobs) == device.prepare(batch.moving.jobs).jobs


def test_reach(plain):
    """No batch moves to a position where the check would refuse it: before the first, after the table or the cache, or
    where the scores do not fit their bank."""
    programs = programs_of(plain, device := InstantDevice(config()))
    batch = device.prepare(programs.whole(1, 20, Output.BEST))
    before = code_of(batch)[2].copy()
    for by, reach in ((-21, "-20 to 179"), (180, "-20 to 179")):
        with pytest.raises(DeviceError, match=f"can move by {reach} positions, not by {by}"):
            device.move(batch, by)
    assert np.array_equal(code_of(batch)[2], before)
    device.move(batch, 179)
    device.move(batch, -20)
    # Eight rows at once.
    batch = device.prepare(programs.whole(8, 20, Output.ALL))
    with pytest.raises(DeviceError, match="can move by -20 to 36 positions, not by 37"):
        device.move(batch, 37)
    for position, possible in ((56, True), (57, False)):
        jobs = [job.moved(position - 20) for job in batch.jobs]
        if possible:
            device.prepare(jobs)
        else:
            with pytest.raises(DeviceError, match="attention of its shape"):
                device.prepare(jobs)


def test_few_programs_are_kept(plain, monkeypatch):
    """The memory of programs that were used long ago is free again."""
    monkeypatch.setattr(lower, "MOST_CALLS", 2)
    programs = programs_of(plain, device := InstantDevice(config()))
    for tokens in (1, 2, 3):
        programs.call(tokens, 0, Output.BEST)
    free = device.alloc(1)
    device.free(free)
    for tokens in (4, 5, 1, 2, 3, 4, 5):
        programs.call(tokens, 0, Output.BEST)
        assert len(programs._calls) == 2
    again = device.alloc(1)
    assert again.address <= free.address + 4 * 4096


def test_a_running_program_does_not_move(plain):
    programs = programs_of(plain, device := InstantDevice(config()))
    batch, other = programs.call(1, 0, Output.BEST), programs.call(1, 0, Output.ALL)
    before = code_of(batch)[2].copy()
    ticket = device.submit(batch)
    with pytest.raises(DeviceError, match=r"^the batch from layer .* is not done, and cannot move before$"):
        device.move(batch, 1)
    assert np.array_equal(code_of(batch)[2], before)
    device.move(other, 3)
    device.wait(ticket, 1)
    device.move(batch, 1)
    assert not np.array_equal(code_of(batch)[2], before)


class Stuck(InstantPlatform):
    """An accelerator that completes nothing while it is `stuck`; each wait takes `step` cycles."""

    stuck, step = False, 1000

    def write_register(self, offset: int, value: int) -> None:
        """See Platform."""
        if not (self.stuck and offset == self._control):
            super().write_register(offset, value)

    def wait_interrupt(self) -> bool:
        """See Platform."""
        self._values[at("cycles")] += self.step
        return not self.stuck


class StuckDevice(AcceleratorDevice):
    name = "stuck"


def test_a_program_that_was_given_up_is_reset_before_it_moves(plain, monkeypatch):
    """It may still be running, and reading its descriptors."""
    platform = Stuck(config())
    programs = programs_of(plain, device := StuckDevice(config(), platform))
    device.registers.write("timeout", 100)
    batch = programs.call(1, 0, Output.BEST)
    platform.stuck = True
    with pytest.raises(DeviceError, match="nothing moved for"):
        device.wait(device.submit(batch), 10)
    platform.stuck = False
    resets, before, reset = [], code_of(batch)[2].copy(), device._reset

    def watched() -> None:
        resets.append(code_of(batch)[2].copy())
        reset()

    monkeypatch.setattr(device, "_reset", watched)
    device.move(batch, 1)
    assert len(resets) == 1 and np.array_equal(resets[0], before)
    device.move(batch, 2)
    assert len(resets) == 1


def test_one_completion(plain):
    """A token takes few accesses to registers, whatever the number of its jobs is."""
    programs = programs_of(plain, device := InstantDevice(config()))
    platform, counts = device.platform, []
    for position in range(3):
        batch, before = programs.call(1, position, Output.BEST), platform.accesses
        (done,) = device.wait(device.submit(batch), 1)
        counts.append(platform.accesses - before)
        assert (done.jobs, done.name) == (len(batch.jobs), batch.jobs[-1].name)
        assert done.beats == sum(job.beats for job in programs.whole(1, position, Output.BEST))
    assert counts[1:] == [6, 6]
