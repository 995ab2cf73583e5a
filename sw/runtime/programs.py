# SPDX-License-Identifier: Apache-2.0
"""A language model whose operators all run on the device, except for embedding and attention: see sw.program.

A head that is not quantized stays in onnxruntime as well.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from onnxruntime import OrtValue

from hw.spec.numerics.vector import PIECE
from sw.devices.base import Device
from sw.graph.file import OnnxFile, tensor_type
from sw.graph.match import match_decoder
from sw.graph.nodes import TOKEN_IDS
from sw.model.parts import Decoder, Mismatch
from sw.ort.attention import AttentionSession, shape_of
from sw.ort.cache import KvCache
from sw.ort.cut import cut
from sw.ort.feeds import LOGITS_TO_KEEP, every_token
from sw.ort.stages import Constants, StageSession, open_stage
from sw.program.attention import DeviceAttention
from sw.program.keys import AUTO_BITS, key_forms
from sw.program.load import Loader, Progress, attention_of
from sw.program.lower import Output, Programs
from sw.program.obstacles import Obstacle, check_decoder
from sw.program.whole import attentions_of
from sw.runtime.base import BaseDecoder
from sw.runtime.submit import run_batch
from sw.text.sampling import Sampler, check_top


class _Attention(NamedTuple):
    """The attention of a block: its session, and its part of the cache."""

    session: AttentionSession
    key: OrtValue
    value: OrtValue


class ProgramDecoder(BaseDecoder):
    """A decoder as programs: one submission for each block, and one for the head.

    Parameters
    ----------
    file: the ONNX file.
    device: hardware with the vector unit.
    context: tokens that the cache holds.
    progress: called with (layers done, layers in all, name) while weights are packed into the device's memory.
    key_bits: bits of the cached keys if the device computes attention: 8, 16, or "auto", the rule of sw.program.keys.
    tell: called with one line that says why onnxruntime computes attention, although the hardware could.

    Members, besides those of BaseDecoder
    -------
    whole: the device computes attention as well, so a call is one submission.

    Raises Obstacle (sw.program.obstacles) if the graph cannot be compiled; then the device's memory is as before.
    """

    def __init__(
        self,
        file: OnnxFile,
        device: Device,
        *,
        context: int,
        progress: Progress | None = None,
        key_bits: int | str = AUTO_BITS,
        tell: Callable[[str], None] = lambda text: None,
    ):
        super().__init__(file.path, device.config.max_tokens, context)
        decoder = check_decoder(file, match_decoder(file), context)
        self._device = device
        self._embedding = _embedding(file, decoder)
        self._embedded = decoder.embedding.output
        self._head = None if decoder.head.quantized else _Head(file, decoder)
        attentions = []
        self.whole = device.config.has_attention
        if self.whole:
            try:
                attentions = attentions_of(device.config, file, decoder, context)
            except Obstacle as obstacle:
                self.whole = False
                tell(f"onnxruntime computes attention, because of {obstacle}")
        self._cache = KvCache(file, context)
        self._attentions = [] if self.whole else _attentions(file, decoder, self._cache)
        loaded = Loader(device, file, decoder, progress, context if self.whole else None).load()
        self._rotaries, self._vocab = () if self.whole else loaded.rotaries, loaded.vocab
        on_device = None
        if self.whole:
            keys = [
                key_forms(
                    block.keys, None if block.rotary is None else loaded.rotaries[block.rotary], context, key_bits
                )
                for block in loaded.blocks
                if block.keys
            ]
            on_device = DeviceAttention(device, attentions, keys, context)
        self._programs = Programs(device, loaded, on_device)
        self._sessions = list(dict.fromkeys(attention.session for attention in self._attentions))
        # Tokens -> the tensor that the embedding fills.
        self._places: dict[int, dict[str, OrtValue]] = {}
        # (block, tokens) -> the attention's output, and the places of its copies in the device's memory.
        self._copies: dict[tuple[int, int], tuple[np.ndarray, np.ndarray] | None] = {}

    def forward(self, ids: Sequence[int], every: bool = False) -> np.ndarray:
        """See BaseDecoder."""
        self._run(ids, Output.ALL if every else Output.LAST)
        rows = self._programs.results.view(len(ids) if every else 1)
        start = time.perf_counter()
        if self._head:
            logits = self._head(rows)
            self.usage.onnxruntime += time.perf_counter() - start
            return logits
        logits = rows.copy()
        self.usage.conversion += time.perf_counter() - start
        return logits

    def prefill(self, ids: Sequence[int]) -> None:
        """See BaseDecoder."""
        self._run(ids, None)

    def greedy(self, ids: Sequence[int]) -> int:
        """See BaseDecoder. The device finds the token if it has the head, and then no logits are written."""
        if self._head:
            return super().greedy(ids)
        self._run(ids, Output.BEST)
        start = time.perf_counter()
        token, top = self._programs.best()
        self.usage.conversion += time.perf_counter() - start
        check_top(top)
        return token

    def sample(self, ids: Sequence[int], sampler: Sampler) -> int:
        """See BaseDecoder. If the device has the head, only the pieces of logits that can matter are read."""
        if self._head:
            return super().sample(ids, sampler)
        self._run(ids, Output.PIECES)
        start = time.perf_counter()
        token = sampler.from_pieces(self._programs.maxima(), PIECE, self._vocab, self._programs.logits)
        self.usage.conversion += time.perf_counter() - start
        return token

    @property
    def head_on_host(self) -> bool:
        """Whether onnxruntime computes lm_head, because it is not quantized."""
        return self._head is not None

    @property
    def cache_form(self) -> str:
        """See BaseDecoder."""
        attention = self._programs.attention
        where = f"device {attention.form}" if attention else "programs"
        return f"{where} {self._device.config.digest} {self.context}"

    def cache_arrays(self) -> dict[str, np.ndarray]:
        """See BaseDecoder."""
        attention = self._programs.attention
        return attention.arrays() if attention else self._cache.arrays()

    def restore(self, arrays: Mapping[str, np.ndarray], length: int, reached: int = 0) -> None:
        """See BaseDecoder."""
        attention = self._programs.attention
        if attention:
            attention.restore(arrays)
        else:
            self._cache.restore(arrays, length)
        self.length, self.reached = length, max(length, reached)

    def can_shorten(self, reached: int, length: int) -> bool:
        """See BaseDecoder. A cache that has begun again no longer has its first positions."""
        attention = self._programs.attention
        lost = attention and reached > min(attention.capacities) and length < reached - self.block
        return super().can_shorten(reached, length) and not lost

    def close(self) -> None:
        """See BaseDecoder."""
        self._places.clear()
        self._copies.clear()
        self._attentions.clear()
        self._sessions.clear()

    def _run(self, ids: Sequence[int], output: Output | None) -> None:
        """Runs the programs, and attention between them; None: only what the cache needs."""
        tokens, total = len(ids), self._total(ids)
        self._begin(ids, total)
        if self.whole:
            start = time.perf_counter()
            batch = self._programs.call(tokens, self.length, output)
            self.usage.driver += time.perf_counter() - start
            run_batch(self._device, batch, self.usage)
        else:
            for index in range(self._programs.count - 1):
                self._submit(index, tokens, output)
                self._attend(index, tokens)
            if output:
                self._submit(self._programs.count - 1, tokens, output)
        self._hold(total)
        self.usage.tokens += tokens

    def _begin(self, ids: Sequence[int], total: int) -> None:
        """Writes the embedding's rows, and those of the rotary tables."""
        tokens, programs = len(ids), self._programs
        start = time.perf_counter()
        for table, place in zip(self._rotaries, programs.rotaries, strict=True):
            place.view(tokens)[:] = table[total - tokens : total]
        for session in self._sessions:
            session.expect(total)
        place = programs.embedded.view(tokens)[None]
        values = {TOKEN_IDS: OrtValue.ortvalue_from_numpy(np.asarray(ids, np.int64)[None])}
        is_direct = self._embedding.types[self._embedded] == "tensor(float)"
        if tokens not in self._places:
            self._places[tokens] = {self._embedded: OrtValue.ortvalue_from_numpy(place)} if is_direct else {}
        embedding = time.perf_counter()
        self._embedding.run(tokens, values, self._places[tokens])
        done = time.perf_counter()
        if not is_direct:
            place[:] = values[self._embedded].numpy()
        self.usage.onnxruntime += done - embedding
        self.usage.conversion += embedding - start + time.perf_counter() - done

    def _attend(self, index: int, tokens: int) -> None:
        """Attention of a block, from the results of its program to the activations of the next one."""
        session, call = self._attentions[index].session, (index, tokens)
        if not session.is_bound(call):
            self._bind(index, tokens)
        start = time.perf_counter()
        session.run(call)
        done = time.perf_counter()
        if copy := self._copies[call]:
            output, places = copy
            places[:] = output[0][:, None]
        self.usage.onnxruntime += done - start
        self.usage.conversion += time.perf_counter() - done

    def _bind(self, index: int, tokens: int) -> None:
        attention, places = self._attentions[index], self._programs.attended(index, tokens)
        qkv = self._programs.qkv.view(tokens)[None]
        output = places[None, :, 0]
        self._copies[index, tokens] = None
        if places.shape[1] > 1 or not output.flags.c_contiguous:
            output = np.empty(output.shape, np.float32)
            self._copies[index, tokens] = output, places
        attention.session.bind((index, tokens), qkv, attention.key, attention.value, output)

    def _submit(self, index: int, tokens: int, output: Output | None) -> None:
        """Runs a program."""
        start = time.perf_counter()
        batch = self._programs.batch(index, tokens, output or Output.LAST)
        # The first call of each kind prepares its batch.
        self.usage.driver += time.perf_counter() - start
        run_batch(self._device, batch, self.usage)


