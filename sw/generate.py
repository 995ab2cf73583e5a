# SPDX-License-Identifier: Apache-2.0
"""``python -m sw.generate``: a model answers a prompt. It runs on a device, as far as its graph allows it.

    python -m sw.generate --prompt "What is the capital of France?" --max-new-tokens 8 --device rtl

The text streams to stdout, and a table of cycles and tokens/s follows (see sw.console.generate_report); --json prints
one document instead of both. The devices' results are equal bit for bit, so the text does not depend on the device.
``--device onnxruntime`` runs the same graph without the accelerator's arithmetic, for comparison. With
``--operators host`` the device runs the linear layers alone, and onnxruntime everything between them.
"""

import io
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from hw.spec.summary import config_rows, format_rows
from sw.checkpoints.adapter import read_adapter
from sw.common.command_line import Parser, check_positive
from sw.common.errors import UserError, run_cli
from sw.common.status_line import StatusLine, stderr_is_stdout
from sw.common.text_files import read_text
from sw.console.generate_report import Answer, Phase, Report, print_table
from sw.console.options import MODEL_HELP, add_cache_options, add_device_options, add_hardware_options, chosen_devices
from sw.console.output import print_json
from sw.runtime import BaseDecoder, ProgramDecoder
from sw.runtime.cache_file import load_cache, save_cache, saved_context
from sw.runtime.hardware import ONNXRUNTIME
from sw.runtime.setup import decoder_config, open_decoder, read_model
from sw.text.folder import TextFolder
from sw.text.sampling import Sampler

MODEL = "smollm2"
NEW_TOKENS = 128
_T = TypeVar("_T")
INTERRUPTED = 130
"""Exit status after Ctrl-C: 128 + SIGINT, as in shells."""


def generate(
    decoder: BaseDecoder,
    folder: TextFolder,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    choose: Callable[[np.ndarray], int],
    *,
    show: Callable[[str], None] = lambda text: None,
    read: Callable[[int], None] = lambda done: None,
    made: Callable[[int], None] = lambda done: None,
) -> Answer:
    """Answers a prompt of 1 to decoder.context tokens with at most max_new_tokens more.

    decoder's cache is empty, or holds the first tokens of the prompt.

    choose: float32 [vocab] logits to a token id; if it is a sw.text.sampling.Sampler, the decoder finds the token
    itself and reads no more logits than it needs. show: called with each piece of text as soon as it is known. read:
    called with the number of prompt tokens read. made: called with the number of new tokens. After an interrupt
    (Ctrl-C) the function returns the answer so far. Raises UserError as the decoder does.
    """
    answer, stream = Answer(list(prompt_ids)), folder.stream()

    def tell(text: str) -> None:
        answer.text += text
        if text:
            show(text)

    try:
        read(decoder.length)
        token = 0
        for start in range(decoder.length, len(prompt_ids), decoder.block):
            block = prompt_ids[start : start + decoder.block]
            if start + len(block) < len(prompt_ids):
                _timed(decoder, answer.prefill, decoder.prefill, block)
            else:
                token = _next(decoder, answer.prefill, choose, block)
            read(decoder.length)
        while True:
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
            token = _next(decoder, answer.decode, choose, [token])
        tell(stream.finish())
    except KeyboardInterrupt:
        answer.stop = "interrupted"
    return answer


def _next(decoder: BaseDecoder, phase: Phase, choose: Callable[[np.ndarray], int], ids: Sequence[int]) -> int:
    """The token after these."""
    if not isinstance(choose, Sampler):
        return choose(_timed(decoder, phase, decoder.forward, ids)[-1])
    if choose.is_greedy:
        return _timed(decoder, phase, decoder.greedy, ids)
    return _timed(decoder, phase, lambda new: decoder.sample(new, choose), ids)


