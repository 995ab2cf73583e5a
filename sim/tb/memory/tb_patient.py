# SPDX-License-Identifier: Apache-2.0
"""A client of the read manager that waits while bursts of the first client are under way, and no longer."""

import cocotb

from sim.bench.dut import begin, payload
from sim.bench.monitor import Monitor
from sim.bench.streams import StreamSource, cycle, read, until
from sim.tb.memory.tb_burst_cutter import BOUNDARY
from sim.tb.memory.tb_read_manager import _ImmediateMemory

FIRST, PATIENT, OTHER = CLIENTS = range(3)
BEATS, DELAY = 4, 40
"""Beats of a burst, and cycles from AR to its first beat."""


@cocotb.test()
@cocotb.parametrize(count=[1, 3, 8, 12])
async def waits_for_the_first_client(dut, count):
    """The patient client's bursts come after the last beat of the first client's; another client does not wait."""
    sources = [StreamSource(dut, f"bursts_{client}", dut.clk) for client in CLIENTS]
    for client in CLIENTS:
        getattr(dut, f"beats_{client}_ready").value = 1
    memory, times = _ImmediateMemory(dut, DELAY), Monitor(dut, (), ("m_axi_axi_arvalid", "m_axi_axi_rvalid"))

    def send(client: int, number: int) -> None:
        addresses = [BOUNDARY * (16 * client + index) for index in range(number)]
        sources[client].send(payload("bursts_0").pack(address=addresses, beats=[BEATS] * number))

    def asked() -> list[int]:
        return [address // BOUNDARY // 16 for address, _ in memory.bursts]

    await begin(dut)
    send(FIRST, count)
    await until(dut.clk, lambda: read(dut.under_way) > 0, "the first burst", 100)
    send(PATIENT, 3)
    send(OTHER, 1)
    await until(dut.clk, lambda: len(asked()) == count + 4, "all bursts", 800)
    assert asked() == [FIRST] * count + [OTHER] + [PATIENT] * 3
    # All bursts but the patient ones are requested before the first client's last beat has come.
    requests, beats = times["m_axi_axi_arvalid"], times["m_axi_axi_rvalid"]
    assert 1 < requests[count + 1] - beats[count * BEATS - 1] <= 4
    # A burst of the first client does not wait for patient ones.
    send(FIRST, 1)
    await until(dut.clk, lambda: len(asked()) == count + 5, "the burst", 8)
    await until(dut.clk, lambda: read(dut.under_way) == 0, "all data", 800)
    await cycle(dut.clk, 4)
    assert len(times["m_axi_axi_rvalid"]) == BEATS * (count + 5)
