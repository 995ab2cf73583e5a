# SPDX-License-Identifier: Apache-2.0
"""The programs of a decoder, as jobs.

Program 0 has the norm of the embedding and q, k, v of block 0. Program i has the rest of block i - 1 (o, gate and up,
down), then q, k, v of block i; the last one ends with the head. Attention i is between program i and program i + 1.

RMSNorm is a part of the jobs around it: the job that makes x writes x * weight, too, and computes each token's scale r;
the layers after the norm multiply their results by r. If the layers after it need x * weight in several places, for two
planes for example, jobs without a linear layer copy it. Only the norm of every head of q and k has jobs of its own, see
head_norms.
"""

import enum
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from hw.spec.memory.operands import FLOAT_BYTES
from hw.spec.numerics.vector import PIECE, argmax
from hw.spec.ops import Wait
from sw.devices.base import Device, PreparedBatch
from sw.devices.jobs import NOWHERE, Epilogue, Job, LinearJob, Rotation, Rows, Second, VectorJob
from sw.program.attention import DeviceAttention
from sw.program.head_norms import head_norm_jobs
from sw.program.load import LoadedBlock, LoadedDecoder, LoadedLayer, LoadedNorm
from sw.program.memory import Inputs, Matrix, Pieces, Table

MOST_CALLS = 32
"""Programs of whole calls that are kept. Each takes some tens of KiB of the device's memory."""


class Output(enum.Enum):
    """The output of a decoder's last program: every token's logits; the last token's, without or with the maxima of
    their pieces; or only these maxima.

    If the head is not quantized, it is the norm of these tokens instead, and there are no pieces.
    """

    ALL = "all"
    LAST = "last"
    PIECES = "pieces"
    BEST = "best"


