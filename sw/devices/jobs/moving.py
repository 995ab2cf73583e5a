# SPDX-License-Identifier: Apache-2.0
"""A prepared batch at different positions."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from sw.devices.jobs.layers import Job
from sw.devices.jobs.moves import Reach
from sw.devices.jobs.operands import DeviceError


@dataclass(eq=False)
class Moving:
    """The jobs of a prepared batch at the position that it has now.

    Members
    -------
    prepared: the jobs as they were prepared.
    by: positions from there to the batch's position.
    """

    prepared: Sequence[Job]
    by: int = 0
    _reach: Reach | None = None
    _jobs: tuple[int, Sequence[Job]] | None = field(default=None, repr=False)

    @property
    def jobs(self) -> Sequence[Job]:
        """The jobs at this position."""
        if not self.by:
            return self.prepared
        if self._jobs is None or self._jobs[0] != self.by:
            self._jobs = self.by, tuple(job.moved(self.by) for job in self.prepared)
        return self._jobs[1]

    def move(self, by: int) -> None:
        """Moves the jobs. Raises DeviceError if one of them is not possible there; then nothing changes."""
        if self._reach is None:
            self._reach = Reach()
            for job in self.prepared:
                self._reach = self._reach.both(job.reach())
        if not self._reach.least <= by <= self._reach.most:
            raise DeviceError(
                f"the batch from layer {self.prepared[0].name} can move by {self._reach.least:,} to"
                f" {self._reach.most:,} positions, not by {by:,}"
            )
        self.by = by
