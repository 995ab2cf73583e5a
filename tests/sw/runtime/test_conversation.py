# SPDX-License-Identifier: Apache-2.0
"""Several turns with one decoder: a turn computes only what is new, and its logits are those of an empty cache."""

import pytest

from sw.runtime import BaseDecoder, ProgramDecoder
from sw.runtime.cache_file import load_cache, save_cache
from sw.runtime.conversation import Conversation, common
from tests.sw.fixtures.linears import same_bits
from tests.sw.runtime.test_cache_file import KINDS, host, model, whole
from tests.sw.runtime.test_decoder import DATA, IDS, changed, relative
from tests.sw.runtime.test_device_attention import narrow

__all__ = ["model"]

pytestmark = pytest.mark.slow


def read(decoder: BaseDecoder, ids: list[int], start: int):
    """Computes a prompt's tokens from `start` on, in blocks; the last one's logits."""
    while len(ids) - start > decoder.block:
        decoder.prefill(ids[start : start + decoder.block])
        start += decoder.block
    return decoder.forward(ids[start:])


def turn(conversation: Conversation, decoder: BaseDecoder, fresh: BaseDecoder, ids: list[int], answer: int = 2) -> int:
    """A turn whose answer has some tokens; the number of prompt tokens that it did not compute."""
    known = conversation.begin(ids)
    assert decoder.length == known < len(ids)
    before = decoder.usage.tokens
    logits = read(decoder, ids, known)
    assert decoder.usage.tokens - before == len(ids) - known
    fresh.reset()
    expected = read(fresh, ids, 0)
    # onnxruntime's attention rounds in another way if a call has other tokens.
    on_device = isinstance(decoder, ProgramDecoder) and decoder.whole
    assert same_bits(logits, expected) if on_device else relative(logits, expected) < 5e-3
    said = IDS[:answer]
    for token in said[:-1]:
        decoder.forward([token])
    conversation.end([*ids, *said])
    return known


TURNS = {
    "longer": ([*IDS[:9]], [*IDS[:9], *IDS[:2], *IDS[9:18]], 10),
    "another answer": ([*IDS[:9]], [*IDS[:9], 7, 8, 9], 9),
    "another message": ([*IDS[:9]], [*IDS[:4], 7, 8], 4),
    "shorter": ([*IDS[:9]], [*IDS[:6]], 5),
    "the same": ([*IDS[:9]], [*IDS[:9]], 8),
    "nothing in common": ([*IDS[:9]], [299, 1, 2], 0),
}


@pytest.mark.parametrize(("first", "second", "known"), TURNS.values(), ids=TURNS)
@pytest.mark.parametrize("kind", KINDS)
def test_turns(kind, first, second, known, model):
    """The third turn follows the second."""
    decoder, fresh = KINDS[kind](model), KINDS[kind](model)
    conversation = Conversation(decoder)
    assert turn(conversation, decoder, fresh, first) == 0
    assert turn(conversation, decoder, fresh, second) == known
    assert turn(conversation, decoder, fresh, [*second, IDS[0], 5, 6]) == len(second) + 1


def test_a_cache_that_grows():
    """A graph whose cache is not changed in place."""
    decoder, fresh = (host(DATA / "optimum_qwen2.onnx") for _ in range(2))
    conversation = Conversation(decoder)
    assert turn(conversation, decoder, fresh, IDS[:9]) == 0
    assert turn(conversation, decoder, fresh, [*IDS[:6], 5, 6]) == 6


def test_windows(model, tmp_path):
    """A cache that has begun again has lost its first positions for good, also when it was shortened in between."""
    path = changed(model, tmp_path, lambda graph: narrow(graph, 3))
    decoder, fresh = whole(path), whole(path)
    conversation = Conversation(decoder)
    assert turn(conversation, decoder, fresh, IDS[:19]) == 0
    assert turn(conversation, decoder, fresh, [*IDS[:12], 1], 1) == 12
    save_cache(tmp_path / "cache", decoder, [*IDS[:12], 1])
    assert load_cache(tmp_path / "cache", later := whole(path), [*IDS[:12], 2]) == 12
    assert later.reached == 20
    assert load_cache(tmp_path / "cache", whole(path), [*IDS[:8], 2, 3]) == 0
    assert turn(conversation, decoder, fresh, [*IDS[:8], 2, 3]) == 0


def test_interrupted_turn(model):
    """A turn that ends early leaves a cache that the next one can use."""
    decoder, fresh = whole(model), whole(model)
    conversation = Conversation(decoder)
    conversation.begin(IDS[:12])
    decoder.prefill(IDS[:8])
    conversation.end(IDS[:12])
    assert turn(conversation, decoder, fresh, IDS[:12]) == 8
    decoder.reset()
    assert turn(conversation, decoder, fresh, IDS[:12]) == 0


def test_common():
    assert [common([1, 2, 3], other) for other in ([], [1], [1, 2, 3, 4], [2], [1, 5, 3])] == [0, 1, 3, 0, 1]
