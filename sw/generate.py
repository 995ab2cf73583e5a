# SPDX-License-Identifier: Apache-2.0
"""``python -m sw.generate``: a model answers a prompt, its linear layers on a device, the rest in onnxruntime.

    python -m sw.generate --prompt "What is the capital of France?" --max-new-tokens 8 --device rtl

The text streams to stdout; afterwards a table of cycles and tokens/s (see sw.console.generate_report), or with --json
one document instead of both. What the devices compute is the same bit for bit, so the text does not depend on them;
``--device onnxruntime`` runs the same graph without the accelerator's arithmetic, for comparison.
"""

import io
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from sw.common.command_line import Parser, check_positive
from sw.common.errors import UserError, run_cli
from sw.common.status_line import StatusLine, stderr_is_stdout
from sw.common.text_files import read_text
from sw.console.generate_report import Answer, Phase, Report, print_json, print_table
from sw.console.options import MODEL_HELP, add_device_options, add_hardware_options, check_devices, hardware_options
from sw.export.resolve import resolve_model
from sw.runtime import Decoder
from sw.runtime.hardware import ONNXRUNTIME
from sw.runtime.setup import decoder_config, decoder_limits, open_decoder
from sw.text.folder import TextFolder, open_text
from sw.text.sampling import Sampler

MODEL = "smollm2"
NEW_TOKENS = 128
_T = TypeVar("_T")
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def generate(
    decoder: Decoder,
    folder: TextFolder,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    choose: Callable[[np.ndarray], int],
    *,
    show: Callable[[str], None] = lambda text: None,
    read: Callable[[int], None] = lambda done: None,
    made: Callable[[int], None] = lambda done: None,
) -> Answer:
    """Answers a prompt of 1 to decoder.context tokens with at most max_new_tokens more; decoder's cache is empty.

    choose: float32 [vocab] logits to a token id, sw.text.sampling.Sampler for example. show: called with each piece of
    text as it comes. read, made: called with the number of prompt tokens read, of new tokens made.
    An interrupt (Ctrl-C) is no error: what there is by then is returned. Raises UserError as the decoder does.
    """
    answer, stream = Answer(list(prompt_ids)), folder.stream()

    def tell(text: str) -> None:
        answer.text += text
        if text:
            show(text)

    try:
        read(0)
        logits = np.zeros((1, 0), np.float32)
        for start in range(0, len(prompt_ids), decoder.block):
            block = prompt_ids[start : start + decoder.block]
            if start + len(block) < len(prompt_ids):
                _timed(decoder, answer.prefill, decoder.prefill, block)
            else:
                logits = _timed(decoder, answer.prefill, decoder.forward, block)
            read(decoder.length)
        while True:
            token = choose(logits[-1])
            if token in folder.stop_ids:
                answer.stop = "stop_token"
                break
            answer.ids.append(token)
            tell(stream.push(token))
            made(len(answer.ids))
            if len(answer.ids) == max_new_tokens:
                answer.stop = "max_new_tokens"
                break
            if decoder.length == decoder.context:
                answer.stop = "context"
                break
            logits = _timed(decoder, answer.decode, decoder.forward, [token])
        tell(stream.finish())
    except KeyboardInterrupt:
        answer.stop = "interrupted"
    return answer


def _timed(decoder: Decoder, phase: Phase, call: Callable[[Sequence[int]], _T], ids: Sequence[int]) -> _T:
    before, start = decoder.usage.copy(), time.perf_counter()
    answer = call(ids)
    phase.add(decoder.usage.since(before))
    phase.seconds += time.perf_counter() - start
    return answer


