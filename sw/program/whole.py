# SPDX-License-Identifier: Apache-2.0
"""The hardware on which a whole token of a graph runs, attention included."""

from dataclasses import replace

from hw.spec.config import RULES, AcceleratorConfig, ConfigError, Limit
from hw.spec.memory.kv_cache import check_cache
from hw.spec.ops.scores import bank_words
from sw.graph.file import OnnxFile
from sw.graph.match import match_decoder
from sw.model.parts import Attention, Decoder, Mismatch
from sw.program.attention import check_attention, check_padding
from sw.program.load import attention_of
from sw.program.obstacles import Obstacle, check_decoder

LEAST_SCORE_WORDS = 1 << 13
"""Chosen where it is enough (16 tokens that see 512 positions), so that most answers have the same hardware, which is
simulated after one build."""


def score_words_for(max_tokens: int, context: int) -> int:
    """The least power of two from LEAST_SCORE_WORDS on with which `max_tokens` rows at once see the whole context.

    A long context may take more than hardware can have. The result is then the most, and fewer rows run at once.
    """
    rule = RULES["score_words"]
    assert isinstance(rule, Limit)
    wanted = bank_words(max_tokens, context)
    return min(max(LEAST_SCORE_WORDS, 1 << (wanted - 1).bit_length()), rule.high)


def attentions_of(config: AcceleratorConfig, file: OnnxFile, decoder: Decoder, context: int) -> list[Attention]:
    """The attention of each block as hardware computes it, see check_attention. Raises Obstacle if it cannot."""
    attentions = check_attention(config, [attention_of(block) for block in decoder.blocks], context)
    check_padding(config, file, decoder)
    return attentions


def config_with_attention(config: AcceleratorConfig, file: OnnxFile, context: int) -> AcceleratorConfig:
    """The same hardware with attention for this graph and this number of positions.

    Raises Obstacle, with the reason, if hardware or graph do not allow it.
    """
    decoder = check_decoder(file, match_decoder(file), context)
    try:
        config = replace(config, score_words=score_words_for(config.max_tokens, context))
        check_cache(config)
    except ConfigError as error:
        raise Obstacle(Mismatch("the hardware", str(error))) from None
    attentions_of(config, file, decoder, context)
    return config
