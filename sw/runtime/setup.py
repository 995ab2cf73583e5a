# SPDX-License-Identifier: Apache-2.0
"""Prepares a language model to run; sw.generate and sw.perplexity share this module."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from hw.spec.config import AcceleratorConfig
from sw.checkpoints.adapter import Adapter
from sw.common.errors import UserError
from sw.common.status_line import StatusLine
from sw.devices import open_device
from sw.devices.base import Device
from sw.export.resolve import resolve_model
from sw.graph.attention import rotary_table
from sw.graph.file import OnnxFile
from sw.graph.linears import find_linears
from sw.program.keys import AUTO_BITS
from sw.program.load import Progress
from sw.program.obstacles import Obstacle
from sw.program.whole import config_with_attention
from sw.runtime import BaseDecoder, Decoder, ProgramDecoder
from sw.runtime.adapters import adapter_layers, adapter_shapes
from sw.runtime.hardware import ONNXRUNTIME, choose_config, layer_shapes
from sw.text.folder import TextFolder, open_text

LONGEST = 1 << 20
"""Tokens: more than any model's context, and few enough that no size computed from it overflows."""


@dataclass(frozen=True)
class Limits:
    """The limits of a decoder's graph.

    Members
    -------
    context: most tokens of one sequence; LONGEST if neither graph nor files state it.
    vocabulary: token ids are below it; None if the graph does not state it.
    """

    context: int
    vocabulary: int | None

    def check(self, ids: Sequence[int]) -> None:
        """Raises UserError for a token id outside the vocabulary, because not every operator does."""
        if self.vocabulary is not None and ids and max(ids) >= self.vocabulary:
            raise UserError(f"the tokenizer made token {max(ids)}, and the model's vocabulary has {self.vocabulary:,}")


def decoder_limits(model: Path, context: int | None) -> Limits:
    """The limits of a language model. context: the limit from the files beside it, see sw.text.folder.

    Raises UserError for models that read no token ids.
    """
    file = OnnxFile(model)
    if "input_ids" not in (item.name for item in file.graph.input):
        raise UserError(f"{model} is no language model: it has no input named input_ids")
    contexts = [] if context is None else [context]
    tables = (rotary_table(node) for node in file.graph.node)
    contexts += [file.shape(table, table)[0] for table in tables if file.is_constant(table)]
    outputs = {item.name: item for item in file.graph.output}
    logits = outputs.get("logits", file.graph.output[0]).type.tensor_type.shape.dim
    return Limits(min(contexts, default=LONGEST), logits[-1].dim_value or None if logits else None)


@dataclass(frozen=True)
class LanguageModel:
    """A model that a user named, with what its command needs before hardware is chosen.

    Members
    -------
    path: path of the ONNX file.
    text: tokenizer and chat template.
    limits: limits of its graph.
    """

    path: Path
    text: TextFolder
    limits: Limits


def read_model(name: str) -> LanguageModel:
    """Reads a language model by the user's name for it; a checkpoint is exported first, see sw.export.resolve.

    Raises UserError as `resolve_model`, `open_text` and `decoder_limits` do.
    """
    path = resolve_model(name)
    text = open_text(path)
    return LanguageModel(path, text, decoder_limits(path, text.context))


def decoder_config(
    model: Path,
    devices: Sequence[str],
    hardware: dict[str, int | str],
    context: int,
    adapter: Adapter | None = None,
) -> AcceleratorConfig | None:
    """The hardware for the layers of a model and of an adapter, see sw.runtime.hardware.choose_config; None if no
    device needs hardware.

    With score_words "auto" it has attention, for a cache of `context` tokens, if the graph allows it and there is no
    adapter. Raises UserError as choose_config does, and for an adapter of another model.
    """
    if set(devices) == {ONNXRUNTIME}:
        return None
    linears = find_linears(model)
    shapes = layer_shapes(linears)
    if adapter:
        layers = adapter_layers(adapter, {shape.name: (shape.n, shape.k) for shape in shapes})
        shapes += adapter_shapes(layers.values())
    config = choose_config(shapes, hardware)
    if hardware.get("score_words") == "auto" and config.has_vector_unit and not adapter:
        with suppress(Obstacle):
            # `open_decoder` says why there is none.
            config = config_with_attention(config, linears.file, context)
    return config


