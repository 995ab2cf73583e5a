# SPDX-License-Identifier: Apache-2.0
"""The norms of every head of queries and keys, as jobs whose rows are heads.

A norm takes two jobs: the first writes `x * weight` to a place of its own and computes r of each row; the second
multiplies by r, rotates, and writes to the heads' place. r of a row is kept until the next job that computes it, so the
two jobs of a norm follow each other, and the jobs of the linear layers that need r of the tokens come before.

The rows of a job are the heads of one token, which share a row of the rotary table, or one head of all tokens.
"""

from collections.abc import Iterator, Sequence

from hw.spec.memory.geometry import ceil_div
from hw.spec.memory.operands import FLOAT_BYTES
from hw.spec.ops import Wait
from sw.devices.jobs import Epilogue, Job, Rotation, Rows, Second, VectorJob
from sw.program.load import LoadedHeadNorm


def head_norm_jobs(
    norms: Sequence[LoadedHeadNorm], tokens: int, max_rows: int, qkv: Rows, scaled: Rows, table: Rows | None
) -> list[Job]:
    """The jobs of the norms of a block, which change the heads of all tokens in place; as few as possible.

    The first job waits for the linear layers that make the heads. max_rows: rows of a job, at least `tokens`. qkv: rows
    of the tokens. scaled: a place for `max_rows` rows of a head. table: rows of the tokens for the rotation; None: no
    rotation.
    """
    of_tokens = tokens * sum(ceil_div(norm.heads, max_rows) for norm in norms)
    of_heads = sum(norm.heads for norm in norms)
    jobs: list[Job] = []
    for norm in norms:
        parts = _tokens(norm, tokens, max_rows, qkv, table) if of_tokens <= of_heads else _heads(norm, qkv, table)
        for rows, heads, turn in parts:
            # After the first wait the heads of all jobs are in memory: no job reads what another one wrote there.
            wait = Wait.NOTHING if jobs else Wait.ACTIVATIONS
            squares = Epilogue(second=Second(norm.weight, scaled), epsilon=norm.epsilon)
            rotation = None if turn is None else Rotation(turn, norm.head_size, 1)
            results = Epilogue(scale=True, rotation=rotation)
            count, size = rows or tokens, norm.head_size
            jobs += [
                VectorJob(f"{norm.name}, squares", count, size, heads, wait=wait, epilogue=squares),
                VectorJob(norm.name, count, size, scaled, heads.buffer, Wait.ACTIVATIONS, results, heads.pitch),
            ]
    return jobs


_Part = tuple[int | None, Rows, Rows | None]
"""Number of rows of two jobs (None: one for each token), their place, and their rows of the rotary table."""


def _tokens(norm: LoadedHeadNorm, tokens: int, max_rows: int, qkv: Rows, table: Rows | None) -> Iterator[_Part]:
    """The heads of one token after the other."""
    size = FLOAT_BYTES * norm.head_size
    for token in range(tokens):
        turn = None if table is None else Rows(table.buffer.part(token * table.pitch))
        for head in range(0, norm.heads, max_rows):
            place = token * qkv.pitch + FLOAT_BYTES * norm.first + head * size
            yield min(max_rows, norm.heads - head), Rows(qkv.buffer.part(place), size), turn


def _heads(norm: LoadedHeadNorm, qkv: Rows, table: Rows | None) -> Iterator[_Part]:
    """One head after the other, of all tokens."""
    for head in range(norm.heads):
        place = FLOAT_BYTES * (norm.first + head * norm.head_size)
        yield None, Rows(qkv.buffer.part(place), qkv.pitch), table
