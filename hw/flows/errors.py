# SPDX-License-Identifier: Apache-2.0
"""Errors of the steps between a config and a bitstream."""


class FlowError(Exception):
    """A step of a flow failed. The message is one line.

    Attributes
    ----------
    status : exit code of the command: 2 before any work, 1 after a tool ran
    """

    status = 2
