# SPDX-License-Identifier: Apache-2.0
"""Jobs: what a device computes, one job for each descriptor. A batch, or a program, is a sequence of jobs.

A job is plain data. Its operands are float32 in the device's memory; its name is for messages. `descriptor` is the only
place where a job becomes the values of hw.spec.ops: the driver sends them, and the reference device computes from them.
"""

from sw.devices.jobs.attention import AppendJob, AttentionJob, Keys, ScoresJob, Values, ValuesJob, View
from sw.devices.jobs.check import NO_APPENDS, check_jobs
from sw.devices.jobs.layers import Job, LinearJob, VectorJob
from sw.devices.jobs.moves import Move, Reach
from sw.devices.jobs.moving import Moving
from sw.devices.jobs.operands import (
    EXPONENTS,
    NOWHERE,
    PAGE,
    WEIGHTS,
    Access,
    Buffer,
    DeviceError,
    Epilogue,
    Rotation,
    Rows,
    Second,
    TableRow,
)

__all__ = [
    "EXPONENTS",
    "NOWHERE",
    "NO_APPENDS",
    "PAGE",
    "WEIGHTS",
    "Access",
    "AppendJob",
    "AttentionJob",
    "Buffer",
    "DeviceError",
    "Epilogue",
    "Job",
    "Keys",
    "LinearJob",
    "Move",
    "Moving",
    "Reach",
    "Rotation",
    "Rows",
    "ScoresJob",
    "Second",
    "TableRow",
    "Values",
    "ValuesJob",
    "VectorJob",
    "View",
    "check_jobs",
]
