# SPDX-License-Identifier: Apache-2.0
"""The operations of attention: what a row sees, what is refused, and which bytes are written."""

import numpy as np
import pytest

from hw.spec.config import AcceleratorConfig
from hw.spec.control.refusal import parse
from hw.spec.memory.kv_cache import KeyCache, ValueCache
from hw.spec.numerics.attention import cache_keys, cache_values
from hw.spec.numerics.block_float import BlockFloat
from hw.spec.numerics.linear import NumericsError
from hw.spec.ops import APPEND, ATTENTION, SCORES, VALUES
from hw.spec.ops.append import AppendDescriptor
from hw.spec.ops.base import DescriptorWords, State
from hw.spec.ops.epilogue import float_bits
from hw.spec.ops.scores import ScoresDescriptor, bank_words, visible
from hw.spec.ops.values import ValuesDescriptor

CONFIG = AcceleratorConfig(operators="decoder", max_tokens=8, score_words=8 * 64)
SLOTS = 64
KEYS, VALUES_CACHE = KeyCache(CONFIG, 64, SLOTS, 8), ValueCache(CONFIG, 64, SLOTS)
ROWS, STREAM, EXPONENTS, RESULTS, CENTRE = 0x1000, 0x100000, 0x4000, 0x8000, 0xA000


class Bytes:
    """Memory. Implements hw.spec.ops.base.Memory."""

    def __init__(self) -> None:
        self.bytes = np.zeros(0x200000, np.uint8)

    def view(self, address: int, size: int) -> np.ndarray:
        assert address + size <= len(self.bytes)
        return self.bytes[address : address + size]


def append(keys: bool = True, **changes: int) -> AppendDescriptor:
    cache = KEYS if keys else VALUES_CACHE
    fields = {
        "keys": int(keys),
        "planes": cache.planes,
        "tokens": 3,
        "out_features": 64,
        "activations": ROWS,
        "activation_pitch": 512,
        "weights": STREAM,
        "weights_stride": cache.stride,
        "slot": 62,
        "slots": SLOTS,
        "exponents": 0 if keys else EXPONENTS,
    }
    return AppendDescriptor(**fields | changes)


def scores(**changes: int) -> ScoresDescriptor:
    fields = {
        "tokens": 3,
        "activations": ROWS,
        "activation_pitch": 256,
        "weights": STREAM,
        "turn": 50,
        "score_factor": float_bits(0.125),
    }
    made = ScoresDescriptor.from_cache(KEYS, 50, **fields)
    return ScoresDescriptor(**vars(made) | changes)


def values(**changes: int) -> ValuesDescriptor:
    fields = {
        "tokens": 3,
        "out_features": 64,
        "positions": 50,
        "slots": SLOTS,
        "weights": STREAM,
        "weights_stride": VALUES_CACHE.stride,
        "exponents": EXPONENTS,
        "results": RESULTS,
        "result_pitch": 256,
    }
    return ValuesDescriptor(**fields | changes)


@pytest.mark.parametrize("made", [append(), append(False), scores(), values()], ids=lambda made: type(made).__name__)
def test_words(made: DescriptorWords):
    """Fields do not overlap, and every value comes back."""
    op = next(op for op in ATTENTION.values() if op.fields == made.op_fields)
    found, clean = parse(made.to_words(), op.fields)
    assert clean and found == vars(made)
    assert [field.low for field in op.fields] == sorted(field.low for field in op.fields)
    assert all(one.low + one.width <= other.low for one, other in zip(op.fields, op.fields[1:], strict=False))
    assert not op.shape_is_wrong(CONFIG, vars(made), None)
    assert op.exists(CONFIG) and not op.exists(AcceleratorConfig(operators="decoder"))


@pytest.mark.parametrize(
    ("op", "made"),
    [
        (APPEND, append(tokens=9)),
        (APPEND, append(out_features=48)),
        (APPEND, append(out_features=288)),
        (APPEND, append(planes=1)),
        (APPEND, append(planes=3)),
        (APPEND, append(False, planes=4)),
        (APPEND, append(slot=64)),
        (APPEND, append(slots=0)),
        (APPEND, append(activation_pitch=128)),
        (APPEND, append(False, add=1)),
        (SCORES, scores(groups=3)),
        (SCORES, scores(planes=1)),
        (SCORES, scores(header_beats=4)),
        (SCORES, scores(body_words=17)),
        (SCORES, scores(out_features=65)),
        (SCORES, scores(turn=0)),
        (SCORES, scores(turn=65)),
        (SCORES, scores(turn=49)),
        (SCORES, scores(weights_stride=0)),
        (SCORES, scores(activation_pitch=128)),
        (VALUES, values(positions=65)),
        (VALUES, values(positions=0)),
        (VALUES, values(out_features=80)),
        (VALUES, values(result_pitch=128)),
    ],
)
def test_refused(op, made):
    assert op.shape_is_wrong(CONFIG, vars(made), None)


