# SPDX-License-Identifier: Apache-2.0
"""``python -m sw.layers``: every quantised linear layer of a model through a device once, with real activations.

Every layer is compared twice. `exact`: all results equal those of hw.spec.numerics bit for bit, computed from the
model's integers without packing. `relative_error`: max|y - y_ort| / max|y_ort| over the layer's M x N results, where
y_ort is what onnxruntime computes in float32 from the same activations. They are those of the last M of the
prompt's first 32 tokens (or first M). A model's first token, where its attention rests, is no typical input: a few
outliers set its exponent, and with 16-bit activations some value projections of SmolLM2 then differ by 0.3 %.
"""

import argparse
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NoReturn

import numpy as np

from hw.spec.config import AcceleratorConfig
from hw.spec.numerics import NumericsError, quantise_activations
from sw import pack
from sw.capture import Captured, capture_inputs
from sw.devices import check_device, make_config, open_device
from sw.devices.base import Device, LinearJob, read_results, result_bytes, weight_bytes, weight_image
from sw.devices.library import MEMORIES, check_preset
from sw.devices.reference import reference_linear
from sw.devices.rtl import DEFAULT_MEMORY
from sw.errors import UserError, run_cli
from sw.layers_report import LayerResult, Report, layer_progress, print_json, print_table
from sw.models import resolve_model
from sw.onnx_import import Linears, find_linears

PROMPT = (
    "Gristmill grinds what the stream brings: the weights of a language model flow from memory like water, and the"
    " array turns as the wheel. Nothing is stored at the mill that the river does not carry past it, so every grain"
    " is ground once, at the speed of the water, and the flour is exactly what the miller expected it to be."
)
TOKENS = 16
CONTEXT = 32
"""Tokens of the prompt that onnxruntime computes, if M asks for no more; small test models have no longer context."""
IN_FLIGHT = 2
"""Layers that the device holds at once: one runs while the next is packed and checked."""
TIMEOUT = 3600.0
"""Seconds that one layer may take. A simulated head of 150,000 rows takes a minute."""


@dataclass(frozen=True)
class _Shape:
    """What decides whether a layer fits the hardware, without its weights. zero_points: the extreme ones."""

    name: str
    k: int
    n: int
    group_size: int
    bits: int
    zero_points: np.ndarray
    has_fractions: bool

    def fit(self, config: AcceleratorConfig) -> None:
        """Raises UserError if the layer does not fit."""
        pack.fit(config, self.name, self.k, self.n, self.group_size, self.bits, self.zero_points)


def layer_shapes(linears: Linears) -> list[_Shape]:
    """Reads every layer once, keeps none."""
    shapes = []
    for layer in linears:
        zeros = layer.zero_points
        fractions = zeros[zeros != np.rint(zeros)]
        extremes = np.array([zeros.min(), zeros.max(), *fractions[:1]], np.float64)
        values = (layer.name, layer.k, layer.n, layer.group_size, layer.bits)
        shapes.append(_Shape(*values, extremes, bool(len(fractions))))
    return shapes


def choose_config(shapes: Sequence[_Shape], options: dict[str, int | str]) -> AcceleratorConfig:
    """The hardware for these layers: options (fields of AcceleratorConfig), where "auto" is the least that does.

    Raises UserError if that hardware does not exist or a layer does not fit it.
    """
    if options["weight_bits"] == "auto":
        # Where 2-bit weights are all there is, 2-bit hardware streams them at full density.
        options = options | {"weight_bits": max(2, *(shape.bits for shape in shapes))}
    if options["zero_point"] == "auto":
        options = options | {"zero_point": "fixed" if any(shape.has_fractions for shape in shapes) else "integer"}
    config = make_config(**options)
    for shape in shapes:
        shape.fit(config)
    return config


def prompt_ids(model: Path, prompt: str) -> tuple[list[int], str]:
    """Token ids of a prompt and where they are from: the tokenizer.json beside the model, or else the bytes of UTF-8.

    Bytes are ids that every model has, so a model without its tokenizer can be run as well.
    """
    path = model.parent / "tokenizer.json"
    if not path.is_file():
        return list(prompt.encode()), "bytes"
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path)).encode(prompt).ids, "tokenizer"
    except Exception as error:
        raise UserError(f"{path} cannot be read ({error})") from None


@dataclass(frozen=True, eq=False)
class _Running:
    """A layer that was submitted. expected: float32 [M, N], what the device must answer."""

    work: Captured
    ticket: int
    job: LinearJob
    expected: np.ndarray


def run_layers(device: Device, works: Iterator[Captured], tokens: int) -> Iterator[LayerResult]:
    """Runs layers on the device on the last `tokens` tokens and compares. At most IN_FLIGHT are held."""
    running: deque[_Running] = deque()
    for work in works:
        running.append(_start(device, work, tokens))
        if len(running) == IN_FLIGHT:
            yield _finish(device, running.popleft())
    while running:
        yield _finish(device, running.popleft())


