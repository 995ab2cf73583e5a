# SPDX-License-Identifier: Apache-2.0
"""From scores to the activations of values."""

from amaranth.hdl import Module
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from hw.rtl.attention.layouts import row_layout, scores_layout
from hw.rtl.attention.score_banks import ScoreBanks
from hw.rtl.attention.value_rows import ValueRows, values_layout
from hw.rtl.common.block import Block
from hw.rtl.common.clock_gate import SETTLING, gate
from hw.rtl.common.float32 import FLOAT
from hw.rtl.common.results import output_payload
from hw.rtl.vector.layouts import result_unit
from hw.spec.config import AcceleratorConfig
from hw.spec.ops.scores import BANKS


class Probabilities(Block):
    """Takes scores, computes their softmax, and gives the activations of values.

    A bank is used by scores, then by their values, until it is released. Jobs may come earlier: those of scores are
    taken when their bank is free, and values wait for the softmax, chunk by chunk.

    Members
    -------
    scores_job, scores : the scores of a descriptor, and their values as the vector unit gives them
    stored : a descriptor's scores are stored, and their maxima are known; one cycle
    values_job, exponents : the values of a descriptor, and the powers of two of the cache; see
        :class:`hw.rtl.attention.value_rows.ValueRows`
    rows : float32: the activations
    inverted : by bank: 1/S of all of its rows can be read
    row, inverse : a row, and its 1/S in the same cycle
    release : by bank: it is free again; only while it is ``inverted``, and when its rows have been given
    """

    container = True

    def __init__(self, config: AcceleratorConfig):
        self.config = config
        self.banks, self.values = ScoreBanks(config), ValueRows(config)
        results = output_payload(config, config.vector_lanes, result_unit(config))
        super().__init__(
            {
                "scores_job": In(stream.Signature(scores_layout(config))),
                "scores": In(stream.Signature(results)),
                "stored": Out(1),
                "values_job": In(stream.Signature(values_layout(config))),
                "exponents": In(stream.Signature(self.values.exponents.payload.shape())),
                "rows": Out(stream.Signature(self.values.rows.payload.shape())),
                "inverted": Out(BANKS),
                "row": In(row_layout(config)),
                "inverse": Out(FLOAT),
                "release": In(BANKS),
            }
        )

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {**self.banks.properties(), "row_latency": self.values.latency}

    def elaborate(self, platform) -> Module:
        m = Module()
        banks, values = self.banks, self.values
        (m.submodules.banks,) = gate(
            m,
            platform,
            banks,
            name="banks",
            cycles=banks.settling,
            events=[banks.works, banks.read, banks.release],
        )
        (m.submodules.value_rows,) = gate(
            m,
            platform,
            values,
            name="value_rows",
            cycles=SETTLING,
            events=[values.read],
            watch=[values.ready],
        )
        wiring.connect(m, wiring.flipped(self.scores_job), banks.job)
        wiring.connect(m, wiring.flipped(self.scores), banks.results)
        wiring.connect(m, wiring.flipped(self.values_job), values.job)
        wiring.connect(m, wiring.flipped(self.exponents), values.exponents)
        wiring.connect(m, values.rows, wiring.flipped(self.rows))
        m.d.comb += [
            self.stored.eq(banks.stored),
            values.ready.eq(banks.ready),
            values.busy.eq(banks.busy),
            *(banks.finished[index].eq(values.finished & (values.bank == index)) for index in range(BANKS)),
            *(getattr(banks, name).eq(getattr(values, name)) for name in ("read", "bank", "address")),
            values.word.eq(banks.word),
            self.inverted.eq(banks.inverted),
            banks.row.eq(self.row),
            self.inverse.eq(banks.inverse),
            banks.release.eq(self.release),
        ]
        return m
