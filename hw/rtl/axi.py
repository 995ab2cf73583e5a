# SPDX-License-Identifier: Apache-2.0
"""AXI4 channels as streams. Names and rules: Arm IHI 0022, AMBA AXI protocol, AXI4."""

from amaranth.hdl import unsigned
from amaranth.lib import data, enum, stream, wiring
from amaranth.lib.wiring import In, Out

ADDRESS_BITS = 40
"""What the memory ports of a Zynq UltraScale+ take."""
MAX_BURST_BEATS = 256
"""Longest INCR burst."""
BOUNDARY = 4096
"""Bytes; no burst crosses a multiple of it."""


class Response(enum.Enum, shape=2):
    """RRESP and BRESP."""

    OKAY = 0
    EXOKAY = 1
    SLVERR = 2
    DECERR = 3


INCR = 1
"""AxBURST of an incrementing burst."""
ID_BITS = 1
"""All transfers of a port have ID 0 and so come back in order; interconnects want the signal all the same."""
CACHE = 0b0011
"""AxCACHE: normal, not cached, bufferable; what Zynq UltraScale+ wants for its DDR controller."""


def address_layout() -> data.StructLayout:
    """AR and AW; the names are those of the specification without the channel's."""
    return data.StructLayout(
        {
            "id": unsigned(ID_BITS),
            "addr": unsigned(ADDRESS_BITS),
            "len": unsigned(8),
            "size": 3,
            "burst": 2,
            "cache": 4,
            "prot": 3,
        }
    )


def read_layout(width: int) -> data.StructLayout:
    """R."""
    return data.StructLayout({"id": unsigned(ID_BITS), "data": unsigned(width), "resp": Response, "last": 1})


class AxiSignature(wiring.Signature):
    """Channels of an AXI port by their names in lower case. Ports come out as ``m_axi_{name}_{channel}{signal}``."""


def is_axi(member: wiring.Member) -> bool:
    """Whether a component's member is an AXI port."""
    return member.is_signature and isinstance(member.signature, AxiSignature)


def read_signature(width: int) -> AxiSignature:
    """The read half of a manager's port."""
    return AxiSignature({"ar": Out(stream.Signature(address_layout())), "r": In(stream.Signature(read_layout(width)))})


def constant_address_fields(payload, width: int) -> list:
    """Assignments for what is the same in every burst of a port of ``width`` bits."""
    return [
        payload.size.eq((width // 8 - 1).bit_length()),
        payload.burst.eq(INCR),
        payload.cache.eq(CACHE),
        payload.prot.eq(0),
        payload.id.eq(0),
    ]


def is_error(response):
    """Whether RRESP or BRESP reports an error."""
    return (response == Response.SLVERR) | (response == Response.DECERR)
