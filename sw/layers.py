# SPDX-License-Identifier: Apache-2.0
"""``python -m sw.layers``: runs every quantized linear layer of a model on a device once, with real activations.

Every layer is compared twice. `exact`: all results equal those of hw.spec.numerics bit for bit, computed from the
model's integers without packing. `relative_error`: max|y - y_ort| / max|y_ort| over the layer's M x N results, where
y_ort is what onnxruntime computes in float32 from the same activations. The activations are those of the last M of the
prompt's first 32 tokens (or of the first M, if M is larger). A model's first token, which attracts most attention, is
no typical input: a few outliers set its exponent, and with 16-bit activations some value projections of SmolLM2 then
differ by 0.3 %. The 8-bit head of SmolLM2, which 4-bit hardware runs as two planes with scales of 12 bits, differs by
0.13 %. A model that reads no token ids gets noise instead of a prompt.

Attention is compared in the same way, block by block, if the graph allows it on the device: with onnxruntime's queries,
keys and values of the prompt. Its cache has values of 8 bits, and keys of 8 bits or, if they have a bias, 16, so it
differs more: in one block of SmolLM2 by 6 %.
"""

import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hw.spec.config import AcceleratorConfig
from hw.spec.numerics.linear import NumericsError, quantize_activations
from sw.common.command_line import Parser, check_positive
from sw.common.errors import UserError, run_cli
from sw.common.status_line import StatusLine
from sw.common.text_files import text_directory
from sw.console.layers_report import LayerResult, Report, print_table
from sw.console.options import MODEL_HELP, Devices, add_device_options, add_hardware_options, chosen_devices
from sw.console.output import print_json
from sw.devices import open_device, pack
from sw.devices.base import Completion, Device, LinearJob, read_results, result_bytes, weight_bytes, weight_image
from sw.devices.reference import reference_linear
from sw.export.resolve import resolve_model
from sw.graph.file import OnnxFile
from sw.graph.linears import find_linears
from sw.graph.match import match_decoder
from sw.model.parts import Decoder, Mismatch
from sw.ort.capture import Captured, capture_inputs
from sw.ort.capture_attention import capture_attention
from sw.ort.feeds import reads_token_ids
from sw.program.alone import AttentionResult, key_bits_of, run_attention
from sw.program.load import attention_of
from sw.program.obstacles import Obstacle, check_decoder
from sw.program.whole import attentions_of, config_with_attention
from sw.runtime.hardware import choose_config, layer_shapes

PROMPT = (
    "Gristmill grinds what the stream brings: the weights of a language model flow from memory like water, and the"
    " array turns as the wheel. Nothing is stored at the mill that the river does not carry past it, so every grain"
    " is ground once, at the speed of the water, and the flour is exactly what the miller expected it to be."
)
TOKENS = 16
CONTEXT = 32
"""Tokens of the prompt that onnxruntime computes if M is not larger; small test models have no longer context."""
IN_FLIGHT = 2
"""Layers that the device holds at once: one runs while the next is packed and checked."""
TIMEOUT = 3600.0
"""Seconds that one layer may take. A simulated head of 150,000 rows takes a minute."""


def prompt_ids(model: Path, prompt: str) -> tuple[list[int], str]:
    """Token ids of a prompt and their source: the tokenizer.json beside the model, or else the bytes of UTF-8.

    Every model has the ids 0 to 255, so a model without its tokenizer can run as well.
    """
    path = text_directory(model) / "tokenizer.json"
    if not path.is_file():
        return list(prompt.encode()), "bytes"
    # A model without its tokenizer does not need the tokenizers package.
    from sw.text.folder import read_tokenizer

    return read_tokenizer(path).encode(prompt).ids, "tokenizer"


@dataclass(frozen=True, eq=False)
class _Running:
    """A layer that was submitted. expected: float32 [M, N], the results that the device must return."""

    work: Captured
    completions: Future[list[Completion]]
    job: LinearJob
    expected: np.ndarray


def run_layers(device: Device, works: Iterator[Captured], tokens: int) -> Iterator[LayerResult]:
    """Runs layers on the device for the last `tokens` tokens and compares. It holds at most IN_FLIGHT layers."""
    running: deque[_Running] = deque()
    # A simulation advances only while a thread calls wait(); meanwhile this thread prepares the next layer.
    waiter = ThreadPoolExecutor(1, "sw.layers")
    try:
        for work in works:
            running.append(_start(device, waiter, work, tokens))
            if len(running) == IN_FLIGHT:
                yield _finish(device, running.popleft())
        while running:
            yield _finish(device, running.popleft())
    finally:
        # Do not wait here: after an interrupt only closing the device ends the waiter's call of wait().
        waiter.shutdown(wait=False, cancel_futures=True)


def _start(device: Device, waiter: ThreadPoolExecutor, work: Captured, tokens: int) -> _Running:
    layer, config, x = work.layer, device.config, work.x[-tokens:]
    plan = pack.plan_layer(config, layer)
    layout, weights = plan.layout, pack.integer_weights(plan, layer)
    prepared = pack.pack_layer(plan, layer, weights)
    padded = prepared.pad(x)
    sizes = weight_bytes(layout), padded.nbytes, result_bytes(layout, len(x))
    buffers = device.alloc(sizes[0]), device.alloc(sizes[1]), device.alloc(sizes[2])
    device.write(buffers[0], weight_image(layout, prepared.beats))
    device.write(buffers[1], padded)
    job = LinearJob(layer.name, layout, len(x), *buffers)
    completions = waiter.submit(lambda: device.wait(device.submit([job]), TIMEOUT))
    # The reference is computed while the device works.
    try:
        expected = reference_linear(config, weights, quantize_activations(config, padded))
    except NumericsError as error:
        raise UserError(f"layer {layer.name}: {error}") from None
    return _Running(work, completions, job, expected)


