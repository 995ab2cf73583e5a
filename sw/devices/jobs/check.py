# SPDX-License-Identifier: Apache-2.0
"""The check of a batch of jobs, before any of them runs."""

from collections.abc import Sequence

from hw.spec.config import AcceleratorConfig
from hw.spec.ops import Wait
from hw.spec.ops.epilogue import epilogue_is_wrong
from sw.devices.jobs.attention import AppendJob, AttentionJob, ScoresJob, ValuesJob
from sw.devices.jobs.layers import Job, LinearJob, VectorJob
from sw.devices.jobs.operands import NO_EPILOGUE, WEIGHTS, Access, DeviceError

NO_APPENDS = range(0)
"""No addresses for keys and values."""


def check_jobs(config: AcceleratorConfig, jobs: Sequence[Job], appends: range = NO_APPENDS) -> None:
    """Raises DeviceError, with the layer's name, if a batch is impossible on every device.

    appends: the addresses that AppendJobs may write.
    """
    if not jobs:
        raise DeviceError("a batch has at least one job")
    before: LinearJob | None = None
    # The outputs that reads may overtake, those of data and those of weights, and the tokens that have an r.
    data: list[Access] = []
    weights: list[Access] = []
    scaled = 0
    # Name, rows and positions of the scores in each bank.
    scores: dict[int, tuple[str, int, int]] = {}
    for job in jobs:
        _check_job(config, job)
        if isinstance(job, AppendJob):
            _check_append(job, appends)
        if job.wait != Wait.NOTHING:
            data = []
        if job.wait == Wait.WEIGHTS:
            weights = []
        writes = job.writes()
        for read in job.reads():
            if read.overlaps(writes) or read.overlaps(weights if read.what == WEIGHTS else data):
                raise DeviceError(f"layer {job.name} reads results of its own batch, and does not wait for them")
        if isinstance(job, LinearJob):
            if job.reuse and (before is None or _operands(before) != _operands(job)):
                raise DeviceError(
                    f"layer {job.name} reuses activations, and the job before has others (or none is before)"
                )
            before = job
        if job.epilogue.scale and scaled < job.tokens:
            raise DeviceError(f"layer {job.name} scales its tokens, and no job before it computes their scales")
        if isinstance(job, ScoresJob):
            if job.bank in scores:
                raise DeviceError(f"layer {job.name} overwrites scores of bank {job.bank} that no job has read")
            scores[job.bank] = job.name, job.tokens, job.slots
        if isinstance(job, ValuesJob) and scores.pop(job.bank, ("",))[1:] != (job.tokens, job.slots):
            raise DeviceError(f"layer {job.name} reads scores that no job before it computes")
        if not isinstance(job, (LinearJob, VectorJob, AppendJob)):
            # The array has other activations now.
            before = None
        if job.epilogue.epsilon is not None:
            scaled = max(scaled, job.tokens)
        data = data + writes
        weights = weights + writes
    for name, *_ in scores.values():
        # The next batch would find its bank full.
        raise DeviceError(f"layer {name} computes scores, and no job of its batch reads them")


def _check_job(config: AcceleratorConfig, job: Job) -> None:
    if isinstance(job, LinearJob) and job.layout.config != config:
        digest = job.layout.config.digest[:16]
        raise DeviceError(f"layer {job.name} is packed for other hardware (config {digest})")
    if not 1 <= job.tokens <= config.max_tokens:
        raise DeviceError(f"layer {job.name}: M is 1 to max_tokens ({config.max_tokens}), not {job.tokens}")
    for what, buffer, size, *_ in (*job.reads(), *job.writes()):
        if buffer.size < size:
            raise DeviceError(f"layer {job.name}: its {what} take {size:,} bytes, the buffer has {buffer.size:,}")
    if isinstance(job, AttentionJob):
        if not config.has_attention:
            raise DeviceError(f"layer {job.name} is attention, and hardware with --score-words 0 has none")
        if job.op.shape_is_wrong(config, vars(job.descriptor()), None):
            raise DeviceError(f"layer {job.name}: no hardware of this config has attention of its shape")
        return
    if isinstance(job, LinearJob) and job.epilogue == NO_EPILOGUE:
        return
    if not config.has_vector_unit:
        raise DeviceError(f"layer {job.name} has an epilogue, and hardware with --operators linear has none")
    if epilogue_is_wrong(config, vars(job.descriptor())):
        raise DeviceError(f"layer {job.name}: no hardware has its epilogue")


def _check_append(job: AppendJob, appends: range) -> None:
    for _, buffer, size, *_ in job.writes():
        if not appends.start <= buffer.address <= buffer.address + size <= appends.stop:
            allowed = f"{appends.start:#x} to {appends.stop - 1:#x}" if appends else "none"
            raise DeviceError(
                f"layer {job.name} appends to a cache at the addresses {buffer.address:#x} to"
                f" {buffer.address + size - 1:#x}, and those that allow_appends has given are {allowed}"
            )


def _operands(job: LinearJob) -> tuple:
    return job.activations, job.tokens, job.layout.k, job.layout.group_size