def make_decoder(
    model: Path,
    device: Device | None,
    *,
    context: int,
    progress: Progress | None = None,
    tell: Callable[[str], None] = lambda text: None,
    key_bits: int | str = AUTO_BITS,
    host: bool = False,
    adapter: Adapter | None = None,
) -> BaseDecoder:
    """A decoder on an open device; None: in onnxruntime. It has programs if hardware and graph allow them, and there is
    no adapter.

    tell: called with one line that says why there are no programs, or why they have no attention, although the hardware
    could run them. key_bits: see ProgramDecoder. host: no programs, the device runs the linear layers alone. adapter:
    is used from the first token on.
    Raises UserError as the decoders do.
    """
    if adapter:
        if device and device.config.has_vector_unit and not host:
            tell(f"the accelerator runs the linear layers alone, because of the adapter {adapter.path}")
        name = str(adapter.path)
        decoder = Decoder(model, device, context=context, progress=progress, adapters={name: adapter})
        decoder.adapter = name
        return decoder
    if device and device.config.has_vector_unit and not host:
        try:
            file = OnnxFile(model)
            return ProgramDecoder(file, device, context=context, progress=progress, key_bits=key_bits, tell=tell)
        except Obstacle as obstacle:
            tell(f"the accelerator runs the linear layers alone, because of {obstacle}")
    return Decoder(model, device, context=context, progress=progress)


@contextmanager
def open_decoder(
    model: Path,
    name: str,
    memory: str,
    config: AcceleratorConfig | None,
    context: int,
    status: StatusLine,
    key_bits: int | str = AUTO_BITS,
    host: bool = False,
    adapter: Adapter | None = None,
) -> Iterator[BaseDecoder]:
    """A decoder on a device by name, both closed afterwards. One line on stderr says what the device computes.

    memory: preset for rtl. config: config of the hardware; onnxruntime does not need it. context: tokens that the cache
    holds. key_bits, host, adapter: see make_decoder.
    Raises UserError as sw.devices.open_device and the decoder do.
    """

    def packed(done: int, total: int, layer: str) -> None:
        status.count("packing layer {done} of {total}", done, total)

    told: list[str] = []

    def tell(text: str) -> None:
        told.append(text)
        status.clear()
        print(f"note: {text}", file=sys.stderr, flush=True)

    with ExitStack() as stack:
        device = None
        if name != ONNXRUNTIME and config is not None:
            device = stack.enter_context(open_device(name, config, memory))
        try:
            options = {"context": context, "progress": packed, "tell": tell, "key_bits": key_bits}
            made = make_decoder(model, device, **options, host=host, adapter=adapter)
            decoder = stack.enter_context(made)
        except MemoryError:
            raise UserError(f"this machine has no memory for the model and a context of {context:,} tokens") from None
        status.clear()
        if device and not told:
            tell(_division(decoder, device.config, host))
        yield decoder


def _division(decoder: BaseDecoder, config: AcceleratorConfig, host: bool) -> str:
    """What the device computes, and what onnxruntime, if neither is the consequence of an obstacle to programs."""
    if not isinstance(decoder, ProgramDecoder):
        why = "--operators host" if host else f"the hardware has operators {config.operators}"
        return f"the accelerator runs the linear layers alone: {why}"
    if decoder.whole:
        rest = "embedding and lm_head are" if decoder.head_on_host else "the embedding is"
        return f"the accelerator runs the whole token, attention included; only {rest} in onnxruntime"
    try:
        config_with_attention(config, OnnxFile(decoder.path), decoder.context)
    except Obstacle as obstacle:
        return f"onnxruntime computes attention, because of {obstacle}"
    return f"onnxruntime computes attention: the hardware has score_words {config.score_words}"
