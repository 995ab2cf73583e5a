# SPDX-License-Identifier: Apache-2.0
"""``python -m sw.perplexity``: how well a model predicts a text, on a device or several.

    python -m sw.perplexity smollm2 --text FILE --device onnxruntime,reference

The text is tokenised as one sequence and cut into windows of L tokens that do not overlap, N of them. Each is scored
with an empty cache: -ln of the probability that the model gives to its tokens 2 to L after those before them, from
float64 log-softmax. Perplexity is exp(the mean over all tokens scored in all windows). What the tokenizer puts in front
of every text (BOS, mostly) is read before each window as well, and scores nothing.
"""

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence

import numpy as np

from sw.decoder_setup import decoder_config, decoder_limits, open_decoder
from sw.errors import UserError, run_cli
from sw.hardware_options import (
    MODEL_HELP,
    ONNXRUNTIME,
    Parser,
    add_device_options,
    add_hardware_options,
    check_devices,
    check_positive,
    hardware_options,
)
from sw.models import resolve_model
from sw.perplexity_report import Report, Score, print_json, print_table
from sw.runtime import Decoder
from sw.status_line import StatusLine
from sw.text_files import read_text
from sw.text_folder import encode, open_text

WINDOWS = 8
LENGTH = 512
MAX_TOKENS = 64
"""Of the hardware: the longer the blocks, the sooner the result, which does not depend on them."""


def cut_windows(ids: Sequence[int], windows: int, length: int) -> list[list[int]]:
    """At most `windows` windows of `length` tokens; the last may be shorter, but has at least 2 tokens."""
    starts = range(0, min(len(ids), windows * length), length)
    return [list(ids[start : start + length]) for start in starts if len(ids) - start >= 2]


def negative_log_likelihood(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-ln softmax(logits)[target], float64 [M], of float [M, vocab] logits and int [M] targets.

    Raises UserError if logits are not finite, or no target of a model with so many tokens.
    """
    if targets.max() >= logits.shape[1]:
        raise UserError(f"the text has token {targets.max()}, and the model knows {logits.shape[1]} tokens")
    if not np.isfinite(logits).all():
        raise UserError("the model's logits are not finite (NaN or infinity)")
    steps = logits.astype(np.float64)
    steps -= steps.max(axis=1, keepdims=True)
    return np.log(np.exp(steps).sum(axis=1)) - steps[np.arange(len(targets)), targets]


def score_window(decoder: Decoder, beginning: Sequence[int], window: Sequence[int]) -> np.ndarray:
    """-ln p of a window's tokens 2 to L, float64 [L - 1]. beginning: tokens to be read before it."""
    decoder.reset()
    # The last token predicts nothing that is scored.
    ids = [*beginning, *window[:-1]]
    targets = np.array(window[1:])
    parts = []
    for start in range(0, len(ids), decoder.block):
        block = ids[start : start + decoder.block]
        logits = decoder.forward(block, every=True)
        # Row i predicts token i + 1 of all; the first target is the window's second token.
        first = start - len(beginning)
        rows = logits[max(0, -first) :]
        if len(rows):
            first = max(0, first)
            parts.append(negative_log_likelihood(rows, targets[first : first + len(rows)]))
    return np.concatenate(parts)


def score(
    decoder: Decoder,
    device: str,
    beginning: Sequence[int],
    windows: Sequence[Sequence[int]],
    scored: Callable[[int, Score], None] = lambda done, score: None,
) -> Score:
    """The score over windows of at least 2 tokens each. scored: called with windows done and the score until then."""
    result, start = Score(device), time.perf_counter()
    for done, window in enumerate(windows, 1):
        values = score_window(decoder, beginning, window)
        result.tokens += len(values)
        result.nll += float(values.sum())
        result.cycles, result.seconds = decoder.usage.cycles, time.perf_counter() - start
        scored(done, result)
    return result


def _parser() -> Parser:
    parser = Parser(prog="python -m sw.perplexity", description="How well a model predicts a text.")
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8; - is stdin")
    parser.add_argument("--windows", type=int, default=WINDOWS, metavar="N", help=f"(default: {WINDOWS})")
    parser.add_argument("--length", type=int, metavar="L", help=f"tokens of a window (default: {LENGTH})")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of the table")
    add_device_options(parser, f"some of reference, rtl, kv260 and {ONNXRUNTIME}, separated by commas")
    add_hardware_options(parser, max_tokens=MAX_TOKENS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    options = _parser().parse_args(arguments)
    names = options.device.split(",")
    memory = check_devices(names, options.memory, [ONNXRUNTIME])
    check_positive(options.windows, "--windows")
    if options.length is not None and options.length < 2:
        raise UserError(f"--length is 2 or more, not {options.length}: a window's first token is not predicted")
    hardware, _ = hardware_options(options)
    text = read_text(options.text)

    model = resolve_model(options.model)
    folder = open_text(model)
    ids, beginning = encode(folder.tokenizer, text, False), folder.beginning()
    limits = decoder_limits(model, folder.context)
    limits.check([*beginning, *ids])
    length = _length(options, limits.context, len(beginning))
    windows = cut_windows(ids, options.windows, length)
    if not windows:
        raise UserError(f"the text has {len(ids)} tokens, and at least 2 are needed: the first is not predicted")
    if sum(map(len, windows)) < options.windows * length:
        given = f"{len(windows)} of {options.windows} windows, the last of {len(windows[-1]):,} tokens"
        print(f"the text has {len(ids):,} tokens: {given}", file=sys.stderr, flush=True)
    config = decoder_config(model, names, hardware)

    scores = []
    for name in names:
        context = len(beginning) + length
        with StatusLine() as status, open_decoder(model, name, memory, config, context, status) as decoder:
            scores.append(score(decoder, name, beginning, windows, _progress(status, len(windows))))
    sizes = [len(window) for window in windows]
    report = Report(str(model), options.text, memory if "rtl" in names else None, config, sizes, scores)
    (print_json if options.json else print_table)(report)
    return 0


def _length(options: Namespace, context: int, before: int) -> int:
    """Tokens of a window. Raises UserError for more than the model was made for."""
    most = context - before
    if options.length and options.length > most:
        raise UserError(f"--length is at most what the model was made for ({most:,} tokens), not {options.length:,}")
    return options.length or min(LENGTH, most)


def _progress(status: StatusLine, total: int) -> Callable[[int, Score], None]:
    def scored(done: int, score: Score) -> None:
        form = f"{score.device}: window {{done}} of {{total}}"
        status.count(form, done, total, f", perplexity {score.perplexity:,.4f}")

    return scored


if __name__ == "__main__":
    run_cli(main)
