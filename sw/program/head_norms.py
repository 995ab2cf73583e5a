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
    norms: Sequence[LoadedHeadNorm], tokens: int, max_rows: int, qkv: Rows, scaled: Rows, rotation: Rotation | None
) -> list[Job]:
    """The jobs of the norms of a block, which change the heads of all tokens in place; as few as possible.

    The first job waits for the linear layers that make the heads. max_rows: rows of a job, at least `tokens`. qkv: rows
    of the tokens. scaled: a place for `max_rows` rows of a head. rotation: that of one head, by the rows of
    the tokens; None: no rotation.
    """
    of_tokens = tokens * sum(ceil_div(norm.heads, max_rows) for norm in norms)
    of_heads = sum(norm.heads for norm in norms)
    jobs: list[Job] = []
    for norm in norms:
        parts = _tokens(norm, tokens, max_rows, qkv, rotation) if of_tokens <= of_heads else _heads(norm, qkv, rotation)
        for rows, heads, turned in parts:
            # After the first wait the heads of all jobs are in memory: no job reads what another one wrote there.
            wait = Wait.NOTHING if jobs else Wait.ACTIVATIONS
            squares = Epilogue(second=Second(norm.weight, scaled), epsilon=norm.epsilon)
            results = Epilogue(scale=True, rotation=turned)
            count, size = rows or tokens, norm.head_size
            jobs += [
                VectorJob(f"{norm.name}, squares", count, size, heads, wait=wait, epilogue=squares),
                VectorJob(norm.name, count, size, scaled, heads.buffer, Wait.ACTIVATIONS, results, heads.pitch),
            ]
    return jobs


_Part = tuple[int | None, Rows, Rotation | None]
"""Number of rows of two jobs (None: one for each token), their place, and their rotation."""


def _tokens(norm: LoadedHeadNorm, tokens: int, max_rows: int, qkv: Rows, rotation: Rotation | None) -> Iterator[_Part]:
    """The heads of one token after the other."""
    size = FLOAT_BYTES * norm.head_size
    for token in range(tokens):
        for head in range(0, norm.heads, max_rows):
            place = token * qkv.pitch + FLOAT_BYTES * norm.first + head * size
            rows = Rows(qkv.buffer.part(place), size)
            yield min(max_rows, norm.heads - head), rows, rotation and rotation.row(token)


def _heads(norm: LoadedHeadNorm, qkv: Rows, rotation: Rotation | None) -> Iterator[_Part]:
    """One head after the other, of all tokens."""
    for head in range(norm.heads):
        place = FLOAT_BYTES * (norm.first + head * norm.head_size)
        yield None, Rows(qkv.buffer.part(place), qkv.pitch), rotation
