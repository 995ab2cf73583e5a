# SPDX-License-Identifier: Apache-2.0
"""A language model, token by token: see the package."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from onnxruntime import OrtValue

from sw.checkpoints.adapter import Adapter
from sw.common.errors import UserError
from sw.devices.base import Device
from sw.graph.file import OnnxFile, tensor_type
from sw.graph.linears import find_linears
from sw.graph.nodes import logits_name
from sw.ort.cache import KvCache
from sw.ort.cut import cut
from sw.ort.feeds import DTYPES, LOGITS_TO_KEEP, every_token, unknown_input
from sw.ort.stages import Constants, StageSession, open_stage
from sw.program.load import Progress
from sw.runtime.accelerated import Accelerated, Runs
from sw.runtime.adapters import AdapterBatch
from sw.runtime.base import BLOCK, BaseDecoder


class Decoder(BaseDecoder):
    """A decoder graph: the device computes its linear layers, onnxruntime everything else.

    Parameters
    ----------
    path: the ONNX file. Its inputs are input_ids, and attention_mask, position_ids and a KV cache where it has them.
    device: computes every quantized linear layer; None: onnxruntime computes them as well, in float32.
    context: tokens that the cache holds.
    progress: called with (layers done, layers in all, name) while weights are packed into the device's memory.
    adapters: LoRA adapters by a name; all are in the device's memory, and `adapter` says which is used.

    Raises UserError for graphs that are no decoder, for layers that the device cannot run, and for adapters of other
    models.
    """

    def __init__(
        self,
        path: Path,
        device: Device | None,
        *,
        context: int,
        progress: Progress | None = None,
        adapters: Mapping[str, Adapter] | None = None,
    ):
        super().__init__(path, device.config.max_tokens if device else BLOCK, context)
        if adapters and device is None:
            raise UserError("an adapter needs an accelerator, not --device onnxruntime: that runs the graph as it is")
        self._digest = device.config.digest if device else ""
        linears = find_linears(path) if device else None
        file = linears.file if linears else OnnxFile(path)
        self._inputs = {item.name: tensor_type(item) for item in file.inputs}
        # If a device computes the head, cutting the graph ensures that only the requested logits are computed.
        self._fixed = {
            item.name: every_token(file, item.name)
            for item in file.inputs
            if item.name in LOGITS_TO_KEEP and self._inputs[item.name] in DTYPES
        }
        self._logits = logits_name(file)
        self._cache = KvCache(file, context)
        self._check_inputs()
        # (tokens, last token alone) -> tensors that have the same place in every such call.
        self._places: dict[tuple[int, bool], dict[str, OrtValue]] = {}
        self._adapters, self._adapter = dict(adapters or {}), None
        accelerated = None
        if device and linears:
            accelerated = Accelerated(device, linears, self._logits, progress)
            accelerated.adapt(self._adapters)
        stages = cut(file, accelerated.nodes if accelerated else [], [self._logits, *self._cache.outputs])
        constants = Constants(file, stages)
        types = dict(self._inputs)
        self._steps: list[tuple[StageSession | None, list[Runs]]] = []
        # An adapter's name -> its layers after each step.
        self._updates: dict[str, list[AdapterBatch | None]] = {name: [] for name in self._adapters}
        # The number of stages after which the cache is complete.
        self._cache_steps = 0
        for stage in stages:
            session = open_stage(file, stage, constants, types) if stage.nodes else None
            types.update(session.types if session else {})
            batches, updates = accelerated.place(stage) if accelerated else ([], {})
            if accelerated:
                types.update((made, types[read]) for read, made in accelerated.outputs(stage))
            self._steps.append((session, batches))
            for name, made in self._updates.items():
                made.append(updates.get(name))
            if not set(self._cache.outputs).isdisjoint(stage.outputs):
                self._cache_steps = len(self._steps)

    @property
    def adapter(self) -> str | None:
        """The adapter that is used, None for the model alone. A change empties the cache, which is of the old model.

        Raises UserError for a name that is not in `adapters`.
        """
        return self._adapter

    @adapter.setter
    def adapter(self, name: str | None) -> None:
        if name is not None and name not in self._adapters:
            raise UserError(f"there is no adapter {name}, but {', '.join(self._adapters) or 'none'}")
        if name != self._adapter:
            self._adapter = name
            self.reset()

    def forward(self, ids: Sequence[int], every: bool = False) -> np.ndarray:
        """See BaseDecoder."""
        values = self._run(ids, every, len(self._steps))
        start = time.perf_counter()
        logits = values[self._logits].numpy()
        rows = len(ids) if every else 1
        logits = logits.reshape(-1, logits.shape[-1])[-rows:].astype(np.float32)
        self.usage.conversion += time.perf_counter() - start
        return logits

    def prefill(self, ids: Sequence[int]) -> None:
        """See BaseDecoder."""
        self._run(ids, False, self._cache_steps)

    def _run(self, ids: Sequence[int], every: bool, steps: int) -> dict[str, OrtValue]:
        """Runs the first `steps` stages and the batches between them; returns all tensors."""
        tokens, total, last = len(ids), self._total(ids), not every
        places = self._places.setdefault((tokens, last), dict(self._cache.fixed))
        values = places | self._feeds(ids, total)
        for index, (session, batches) in enumerate(self._steps[:steps], 1):
            if session:
                start = time.perf_counter()
                session.run((tokens, last), values, places)
                self.usage.onnxruntime += time.perf_counter() - start
            if index < steps or steps == len(self._steps):
                for batch in batches:
                    batch.run(tokens, last, values, places, self.usage)
                update = self._updates[self._adapter][index - 1] if self._adapter is not None else None
                if update:
                    update.run(tokens, last, values, places, self.usage)
        self._cache.take(values)
        self._hold(total)
        self.usage.tokens += tokens
        return values

    @property
    def cache_form(self) -> str:
        """See BaseDecoder. Linear layers of hardware have other results than those of onnxruntime."""
        adapter = f" {self._adapters[self._adapter].digest}" if self._adapter is not None else ""
        return f"onnxruntime {self._digest} {self.context}{adapter}"

    def cache_arrays(self) -> dict[str, np.ndarray]:
        """See BaseDecoder."""
        return self._cache.arrays()

    def restore(self, arrays: Mapping[str, np.ndarray], length: int, reached: int = 0) -> None:
        """See BaseDecoder."""
        self._cache.restore(arrays, length)
        self.length, self.reached = length, max(length, reached)

    def shorten(self, length: int) -> None:
        """See BaseDecoder."""
        super().shorten(length)
        self._cache.shorten(length)

    def reset(self) -> None:
        """See BaseDecoder."""
        super().reset()
        self._cache.reset()

    def close(self) -> None:
        """See BaseDecoder."""
        self._steps.clear()
        self._places.clear()
        self._updates.clear()

    def _feeds(self, ids: Sequence[int], total: int) -> dict[str, OrtValue]:
        feeds = {
            "input_ids": np.asarray(ids, np.int64)[None],
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(self.length, total)[None],
        }
        values = dict(self._cache.feed()) | self._fixed
        for name, array in feeds.items():
            if name in self._inputs:
                array = np.ascontiguousarray(array, DTYPES[self._inputs[name]])
                values[name] = OrtValue.ortvalue_from_numpy(array)
        return values

    def _check_inputs(self) -> None:
        known = {"input_ids", "attention_mask", "position_ids", *LOGITS_TO_KEEP, *self._cache.inputs}
        if "input_ids" not in self._inputs:
            raise UserError(f"{self.path} is no decoder: it has no input input_ids")
        if not self._cache.inputs:
            raise UserError(f"{self.path} has no KV cache: export it with past_key_values as inputs")
        for name, kind in self._inputs.items():
            if name not in known or kind not in DTYPES:
                raise unknown_input(self.path, name, kind)
