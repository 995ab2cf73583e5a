# SPDX-License-Identifier: Apache-2.0
"""The attention of single blocks on a device, compared with its definition in hw.spec.numerics."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hw.spec.config import AcceleratorConfig
from hw.spec.memory.kv_cache import KEY_BITS
from hw.spec.memory.operands import FLOAT_BYTES
from hw.spec.numerics.attention import attention, cache_keys, cache_values
from sw.devices.base import Device
from sw.devices.jobs import Job, Rows
from sw.model.parts import Attention
from sw.ort.capture_attention import CapturedAttention
from sw.program.attention import DeviceAttention
from sw.program.keys import KeyForm


@dataclass(frozen=True)
class AttentionResult:
    """One block's attention of the last `tokens` of all positions, its appends included.

    Members
    -------
    cycles: of the device; 0 without hardware. beats: of the caches that were read.
    exact: every result equals the definition's, bit for bit.
    relative_error: max|y - y_ort| / max|y_ort|.
    """

    name: str
    tokens: int
    positions: int
    key_bits: int
    cycles: int
    beats: int
    exact: bool
    relative_error: float


def key_bits_of(has_bias: bool) -> int:
    """Bits of a block's keys here: 16 if they have a bias, see sw.program.keys."""
    return max(KEY_BITS) if has_bias else min(KEY_BITS)


def run_attention(
    device: Device,
    attentions: Sequence[Attention],
    bits: Sequence[int],
    captured: Sequence[CapturedAttention],
    tokens: int,
    timeout: float,
) -> Iterator[AttentionResult]:
    """Runs blocks whose attention `check_attention` returned. bits: of each block's keys. tokens: at most max_tokens.

    Raises DeviceError if the memory is full, or if the device fails.
    """
    positions = len(captured[0].q)
    forms = [
        [KeyForm(None, width, np.ones(part.head_size, np.float32))] * part.kv_heads
        for part, width in zip(attentions, bits, strict=True)
    ]
    on_device = DeviceAttention(device, attentions, forms, positions)
    on_device.use()
    for index, (part, work) in enumerate(zip(attentions, captured, strict=True)):
        size, padding = part.head_size, part.head_size - work.q.shape[-1]
        heads = np.pad(np.concatenate([work.q, work.k, work.v], axis=1), [(0, 0), (0, 0), (0, padding)])
        pitch, first = FLOAT_BYTES * heads.shape[1] * size, positions - tokens
        qkv, output = device.alloc(positions * pitch), device.alloc(FLOAT_BYTES * tokens * part.heads * size)
        device.write(qkv, np.ascontiguousarray(heads))
        # A result that the device does not write stays NaN.
        device.write(output, np.full(output.size // FLOAT_BYTES, np.nan, np.float32))
        jobs: list[Job] = []
        for start in range(0, first, device.config.max_tokens):
            count = min(device.config.max_tokens, first - start)
            jobs += on_device.append_jobs(index, count, start, Rows(qkv.part(start * pitch), pitch))
        last, results = Rows(qkv.part(first * pitch), pitch), Rows(output, FLOAT_BYTES * part.heads * size)
        jobs += on_device.append_jobs(index, tokens, first, last)
        jobs += on_device.jobs(index, tokens, first, last, results, last=False)
        done = device.wait(device.submit(jobs), timeout)
        y = device.read(output, np.float32, (tokens, part.heads, size))
        device.free(qkv)
        device.free(output)
        expected = defined(device.config, part, heads, tokens, bits[index])
        wanted = work.y[first:].astype(np.float64)
        error = np.abs(y[..., : work.q.shape[-1]] - wanted).max() / max(np.abs(wanted).max(), np.finfo(np.float32).tiny)
        yield AttentionResult(
            name=f"layers.{index}.self_attn",
            tokens=tokens,
            positions=positions,
            key_bits=bits[index],
            cycles=sum(one.cycles for one in done),
            beats=sum(one.beats for one in done),
            exact=bool(np.array_equal(y.view(np.uint32), expected.view(np.uint32))),
            relative_error=float(np.nan_to_num(error)),
        )


def defined(config: AcceleratorConfig, part: Attention, heads: np.ndarray, tokens: int, bits: int) -> np.ndarray:
    """The results by hw.spec.numerics: float32 [tokens, heads, size]. heads: of q, k, v, [positions, heads, size]."""
    total, shared = len(heads), part.heads // part.kv_heads
    position, row = np.arange(total), np.arange(total - tokens, total)[:, None]
    visible = (position <= row) & (position > row - (part.window or total))
    centre, scale = np.zeros(part.head_size, np.float32), np.array(part.scale, np.float32)
    outputs = []
    for head in range(part.heads):
        key = part.heads + head // shared
        cached = cache_keys(heads[:, key], centre, bits), cache_values(heads[:, key + part.kv_heads])
        outputs.append(attention(config, heads[total - tokens :, head], *cached, scale, visible))
    return np.ascontiguousarray(np.stack(outputs, axis=1))