def test_scores_that_do_not_fit_a_bank():
    assert bank_words(8, 49) == 8 * 64
    small = AcceleratorConfig(operators="decoder", max_tokens=8, score_words=3 * 64)
    assert not SCORES.shape_is_wrong(small, vars(scores()), None)
    assert SCORES.shape_is_wrong(small, vars(scores(tokens=4)), None)
    assert VALUES.shape_is_wrong(small, vars(values(tokens=4)), None)


def seen(position: int, rows: int, window: int, slots: int, causal: bool) -> np.ndarray:
    """The definition by positions: the last row is the token at ``position``."""
    first = position - position % slots
    held = np.array([first + slot - slots * (slot > position % slots) for slot in range(min(position + 1, slots))])
    row = position - (rows - 1 - np.arange(rows))[:, None] * causal
    return (held >= 0) & (held <= row) & (held > row - (window or position + 1))


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize(("window", "slots"), [(0, 64), (5, 64), (5, 16), (30, 64), (60, 64)])
def test_what_a_row_sees(causal, window, slots):
    for position in range(4, 200 if window else slots):
        count = min(position + 1, slots)
        fields = {"tokens": 4, "out_features": count, "turn": position % slots + 1, "slots": slots}
        found = visible({**fields, "window": window, "causal": causal})
        assert np.array_equal(found, seen(position, 4, window, slots, bool(causal))), position
        assert found.any(axis=1).all()


@pytest.mark.parametrize("keys", [True, False])
def test_append_writes_a_position_and_nothing_else(keys):
    """Slot 0 follows the last one. All other bytes of memory stay as they were."""
    rng, memory = np.random.default_rng(5), Bytes()
    cache = KEYS if keys else VALUES_CACHE
    image = cache.image()
    memory.view(STREAM, len(image))[:] = image
    rows = rng.standard_normal((3, 128)).astype(np.float32)
    memory.view(ROWS, rows.nbytes)[:] = rows.view(np.uint8).reshape(-1)
    before = memory.bytes.copy()
    APPEND.execute(CONFIG, vars(append(keys)), memory, State())
    written = np.flatnonzero(memory.bytes != before)
    number, allowed = rounded(cache, rows[0, :64]), set()
    for slot in (62, 63, 0):
        allowed |= set((STREAM + cache.append(slot, number, cache.stride).offsets).tolist())
        if isinstance(cache, ValueCache):
            allowed |= set((EXPONENTS + cache.append_exponents(slot, number).offsets).tolist())
    assert len(written) > 100 and set(written.tolist()) <= allowed


def rounded(cache: KeyCache | ValueCache, row: np.ndarray) -> BlockFloat:
    return cache_keys(row, np.zeros(64, np.float32), 8) if isinstance(cache, KeyCache) else cache_values(row)


def test_a_centre_is_added():
    rng, results = np.random.default_rng(6), []
    rows = rng.standard_normal((3, 128)).astype(np.float32)
    centre = rng.standard_normal(64).astype(np.float32)
    for made, source in (
        (append(add=1, addend=CENTRE), rows),
        (append(), rows + np.concatenate([centre, centre])),
    ):
        memory = Bytes()
        memory.view(STREAM, KEYS.bytes)[:] = KEYS.image()
        memory.view(CENTRE, centre.nbytes)[:] = centre.view(np.uint8)
        memory.view(ROWS, source.nbytes)[:] = source.astype(np.float32).view(np.uint8).reshape(-1)
        APPEND.execute(CONFIG, vars(made), memory, State())
        results.append(memory.view(STREAM, KEYS.bytes).copy())
    assert np.array_equal(*results)


def test_numbers_that_are_not_finite():
    memory = Bytes()
    memory.view(ROWS, 4).view(np.float32)[:] = np.inf
    for keys in (True, False):
        with pytest.raises(NumericsError, match="finite numbers, not inf"):
            APPEND.execute(CONFIG, vars(append(keys)), memory, State())
    with pytest.raises(NumericsError, match="finite numbers, not inf"):
        SCORES.execute(CONFIG, vars(scores()), memory, State())
