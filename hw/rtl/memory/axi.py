# SPDX-License-Identifier: Apache-2.0
"""AXI4 channels as streams. Names and rules: Arm IHI 0022, AMBA AXI protocol, AXI4."""

from amaranth.hdl import unsigned
from amaranth.lib import data, enum, stream, wiring
from amaranth.lib.wiring import In, Out

from hw.spec.control.descriptor import ADDRESS_BITS


class Response(enum.Enum, shape=2):
    """RRESP and BRESP."""

    OKAY = 0
    EXOKAY = 1
    SLVERR = 2
    DECERR = 3


INCR = 1
"""AxBURST of an incrementing burst."""
ID_BITS = 1
"""All transfers of a port have ID 0, so responses come in order; interconnects need the signal nevertheless."""
CACHE = 0b0011
"""AxCACHE: normal, not cached, bufferable, as required for the DDR controller of Zynq UltraScale+."""


def address_layout() -> data.StructLayout:
    """AR and AW; the names are those of the specification without the prefix for the channel."""
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


def write_layout(width: int) -> data.StructLayout:
    """W."""
    return data.StructLayout({"data": unsigned(width), "strb": unsigned(width // 8), "last": 1})


def acknowledge_layout() -> data.StructLayout:
    """B."""
    return data.StructLayout({"id": unsigned(ID_BITS), "resp": Response})


class AxiSignature(wiring.Signature):
    """Channels of an AXI port by their names in lower case, seen from the manager.

    Ports of the generated Verilog are named ``m_axi_{name}_{channel}{signal}`` on a manager (an ``Out`` member) and
    ``s_axi_{name}_{channel}{signal}`` on a subordinate (an ``In`` member).
    """


def is_axi(member: wiring.Member) -> bool:
    """Whether a component's member is an AXI port."""
    if not member.is_signature:
        return False
    # The signature of an In member is flipped.
    signature = member.signature if member.flow == Out else member.signature.flip()
    return isinstance(signature, AxiSignature)


def read_signature(width: int) -> AxiSignature:
    """The read half of an AXI4 port."""
    return AxiSignature({"ar": Out(stream.Signature(address_layout())), "r": In(stream.Signature(read_layout(width)))})


def write_signature(width: int) -> AxiSignature:
    """The write half of an AXI4 port."""
    return AxiSignature(
        {
            "aw": Out(stream.Signature(address_layout())),
            "w": Out(stream.Signature(write_layout(width))),
            "b": In(stream.Signature(acknowledge_layout())),
        }
    )


def lite_signature(address_bits: int) -> AxiSignature:
    """An AXI4-Lite port of 32 bits."""
    address = stream.Signature(data.StructLayout({"addr": unsigned(address_bits), "prot": 3}))
    return AxiSignature(
        {
            "aw": Out(address),
            "w": Out(stream.Signature(data.StructLayout({"data": 32, "strb": 4}))),
            "b": In(stream.Signature(data.StructLayout({"resp": Response}))),
            "ar": Out(address),
            "r": In(stream.Signature(data.StructLayout({"data": 32, "resp": Response}))),
        }
    )


def constant_address_fields(payload, width: int) -> list:
    """Assignments of the fields that are the same in every burst of a port of ``width`` bits."""
    return [
        payload.size.eq((width // 8 - 1).bit_length()),
        payload.burst.eq(INCR),
        payload.cache.eq(CACHE),
        payload.prot.eq(0),
        payload.id.eq(0),
    ]


def owed_layout(outstanding: int) -> data.StructLayout:
    """Bursts of a manager that are sent and not yet answered: their number, and the address of the oldest."""
    return data.StructLayout({"bursts": range(outstanding + 1), "oldest": unsigned(ADDRESS_BITS)})


def is_error(response):
    """Whether RRESP or BRESP reports an error."""
    return (response == Response.SLVERR) | (response == Response.DECERR)
