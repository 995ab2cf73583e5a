# SPDX-License-Identifier: Apache-2.0
"""What the performance model knows between two descriptors of a program."""

from dataclasses import dataclass, field

from hw.spec.ops.scores import BANKS


@dataclass
class Timeline:
    """When the parts of the accelerator are free, in cycles from the start of the program."""

    array: int
    """The array can begin the next layer."""
    memory: int
    """The outputs of all descriptors so far are in memory, or on chip if they are scores."""
    loaded: int
    """The last activations are on chip."""
    before: object = None
    """The descriptor before."""
    earlier: int = 0
    """The outputs of all descriptors but the last one are in memory."""
    softmax: int = 0
    """The softmax is free."""
    inverse: int = 0
    """The divider of the softmax is free."""
    appended: int = 0
    """All rows of the appends so far have left the epilogue."""
    writer: int = 0
    """The cache writer is free."""
    ready: list[list[int]] = field(default_factory=lambda: [[0]] * BANKS)
    """By bank: for each chunk, its probabilities can be read."""
    inverted: list[int] = field(default_factory=lambda: [0] * BANKS)
    """By bank: 1/S of all rows is known."""
    released: list[int] = field(default_factory=lambda: [0] * BANKS)
    """By bank: it can take scores."""
