# SPDX-License-Identifier: Apache-2.0
"""The order in which the activation unit gets the rows of a layer of several tokens."""

from typing import NamedTuple

from amaranth.hdl import Const, Module, Mux, Signal, Value

from hw.rtl.common.walker import Walker
from hw.spec.config import AcceleratorConfig
from hw.spec.memory.access import PIECE_FLOATS


class Run(NamedTuple):
    """The place of the loader's row in its run, the rows of a token that follow each other.

    These are all rows of a token, or with ``by_pieces`` those of a piece.
    """

    starts: Value
    """The row is the first one of its run."""
    ends: Value
    """It is the last one of its run."""
    complete: Value
    """The run is the last one of its token."""
    resumes: Value
    """The run is not the first one of its token."""
    turns: Value
    """The run is the last one of its piece, and the first token's next run follows."""
    token: Value
    """The run's token, if it is one of several."""


def find_runs(m: Module, config: AcceleratorConfig, loader: Walker) -> Run:
    """The runs of the loader's layer.

    The loader counts the rows of a layer, in whichever order they come. The order by pieces has counters of its own.
    """
    starts, ends = loader.first.slice & loader.first.group, loader.last.slice & loader.last.group
    if not config.reads_by_pieces:
        return Run(starts, ends, Const(1), Const(0), Const(0), Const(0))
    command, by_pieces = loader.command.payload, loader.current.by_pieces
    most = PIECE_FLOATS // config.tile
    bits = most.bit_length() - 1
    rest, pieces = command.last_slice[:bits], command.last_slice[bits:]
    # Index in the run and whether it is the last one; pieces after this one and whether there is none; the same of
    # the tokens of the piece. The length of the last run minus 1, and whether it is a single row.
    index, run_last, run_first = Signal(range(most)), Signal(), Signal()
    left, final, first = Signal(max(1, len(pieces))), Signal(), Signal()
    tokens, token_last = Signal.like(command.tokens), Signal()
    token, length, single = Signal(range(config.max_tokens)), Signal(range(most)), Signal()
    with m.If(loader.step):
        m.d.sync += [
            index.eq(Mux(run_last, 0, index + 1)),
            run_first.eq(run_last),
            run_last.eq(
                Mux(
                    run_last,
                    single & Mux(token_last, left == 1, final),
                    index + 1 == Mux(final, length, most - 1),
                )
            ),
        ]
        with m.If(run_last):
            m.d.sync += [
                tokens.eq(Mux(token_last, loader.current.tokens, tokens - 1)),
                token_last.eq(tokens == 2),
                token.eq(Mux(token_last, 0, token + 1)),
            ]
        with m.If(run_last & token_last):
            m.d.sync += [left.eq(left - 1), final.eq(left == 1), first.eq(0)]
    with m.If(loader.command.valid & loader.command.ready):
        m.d.sync += [
            index.eq(0),
            run_first.eq(1),
            run_last.eq((pieces == 0) & (rest == 0)),
            left.eq(pieces),
            final.eq(pieces == 0),
            first.eq(1),
            # A layer of one token is not read by pieces.
            tokens.eq(command.tokens),
            token_last.eq(0),
            token.eq(0),
            length.eq(rest),
            single.eq(rest == 0),
        ]
    return Run(
        Mux(by_pieces, run_first, starts),
        Mux(by_pieces, run_last, ends),
        ~by_pieces | final,
        by_pieces & ~first,
        by_pieces & token_last,
        token,
    )