def _parser() -> Parser:
    parser = Parser(prog="python -m sw.generate", description="A model answers a prompt through the accelerator.")
    parser.add_argument("--model", default=MODEL, help=f"{MODEL_HELP} (default: {MODEL})")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="- reads it from stdin")
    prompt.add_argument("--prompt-file", metavar="FILE", help="UTF-8; - is stdin; a line break at its end is dropped")
    parser.add_argument("--system", metavar="TEXT", help="a system message before the prompt")
    parser.add_argument("--raw", action="store_true", help="continue the prompt as it is, without the chat template")
    parser.add_argument("--max-new-tokens", type=int, default=NEW_TOKENS, metavar="N", help=f"(default: {NEW_TOKENS})")
    parser.add_argument("--context", type=int, metavar="N", help="tokens of the cache (default: what is needed)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw among the likeliest (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of text and table")
    names = f"reference (numpy), rtl (the simulated Verilog), kv260 (the board), or {ONNXRUNTIME} (no accelerator)"
    add_device_options(parser, names, "rtl")
    add_hardware_options(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 0, or 130 if it was interrupted."""
    started = time.monotonic()
    options = _parser().parse_args(arguments)
    memory = check_devices([options.device], options.memory, [ONNXRUNTIME])
    check_positive(options.max_new_tokens, "--max-new-tokens")
    check_positive(options.context, "--context")
    choose = Sampler(options.temperature, options.top_p, options.seed)
    hardware, _ = hardware_options(options)
    prompt = _prompt(options)
    if not prompt:
        raise UserError("the prompt is empty")

    model = resolve_model(options.model)
    folder = open_text(model)
    ids = folder.prompt_ids(prompt, options.system, options.raw)
    if not ids:
        raise UserError("the prompt is empty: the tokenizer makes no token of it")
    limits = decoder_limits(model, folder.context)
    limits.check(ids)
    context = _context(options, limits.context, len(ids))
    config = decoder_config(model, [options.device], hardware)

    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that is not for UTF-8 shows question marks instead of ending the program.
        sys.stdout.reconfigure(errors="replace")
    with StatusLine() as status, open_decoder(model, options.device, memory, config, context, status) as decoder:
        answer = _answer(options, decoder, folder, ids, choose, status)
        report = Report(
            model=str(model),
            device=options.device,
            memory=memory if options.device == "rtl" else None,
            config=config,
            prompt=prompt,
            system=options.system,
            context=context,
            sampling={"temperature": choose.temperature, "top_p": choose.top_p, "seed": choose.seed},
            answer=answer,
            seconds=time.monotonic() - started,
        )
        (print_json if options.json else print_table)(report)
    return INTERRUPTED if answer.stop == "interrupted" else 0


def _answer(
    options: Namespace, decoder: Decoder, folder: TextFolder, ids: list[int], choose: Sampler, status: StatusLine
) -> Answer:
    """generate, with text on stdout and progress on stderr."""
    # Where the text is shown, on a terminal or in the same file, the text itself is the progress.
    counts = options.json or not (sys.stdout.isatty() or stderr_is_stdout())

    def show(text: str) -> None:
        if not options.json:
            print(text, end="", flush=True)

    def read(done: int) -> None:
        status.count("prompt {done} of {total} tokens", done, len(ids))
        if done == len(ids):
            status.clear()

    def made(done: int) -> None:
        if counts:
            status.count("new tokens {done} of {total}", done, options.max_new_tokens)

    answer = generate(decoder, folder, ids, options.max_new_tokens, choose, show=show, read=read, made=made)
    status.clear()
    if answer.text and not options.json:
        print(flush=True)
    return answer


def _prompt(options: Namespace) -> str:
    """The prompt's text. Raises UserError if it cannot be read."""
    name = options.prompt_file or options.prompt
    if name != "-" and options.prompt is not None:
        return options.prompt
    return read_text(name).removesuffix("\n").removesuffix("\r")


def _context(options: Namespace, limit: int, length: int) -> int:
    """Tokens of the cache. Raises UserError if the prompt does not fit or the model has no such context."""
    if options.context and options.context > limit:
        raise UserError(f"--context is at most what the model was made for ({limit:,} tokens), not {options.context:,}")
    context = options.context or min(length + options.max_new_tokens, limit)
    if length > context:
        whose = "--context" if options.context else "the model's context"
        raise UserError(f"the prompt has {length:,} tokens, more than {whose} holds ({context:,})")
    return context


if __name__ == "__main__":
    run_cli(main)
