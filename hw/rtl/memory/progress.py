# SPDX-License-Identifier: Apache-2.0
"""How much of a descriptor's outputs is in memory."""

from amaranth.hdl import Module
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.vector.layouts import MAX_PIECES


class Progress(Block):
    """Counts the pieces of the outputs that are being written, for each client of the write manager.

    Parameters
    ----------
    clients : clients of the write manager
    rows : most rows of an output

    Members
    -------
    written, complete : by client: a piece is in memory; it was the last one of its output
    pieces : by client: pieces of the current output that are in memory, 0 after the last one

    Latency 1 cycle.
    """

    latency = 1

    def __init__(self, clients: int, rows: int = 1):
        self.clients = clients
        super().__init__(
            {
                "written": In(clients),
                "complete": In(clients),
                "pieces": Out(range(MAX_PIECES * rows + 1)).array(clients),
            }
        )

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency}

    def elaborate(self, platform) -> Module:
        m = Module()
        for client, pieces in enumerate(self.pieces):
            with m.If(self.complete[client]):
                m.d.sync += pieces.eq(0)
            with m.Elif(self.written[client]):
                m.d.sync += pieces.eq(pieces + 1)
        return m
