# SPDX-License-Identifier: Apache-2.0
"""A cache writer with a write manager, for their bench."""

from amaranth.hdl import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import Out

from hw.rtl.attention.cache_writer import CacheWriter
from hw.rtl.common.block import Block
from hw.rtl.memory.axi import write_signature
from hw.rtl.memory.write_manager import WriteClient, WriteManager, write_clients
from hw.spec.config import AcceleratorConfig

_INPUTS, _STREAMS, _FLAGS = ("first", "end"), ("job", "rows"), ("outside", "outside_address", "non_finite")


class CachePath(Block):
    """:class:`hw.rtl.attention.cache_writer.CacheWriter` as client CACHE of a write manager that has no other work.

    Members
    -------
    axi : the write port
    complete : the last burst of a job was acknowledged

    and those of the cache writer besides ``pieces`` and ``beats``.
    """

    container = True

    def __init__(self, config: AcceleratorConfig):
        self.config, self.writer = config, CacheWriter(config)
        members = self.writer.signature.members
        names = (*_INPUTS, *_STREAMS, *_FLAGS)
        super().__init__(
            {
                **{name: members[name] for name in names},
                "axi": Out(write_signature(config.port_width)),
                "complete": Out(1),
            }
        )

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {**self.writer.properties(), "write_latency": WriteManager.latency}

    def elaborate(self, platform) -> Module:
        m = Module()
        config = self.config
        m.submodules.cache_writer = writer = self.writer
        m.submodules.writer = manager = WriteManager(config.port_width, write_clients(config))
        for name in _STREAMS:
            wiring.connect(m, wiring.flipped(getattr(self, name)), getattr(writer, name))
        wiring.connect(m, writer.pieces, manager.pieces[WriteClient.CACHE])
        wiring.connect(m, writer.beats, manager.cache_beats)
        wiring.connect(m, manager.axi, wiring.flipped(self.axi))
        m.d.comb += [
            *(getattr(writer, name).eq(getattr(self, name)) for name in _INPUTS),
            *(getattr(self, name).eq(getattr(writer, name)) for name in _FLAGS),
            self.complete.eq(manager.complete[WriteClient.CACHE]),
        ]
        return m