def _finish(device: Device, running: _Running) -> LayerResult:
    layer, m, job = running.work.layer, len(running.expected), running.job
    (completion,) = running.completions.result()
    y = read_results(device, job)
    for buffer in (job.weights, job.activations, job.results):
        device.free(buffer)
    # The tensor that onnxruntime gave contains the bias where the node adds it; the device computes the product.
    bias = layer.bias if layer.bias is not None and layer.bias_in_node else 0.0
    wanted = running.work.y[-m:].astype(np.float64)
    error = np.abs(y.astype(np.float64) + bias - wanted).max()
    return LayerResult(
        name=layer.name,
        m=m,
        k=layer.k,
        n=layer.n,
        group_size=layer.group_size,
        weight_bits=layer.bits,
        cycles=completion.cycles,
        beats=completion.beats,
        bus_use=completion.beats / completion.cycles if completion.cycles else 0.0,
        exact=bool(np.array_equal(y.view(np.uint32), running.expected.view(np.uint32))),
        # JSON has no infinity, and the error is infinite if a result overflows float32.
        max_abs_error=float(np.nan_to_num(error)),
        relative_error=float(np.nan_to_num(error / max(np.abs(wanted).max(), np.finfo(np.float32).tiny))),
        device_seconds=completion.seconds,
    )


def _blocks(
    file: OnnxFile, config: AcceleratorConfig, devices: Devices, positions: int
) -> tuple[AcceleratorConfig, Decoder | None, str]:
    """The hardware, with attention if the graph allows it; the decoder if its attention runs; and one line about it.

    positions: tokens of the prompt.
    """
    why, decoder = "", match_decoder(file)
    try:
        decoder = check_decoder(file, decoder, positions)
        if devices.hardware.get("score_words") == "auto" and config.has_vector_unit:
            config = config_with_attention(config, file, positions)
        if config.has_attention and not devices.host:
            attentions_of(config, file, decoder, positions)
        else:
            why = ": --operators host" if devices.host else ": the hardware has no attention"
    except Obstacle as obstacle:
        why = f", because of {obstacle}"
    if why or isinstance(decoder, Mismatch):
        return config, None, f"only linear layers run on the accelerator{why}"
    return config, decoder, "attention runs on the accelerator as well"


def _attention(
    device: Device, file: OnnxFile, decoder: Decoder, ids: Sequence[int], tokens: int
) -> Iterator[AttentionResult]:
    """Runs the attention of every block for the last `tokens` of these."""
    attentions = attentions_of(device.config, file, decoder, len(ids))
    captured = capture_attention(
        file, [(attention_of(block), block.rotary) for block in decoder.blocks], ids, threads=1
    )
    bits = [key_bits_of(bool(block.k_proj.bias)) for block in decoder.blocks]
    return run_attention(device, attentions, bits, captured, tokens, TIMEOUT)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m sw.layers", description="Run a model's linear layers on a device, and check the results."
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_device_options(parser, "reference (numpy), rtl (the simulated Verilog) or kv260 (the board)")
    parser.add_argument("--tokens", type=int, metavar="M", help=f"tokens to compute (default: {TOKENS})")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N layers")
    parser.add_argument("--prompt", metavar="TEXT", help="text whose activations to use (default: one in sw.layers)")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of the table")
    add_hardware_options(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 0 if every layer is exact, 1 if one is not."""
    options = _parser().parse_args(arguments)
    started = time.monotonic()
    check_positive(options.limit, "--limit")
    check_positive(options.tokens, "--tokens")
    # Check before reading the model, unless the limit depends on the model.
    devices = chosen_devices(options, [options.device])
    most = devices.known.max_tokens
    if options.tokens and options.tokens > most:
        raise UserError(f"--tokens is at most max_tokens of the hardware ({most}), not {options.tokens}")

    model = resolve_model(options.model)
    linears = find_linears(model)[: options.limit]
    config = choose_config(layer_shapes(linears), devices.hardware)
    if reads_token_ids(linears.file):
        ids, source = prompt_ids(model, PROMPT if options.prompt is None else options.prompt)
        if not ids:
            raise UserError("the prompt is empty")
        if options.tokens and options.tokens > len(ids):
            raise UserError(f"--tokens {options.tokens} needs a longer prompt: this one has {len(ids)} tokens")
    elif options.prompt is None:
        ids, source = [], "noise"
    else:
        raise UserError(f"{model} reads no token ids (input_ids), so it cannot be fed a --prompt")
    tokens = options.tokens or min(TOKENS, config.max_tokens, len(ids) or TOKENS)
    ids = ids[: max(tokens, CONTEXT)]
    works = capture_inputs(linears, ids, tokens=tokens, threads=1)
    decoder, note = None, ""
    if ids and not options.limit:
        config, decoder, note = _blocks(linears.file, config, devices, len(ids))

    with open_device(options.device, config, devices.memory) as device, StatusLine() as status:
        if note:
            print(f"note: {note}", file=sys.stderr, flush=True)
        results = []
        for result in run_layers(device, works, tokens):
            results.append(result)
            status.count("{done} of {total} layers", len(results), len(linears), f"  {result.name}")
        attention = list(_attention(device, linears.file, decoder, ids, tokens)) if decoder else []
    seconds = time.monotonic() - started
    report = Report(str(model), options.device, devices.memory, config, tokens, source, results, attention, seconds)
    (print_json if options.json else print_table)(report)
    return 0 if report.is_exact else 1


if __name__ == "__main__":
    run_cli(main)
