# SPDX-License-Identifier: Apache-2.0
"""``python -m sw.perplexity``: measures how well a model predicts a text, on one or several devices.

    python -m sw.perplexity smollm2 --text FILE --device onnxruntime,reference

The text is tokenised as one sequence and cut into N windows of L tokens that do not overlap. Each window starts with an
empty cache. The score of each of its tokens 2 to L is -ln of the probability that the model gives to the token after
those before it, from float64 log-softmax. Perplexity is exp(the mean over all scored tokens of all windows). Tokens
that the tokenizer puts in front of every text (mostly BOS) are read before each window as well, and are not scored.
"""

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence

from sw.common.command_line import Parser, check_positive
from sw.common.errors import UserError, run_cli
from sw.common.status_line import StatusLine
from sw.common.text_files import read_text
from sw.console.options import MODEL_HELP, add_cache_options, add_device_options, add_hardware_options, chosen_devices
from sw.console.output import print_json
from sw.console.perplexity_report import Report, print_table
from sw.runtime.hardware import ONNXRUNTIME
from sw.runtime.score import Score, score
from sw.runtime.setup import decoder_config, open_decoder, read_model
from sw.text.folder import encode
from sw.text.scoring import cut_windows

WINDOWS = 8
LENGTH = 512
MAX_TOKENS = 64
"""max_tokens of the hardware: longer blocks take less time, and the result does not depend on them."""


def _parser() -> Parser:
    parser = Parser(prog="python -m sw.perplexity", description="Measure how well a model predicts a text.")
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8; - is stdin")
    parser.add_argument("--windows", type=int, default=WINDOWS, metavar="N", help=f"(default: {WINDOWS})")
    parser.add_argument("--length", type=int, metavar="L", help=f"tokens of a window (default: {LENGTH})")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of the table")
    add_device_options(parser, f"some of reference, rtl, kv260 and {ONNXRUNTIME}, separated by commas")
    add_cache_options(parser)
    add_hardware_options(parser, max_tokens=MAX_TOKENS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    options = _parser().parse_args(arguments)
    names = options.device.split(",")
    check_positive(options.windows, "--windows")
    if options.length is not None and options.length < 2:
        raise UserError(f"--length is 2 or more, not {options.length}: a window's first token is not predicted")
    devices = chosen_devices(options, names, [ONNXRUNTIME])
    text = read_text(options.text)

    model = read_model(options.model)
    ids, beginning = encode(model.text.tokenizer, text, False), model.text.beginning()
    model.limits.check([*beginning, *ids])
    length = _length(options, model.limits.context, len(beginning))
    windows = cut_windows(ids, options.windows, length)
    if not windows:
        raise UserError(f"the text has {len(ids)} tokens, and at least 2 are needed: the first is not predicted")
    if sum(map(len, windows)) < options.windows * length:
        given = f"{len(windows)} of {options.windows} windows, the last of {len(windows[-1]):,} tokens"
        print(f"the text has {len(ids):,} tokens: {given}", file=sys.stderr, flush=True)
    context = len(beginning) + length
    config = decoder_config(model.path, names, devices.hardware, context)

    scores = []
    for name in names:
        with (
            StatusLine() as status,
            open_decoder(
                model.path, name, devices.memory, config, context, status, options.key_bits, devices.host
            ) as decoder,
        ):
            scores.append(score(decoder, name, beginning, windows, _progress(status, len(windows))))
    sizes = [len(window) for window in windows]
    report = Report(str(model.path), options.text, devices.shown_memory, config, sizes, scores)
    (print_json if options.json else print_table)(report)
    return 0


def _length(options: Namespace, context: int, before: int) -> int:
    """Tokens of a window. Raises UserError if they exceed the model's context."""
    most = context - before
    if options.length and options.length > most:
        raise UserError(f"--length is at most the model's own context ({most:,} tokens), not {options.length:,}")
    return options.length or min(LENGTH, most)


def _progress(status: StatusLine, total: int) -> Callable[[int, Score], None]:
    def scored(done: int, score: Score) -> None:
        form = f"{score.device}: window {{done}} of {{total}}"
        status.count(form, done, total, f", perplexity {score.perplexity:,.4f}")

    return scored


if __name__ == "__main__":
    run_cli(main)