def _timed(decoder: BaseDecoder, phase: Phase, call: Callable[[Sequence[int]], _T], ids: Sequence[int]) -> _T:
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
    parser.add_argument(
        "--adapter",
        type=Path,
        metavar="FOLDER",
        help="a LoRA adapter of PEFT (adapter_config.json, adapter_model.safetensors): runs in int8 beside the layers",
    )
    parser.add_argument("--max-new-tokens", type=int, default=NEW_TOKENS, metavar="N", help=f"(default: {NEW_TOKENS})")
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="tokens of the cache (default: as many as needed, or as the loaded cache has)",
    )
    parser.add_argument("--save-cache", type=Path, metavar="FILE", help="write the cache after the answer")
    parser.add_argument(
        "--load-cache",
        type=Path,
        metavar="FILE",
        help="begin with a cache of --save-cache: prompt tokens that it holds are not computed again",
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: 0)")
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw among the likeliest tokens with this probability in all (default: 1)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random draws (default: 0)")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of text and table")
    names = f"reference (numpy), rtl (the simulated Verilog), kv260 (the board), or {ONNXRUNTIME} (no accelerator)"
    add_device_options(parser, names, "rtl")
    add_cache_options(parser)
    add_hardware_options(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 0, or 130 if it was interrupted."""
    started = time.monotonic()
    options = _parser().parse_args(arguments)
    check_positive(options.max_new_tokens, "--max-new-tokens")
    check_positive(options.context, "--context")
    choose = Sampler(options.temperature, options.top_p, options.seed)
    devices = chosen_devices(options, [options.device], [ONNXRUNTIME])
    prompt = _prompt(options)
    if not prompt:
        raise UserError("the prompt is empty")

    adapter = read_adapter(options.adapter) if options.adapter else None
    if adapter and options.device == ONNXRUNTIME:
        raise UserError(f"--adapter needs an accelerator, not --device {ONNXRUNTIME}, which runs the graph as it is")
    model = read_model(options.model)
    ids = model.text.prompt_ids(prompt, options.system, options.raw)
    if not ids:
        raise UserError("the prompt is empty: the tokenizer makes no token of it")
    model.limits.check(ids)
    if options.load_cache and not options.context:
        options.context = saved_context(options.load_cache)
    context = _context(options, model.limits.context, len(ids))
    config = decoder_config(model.path, devices.names, devices.hardware, context, adapter)

    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal without UTF-8 shows question marks; an encoding error would end the program.
        sys.stdout.reconfigure(errors="replace")
    if config and not options.json:
        print(format_rows(config_rows(config)), end="\n\n", file=sys.stderr)
    with (
        StatusLine() as status,
        open_decoder(
            model.path,
            options.device,
            devices.memory,
            config,
            context,
            status,
            key_bits=options.key_bits,
            host=devices.host,
            adapter=adapter,
        ) as decoder,
    ):
        known = load_cache(options.load_cache, decoder, ids) if options.load_cache else 0
        if options.load_cache:
            print(f"{known:,} of {len(ids):,} prompt tokens are in {options.load_cache}", file=sys.stderr)
        answer = _answer(options, decoder, model.text, ids, choose, status)
        if options.save_cache:
            save_cache(options.save_cache, decoder, [*ids, *answer.ids][: decoder.length])
        report = Report(
            model=str(model.path),
            device=options.device,
            memory=devices.shown_memory,
            config=config,
            programs=isinstance(decoder, ProgramDecoder),
            attention=isinstance(decoder, ProgramDecoder) and decoder.whole,
            adapter=None if adapter is None else str(adapter.path),
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
    options: Namespace, decoder: BaseDecoder, folder: TextFolder, ids: list[int], choose: Sampler, status: StatusLine
) -> Answer:
    """Calls generate, with text on stdout and progress on stderr."""
    # Where stderr goes to the same terminal or file as the text, the text itself shows the progress.
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
        raise UserError(f"--context is at most the model's own context ({limit:,} tokens), not {options.context:,}")
    context = options.context or min(length + options.max_new_tokens, limit)
    if length > context:
        whose = "--context" if options.context else "the model's context"
        if options.context and options.load_cache:
            whose += f", or the cache in {options.load_cache},"
        raise UserError(f"the prompt has {length:,} tokens, more than {whose} holds ({context:,})")
    return context


if __name__ == "__main__":
    run_cli(main)