def _start(device: Device, work: Captured, tokens: int) -> _Running:
    layer, config, x = work.layer, device.config, work.x[-tokens:]
    layout = pack.fit(config, layer.name, layer.k, layer.n, layer.group_size, layer.bits, layer.zero_points)
    weights = pack.integer_weights(config, layer, layout)
    prepared = pack.prepare(config, layer, weights)
    padded = prepared.pad(x)
    sizes = weight_bytes(layout), padded.nbytes, result_bytes(layout, len(x))
    buffers = device.alloc(sizes[0]), device.alloc(sizes[1]), device.alloc(sizes[2])
    device.write(buffers[0], weight_image(layout, prepared.beats))
    device.write(buffers[1], padded)
    job = LinearJob(layer.name, layout, len(x), *buffers)
    ticket = device.submit([job])
    # While the device works.
    try:
        expected = reference_linear(config, weights, quantise_activations(config, padded))
    except NumericsError as error:
        raise UserError(f"layer {layer.name}: {error}") from None
    return _Running(work, ticket, job, expected)


def _finish(device: Device, running: _Running) -> LayerResult:
    layer, m, job = running.work.layer, len(running.expected), running.job
    (completion,) = device.wait(running.ticket, TIMEOUT)
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
        # JSON knows no infinity, which a result that overflowed float32 would give.
        max_abs_error=float(np.nan_to_num(error)),
        relative_error=float(np.nan_to_num(error / max(np.abs(wanted).max(), np.finfo(np.float32).tiny))),
        device_seconds=completion.seconds,
    )


class _Parser(argparse.ArgumentParser):
    """Reports wrong options like every other user error: one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _number_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


def _parser() -> _Parser:
    parser = _Parser(prog="python -m sw.layers", description="A model's linear layers through a device, checked.")
    parser.add_argument("model", metavar="MODEL", help="an ONNX file, a folder with one, or smollm2")
    parser.add_argument("--device", required=True, help="reference (numpy) or rtl (the simulated Verilog)")
    parser.add_argument(
        "--memory", metavar="PRESET", help=f"rtl's memory: {', '.join(MEMORIES)} (default: {DEFAULT_MEMORY})"
    )
    parser.add_argument("--tokens", type=int, metavar="M", help=f"tokens to compute (default: {TOKENS})")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N layers")
    parser.add_argument("--prompt", default=PROMPT, metavar="TEXT", help="whose activations to use")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of the table")
    hardware = parser.add_argument_group("hardware", "options of python -m hw.build; auto is what the model needs")
    for item in fields(AcceleratorConfig):
        auto = item.name in ("weight_bits", "zero_point")
        kind = str if item.name == "zero_point" else _number_or_auto if auto else int
        default = "auto" if auto else item.default
        option = f"--{item.name.replace('_', '-')}"
        hardware.add_argument(option, type=kind, default=default, help=f"(default: {default})")
    return parser


def _positive(value: int | None, option: str) -> None:
    if value is not None and value < 1:
        raise UserError(f"{option} is 1 or more, not {value}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 0 if every layer is exact, 1 if one is not."""
    options = _parser().parse_args(arguments)
    started = time.monotonic()
    check_device(options.device)
    if options.memory is not None:
        check_preset(options.memory)
        if options.device != "rtl":
            raise UserError(f"--memory is for --device rtl, not {options.device}")
    memory = options.memory or DEFAULT_MEMORY
    _positive(options.limit, "--limit")
    _positive(options.tokens, "--tokens")
    hardware = {item.name: getattr(options, item.name) for item in fields(AcceleratorConfig)}
    # Before the model is read, as far as the model does not decide.
    known = make_config(**{name: value for name, value in hardware.items() if value != "auto"})
    if options.tokens and options.tokens > known.max_tokens:
        raise UserError(f"--tokens is at most max_tokens of the hardware ({known.max_tokens}), not {options.tokens}")

    model = resolve_model(options.model)
    linears = find_linears(model)[: options.limit]
    config = choose_config(layer_shapes(linears), hardware)
    ids, source = prompt_ids(model, options.prompt)
    if not ids:
        raise UserError("the prompt is empty")
    if options.tokens and options.tokens > len(ids):
        raise UserError(f"--tokens {options.tokens} needs a longer prompt: this one has {len(ids)} tokens")
    tokens = options.tokens or min(TOKENS, config.max_tokens, len(ids))
    works = capture_inputs(linears, ids[: max(tokens, CONTEXT)], tokens=tokens, threads=1)

    with open_device(options.device, memory, **config.to_dict()) as device, layer_progress(len(linears)) as advance:
        results = []
        for result in run_layers(device, works, tokens):
            results.append(result)
            advance(result)
    report = Report(str(model), options.device, memory, config, tokens, source, results, time.monotonic() - started)
    if options.json:
        print_json(report)
    else:
        print_table(report)
    return 0 if all(result.exact for result in results) else 1


if __name__ == "__main__":
    run_cli(main)