class _Head:
    """The part of a graph after the last norm, in onnxruntime: a head that is not quantized."""

    def __init__(self, file: OnnxFile, decoder: Decoder):
        self._input, self._logits = decoder.final_norm.output, decoder.logits
        # Everything that depends on the norm's output, as if its node were an accelerated layer.
        stage = cut(file, [file.producers[self._input]], [self._logits])[-1]
        types = {item.name: tensor_type(item) for item in file.inputs} | {self._input: "tensor(float)"}
        self._fixed = {name: every_token(file, name) for name in stage.inputs if name in LOGITS_TO_KEEP}
        if set(stage.inputs) != {self._input, *self._fixed}:
            raise Obstacle(Mismatch("lm_head", f"it reads {', '.join(stage.inputs)}, not the last norm alone"))
        self._session = open_stage(file, stage, Constants(file, [stage]), types)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """The logits of these rows of the norm's output: float32 [M, vocab]."""
        values = {self._input: OrtValue.ortvalue_from_numpy(np.ascontiguousarray(rows)[None]), **self._fixed}
        self._session.run(None, values, {})
        logits = values[self._logits].numpy()
        return logits.reshape(-1, logits.shape[-1]).astype(np.float32)


def _embedding(file: OnnxFile, decoder: Decoder) -> StageSession:
    (stage,) = cut(file, [], [decoder.embedding.output])
    types = {item.name: tensor_type(item) for item in file.inputs}
    if stage.inputs != [TOKEN_IDS] or types[TOKEN_IDS] != "tensor(int64)":
        raise Obstacle(Mismatch("embed_tokens", f"it does not read {TOKEN_IDS} of int64 alone"))
    return open_stage(file, stage, Constants(file, [stage]), types)


def _attentions(file: OnnxFile, decoder: Decoder, cache: KvCache) -> list[_Attention]:
    sessions: dict[tuple, AttentionSession] = {}
    found = []
    if not cache.in_place or any(value.data_type() != "tensor(float)" for value in cache.fixed.values()):
        raise Obstacle(Mismatch("layers.0.self_attn", "its cache is not float32 tensors that attention alone reads"))
    for block in decoder.blocks:
        attention = attention_of(block)
        shape = shape_of(attention)
        if shape not in sessions:
            sessions[shape] = AttentionSession(file, attention)
        found.append(_Attention(sessions[shape], cache.fixed[attention.past_key], cache.fixed[attention.past_value]))
    return found