class Programs:
    """The programs of a decoder for any number of tokens, and the places of their data.

    Members
    -------
    count: number of programs: the blocks and one more.
    embedded: the embedding's rows; the host writes them before program 0.
    rotaries: rows of the tokens of each rotary table; the host writes them before program 0. None with attention on the
        device: then the whole tables are in the device's memory.
    qkv: q, k and v of the last program; heads of q and k have the order of `rotated_rows`.
    attention: attention on the device, or None.
    results: the logits, or the norm before a head that is not quantized: one row or all.

    Raises DeviceError if the device's memory is full.
    """

    def __init__(self, device: Device, decoder: LoadedDecoder, attention: DeviceAttention | None = None):
        self._device, self._decoder, self.attention = device, decoder, attention
        self.count = len(decoder.blocks) + 1
        self.embedded, self._middle = Matrix(device, decoder.hidden), Matrix(device, decoder.hidden)
        self.qkv = Matrix(device, decoder.qkv_columns)
        self.rotaries: list[Matrix] = []
        self._tables: list[Table] = []
        if attention:
            self._tables = [Table(device, rotary[: attention.context]) for rotary in decoder.rotaries]
        else:
            self.rotaries = [Matrix(device, decoder.head_size) for _ in decoder.rotaries]
        # A head's norm between its two jobs.
        self._heads = Matrix(device, decoder.head_size) if any(block.head_norms for block in decoder.blocks) else None
        self.results = Matrix(device, decoder.vocab if decoder.head else decoder.hidden)
        self._pieces = Pieces(device, decoder.vocab)
        self._normed, self._attended, self._gated = Inputs(device), Inputs(device), Inputs(device)
        # The last norm's input times its weight, if no layer on the device reads it.
        self._unscaled = Matrix(device, decoder.hidden)
        self._prepared: dict[tuple[int, int, Output | None], PreparedBatch] = {}
        # The calls with attention on the device, the latest used last: batches, and the positions of their jobs.
        self._calls: OrderedDict[tuple, tuple[PreparedBatch, int]] = OrderedDict()

    def attended(self, index: int, tokens: int) -> np.ndarray:
        """The place for the output of attention `index`, which the host writes: float32 [tokens, planes, columns]."""
        return self._attended.of(self._decoder.blocks[index].o.plan).view(tokens)

    def batch(self, index: int, tokens: int, output: Output) -> PreparedBatch:
        """A program, ready to submit. output: has a meaning for the last program alone."""
        key = index, tokens, output if index == self.count - 1 else None
        if key not in self._prepared:
            self._prepared[key] = self._device.prepare(self.jobs(index, tokens, output), together=True)
        return self._prepared[key]

    def call(self, tokens: int, position: int, output: Output | None) -> PreparedBatch:
        """The program of a call with attention on the device, ready to submit; see `whole`.

        Calls of the same tokens, output and units of attention are one program, which is moved to the position. No
        earlier call may be running.
        """
        attention = self.attention
        assert attention is not None
        attention.use()
        key = tokens, output, attention.limits(tokens, position)
        batch, first = self._calls.pop(key, (None, position))
        if batch is None:
            while len(self._calls) >= MOST_CALLS:
                self._calls.popitem(last=False)
            batch = self._device.prepare(self.whole(tokens, position, output), together=True)
        self._calls[key] = batch, first
        self._device.move(batch, position - first)
        return batch

    def jobs(self, index: int, tokens: int, output: Output, position: int = 0) -> list[Job]:
        """The jobs of a program. position: that of the first token, if attention is on the device."""
        blocks = self._decoder.blocks
        if index == 0:
            return self._begin(blocks[0], tokens, position)
        if index < self.count - 1:
            block = blocks[index]
            norm, readers = block.input_norm, block.qkv
            return self._rest(blocks[index - 1], norm, readers, tokens) + self._qkv(block, tokens, position)
        # After the last attention, only the tokens whose logits are needed.
        first = 0 if output is Output.ALL else tokens - 1
        readers = (self._decoder.head,) if self._decoder.head else ()
        rest = self._rest(blocks[-1], self._decoder.final_norm, readers, tokens - first, first=first, is_last=True)
        return [*rest, self._end(tokens - first, output)]

    def whole(self, tokens: int, position: int, output: Output | None) -> list[Job]:
        """The jobs of a call with attention on the device, for tokens from a position on. None: only the cache."""
        attention, blocks, qkv = self.attention, self._decoder.blocks, self.qkv.rows
        assert attention is not None
        jobs: list[Job] = []
        for index, block in enumerate(blocks):
            is_last = index == len(blocks) - 1
            jobs += self.jobs(index, tokens, Output.ALL, position)
            jobs += attention.append_jobs(index, tokens, position, qkv)
            if is_last and output is None:
                return jobs
            last = is_last and output is not Output.ALL
            place, copies = self._attended.spread(block.o.name, [block.o.plan], tokens)
            jobs += attention.jobs(index, tokens, position, qkv, place, last=last)
            jobs += copies
        assert output is not None
        return jobs + self.jobs(self.count - 1, tokens, output)

    def best(self) -> tuple[int, float]:
        """The first of the largest logits, its index and itself, after a program with Output.BEST."""
        maxima, places = self._pieces.view()
        piece = int(argmax(maxima))
        return piece * PIECE + int(places[piece]), float(maxima[piece])

    def maxima(self) -> np.ndarray:
        """The maximum of each piece of 256 logits, float32 [pieces], after a program with Output.PIECES."""
        return self._pieces.view()[0].copy()

    def logits(self, pieces: np.ndarray) -> np.ndarray:
        """Logits of pieces, float32 [R, 256], after a program with Output.PIECES; NaN after the last token."""
        row, found = self.results.view(1)[0], np.full((len(pieces), PIECE), np.nan, np.float32)
        for place, piece in zip(found, pieces, strict=True):
            part = row[piece * PIECE : (piece + 1) * PIECE]
            place[: len(part)] = part
        return found

    def _begin(self, block: LoadedBlock, tokens: int, position: int) -> list[Job]:
        second, copies = self._scaled(block.input_norm, block.qkv, tokens)
        epilogue = Epilogue(second=second, epsilon=block.input_norm.epsilon)
        norm = VectorJob(block.input_norm.name, tokens, self._decoder.hidden, self.embedded.rows, epilogue=epilogue)
        return [norm, *copies, *self._qkv(block, tokens, position)]

    def _scaled(self, norm: LoadedNorm, readers: Sequence[LoadedLayer], tokens: int) -> tuple[Second, list[VectorJob]]:
        """The second output of a job before a norm, and the copies of it. readers: the layers after the norm."""
        if not readers:
            return Second(norm.weight, self._unscaled.rows), []
        place, copies = self._normed.spread(norm.name, [layer.plan for layer in readers], tokens)
        return Second(norm.weight, place), copies

    def _rotation(self, block: LoadedBlock, heads: int, position: int) -> Rotation | None:
        """The rotation of heads of the tokens from a position on."""
        size, index = self._decoder.head_size, block.rotary
        if index is None:
            return None
        if self._tables:
            return Rotation(self._tables[index].rows(position), size, heads, self._tables[index].row(position))
        return Rotation(self.rotaries[index].rows, size, heads)

    def _qkv(self, block: LoadedBlock, tokens: int, position: int) -> list[Job]:
        jobs: list[Job] = []
        # Layers with the same activations are adjacent.
        layers = sorted(block.qkv, key=lambda layer: (layer.plan.planes, layer.plan.layout.k, layer.plan.layout.groups))
        before: LoadedLayer | None = None
        for layer in layers:
            rotation = self._rotation(block, layer.rotated, position) if layer.rotated else None
            job = self._linear(
                layer,
                self._normed,
                tokens,
                Rows(self.qkv.rows.buffer.part(FLOAT_BYTES * layer.first), self.qkv.rows.pitch),
                Epilogue(scale=True, addend=_bias(layer), rotation=rotation),
                reuse=before is not None and _activations(before) == _activations(layer),
                # After the first job has waited, the activations of all are in memory.
                wait=Wait.NOTHING if before else Wait.ACTIVATIONS,
            )
            jobs.append(job)
            before = layer
        if self._heads:
            rotation, max_rows = self._rotation(block, 1, position), self._device.config.max_tokens
            jobs += head_norm_jobs(block.head_norms, tokens, max_rows, self.qkv.rows, self._heads.rows, rotation)
        return jobs

    def _rest(
        self,
        block: LoadedBlock,
        norm: LoadedNorm,
        readers: Sequence[LoadedLayer],
        tokens: int,
        *,
        first: int = 0,
        is_last: bool = False,
    ) -> list[Job]:
        """The jobs from o to down, and the norm after them. first: the first of the tokens in the attention's output.

        is_last: nothing reads the sum after down but the norm.
        """
        post = block.post_attention_norm
        second, copies = self._scaled(post, [block.gate_up], tokens)
        addend = self.embedded.row(first)
        epilogue = Epilogue(addend=addend, second=second, epsilon=post.epsilon)
        # If the host computes attention, its output is in memory before the program starts.
        wait = Wait.ACTIVATIONS if self.attention else Wait.NOTHING
        o = self._linear(block.o, self._attended, tokens, self._middle.rows, epilogue, first=first, wait=wait)
        gated, gate_copies = self._gated.spread(block.gate_up.name, [block.down.plan], tokens)
        epilogue = Epilogue(scale=True, addend=_bias(block.gate_up), silu=True)
        gate_up = self._linear(block.gate_up, self._normed, tokens, gated, epilogue)
        second, norm_copies = self._scaled(norm, readers, tokens)
        epilogue = Epilogue(addend=self._middle.rows, second=second, epsilon=norm.epsilon)
        place = Rows(NOWHERE) if is_last else self.embedded.rows
        down = self._linear(block.down, self._gated, tokens, place, epilogue)
        return [o, *copies, gate_up, *gate_copies, down, *norm_copies]

    def _end(self, tokens: int, output: Output) -> Job:
        """The head, or what is left of the norm before it."""
        head = self._decoder.head
        if head is None:
            name, rows, results = self._decoder.final_norm.name, self._unscaled, self.results.rows
            scale = Epilogue(scale=True)
            return VectorJob(
                name, tokens, rows.columns, rows.rows, results.buffer, Wait.ACTIVATIONS, scale, results.pitch
            )
        pieces = self._pieces.rows if output in (Output.PIECES, Output.BEST) else None
        results = Rows(NOWHERE) if output is Output.BEST else self.results.rows
        epilogue = Epilogue(scale=True, addend=_bias(head), pieces=pieces)
        return self._linear(head, self._normed, tokens, results, epilogue)

    def _linear(
        self,
        layer: LoadedLayer,
        inputs: Inputs,
        tokens: int,
        results: Rows,
        epilogue: Epilogue,
        *,
        first: int = 0,
        reuse: bool = False,
        wait: Wait = Wait.ACTIVATIONS,
    ) -> LinearJob:
        return LinearJob(
            layer.name,
            layer.plan.layout,
            tokens,
            layer.weights,
            inputs.of(layer.plan).row(first),
            results.buffer,
            reuse,
            wait,
            epilogue,
            results.pitch,
        )


def _bias(layer: LoadedLayer) -> Rows | None:
    return None if layer.bias is None else Rows(layer.bias)


def _activations(layer: LoadedLayer) -> tuple[int, int, int]:
    """Layers that are equal in this can use the same activations on chip."""
    return layer.plan.planes, layer.plan.layout.k, layer.plan.layout.group_size
