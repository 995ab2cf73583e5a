# SPDX-License-Identifier: Apache-2.0
"""Runs a float decoder graph block by block over some windows of tokens, and stops at its linear layers.

The graph is cut at its linear layers (sw.ort.cut). onnxruntime computes the stages between them: one stage for all
windows, then the next stage. So only one stage's tensors are in memory, for a model of any depth, and the inputs of a
layer can be computed with earlier layers that are quantized already.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from onnxruntime import OrtValue

from sw.awq.graph import Group, group_sites
from sw.awq.threads import threaded
from sw.common.errors import UserError, one_line
from sw.graph.file import OnnxFile, tensor_shape, tensor_type
from sw.graph.float_linears import FloatSite
from sw.graph.nodes import logits_name
from sw.ort.cache import pair_names
from sw.ort.cut import Stage, cut
from sw.ort.feeds import CACHE_RANK, DTYPES, empty_cache_shape
from sw.ort.stages import Constants, StageSession, open_stage

TOLERANCES = {np.dtype(np.float32): 1e-3, np.dtype(np.float16): 2e-2}
"""Largest error, relative to a channel's largest value, of a tensor that is proportional to rows of a weight. The
scales in the trial are powers of two, so a wrong prediction has a far larger error."""


@dataclass
class Step:
    """One stage, and the layers after it, which must be computed before the next stage.

    Members
    -------
    groups: layers that read the same tensor.
    """

    groups: list[Group]
    _stage: Stage
    _run: "Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]] | None"
    _values: list[dict[str, np.ndarray]]
    _probe: dict[str, np.ndarray]
    _dying: frozenset[str]
    _before: Mapping[str, FloatSite]

    def inputs(self, group: Group) -> list[np.ndarray]:
        """The layers' input for every window, float32 [tokens, K]. Raises UserError if it is not finite."""
        arrays = []
        for values in self._values:
            x = values[group.input_name]
            x = np.ascontiguousarray(x.reshape(-1, x.shape[-1]), np.float32)
            if x.shape[1] != group.k or not np.isfinite(x).all():
                problem = "not finite (NaN or infinity)" if x.shape[1] == group.k else f"{list(x.shape)} values"
                raise UserError(f"layer {group.sites[0].name}: its activations are {problem}")
            arrays.append(x)
        return arrays

    def compute(self, site: FloatSite, weights: Sequence[np.ndarray], bias: np.ndarray | None = None) -> None:
        """Computes a layer. weights: float32 [N, K] for every window. bias: [N], if the node itself adds one."""

        def product(window: int) -> None:
            values = self._values[window]
            x = values[site.node.input[0]]
            y = x.reshape(-1, site.k).astype(np.float32, copy=False) @ weights[window].T
            if bias is not None:
                y += bias
            values[site.node.output[0]] = y.reshape(*x.shape[:-1], site.n).astype(x.dtype, copy=False)

        threaded(product, range(len(self._values)))

    def made_of(self, group: Group) -> list[FloatSite]:
        """The layers from whose products this stage makes the group's input; nothing else reads these products."""
        if self._run is None or group.input_name not in self._stage.outputs:
            return []
        return [self._before[name] for name in self._stage.inputs if name in self._before and name in self._dying]

    def scales_with(self, group: Group, site: FloatSite, rows: np.ndarray, bias: np.ndarray | None) -> bool:
        """Whether channel c of the group's input is proportional to output row rows[c] of `site`, and nothing else in
        the graph depends on these rows. It is found by a trial with scaled rows.

        rows: int [K]. bias: [N] that is added to the site's product outside its node.
        """
        assert self._run is not None, "made_of is empty then"
        name = site.node.output[0]
        factors = np.ones(site.n, np.float32)
        factors[rows] = 2.0 ** np.random.default_rng(0).choice([-2, -1, 1, 2], site.n)[rows]
        before = self._run(self._probe)
        y = self._probe[name].astype(np.float32)
        y = y * factors if bias is None else (y + bias) * factors - bias
        after = self._run(self._probe | {name: y.astype(self._probe[name].dtype)})
        x = before[group.input_name]
        expected = before | {group.input_name: (x * factors[rows]).astype(x.dtype)}
        tolerance = TOLERANCES[self._probe[name].dtype]
        return all(_close(after[key], expected[key], tolerance) for key in expected)


def walk(
    file: OnnxFile, sites: Sequence[FloatSite], windows: Sequence[Sequence[int]], head: bool = False
) -> Iterator[Step]:
    """Runs the graph over windows of token ids, each with an empty cache, and yields a step between two stages.

    sites: all float linear layers of the graph. head: whether there is a last step for the head; logits are not
    computed. The caller must call Step.compute for every layer of a step, except in the last step. Raises UserError for
    graphs that are not decoders, and if onnxruntime refuses them.
    """
    groups = group_sites(file, sites)
    by_input = {group.input_name: group for group in groups}
    by_output = {site.node.output[0]: site for site in sites}
    caches = {present for _, present in pair_names(file)}
    if not caches:
        raise UserError(f"{file.path} has no KV cache: export it with past_key_values as inputs")
    outputs = [logits_name(file), *(item.name for item in file.graph.output if item.name not in caches)]
    stages = cut(file, [site.node for site in sites], list(dict.fromkeys(outputs)))
    constants = Constants(file, stages)
    types = {item.name: tensor_type(item) for item in file.inputs}
    last_use = {name: number for number, stage in enumerate(stages) for name in _reads(stage, sites)}
    wanted = [
        number for number, stage in enumerate(stages) if any(head or not sites[i].is_head for i in stage.accelerated)
    ]
    values = [feeds(file, window) for window in windows]
    for number, stage in enumerate(stages[: max(wanted, default=-1) + 1]):
        run = None
        probe = {name: values[0][name] for name in stage.inputs}
        if stage.nodes:
            session = open_stage(file, stage, constants, types)
            run = partial(_run_stage, session, constants.shared(stage))
            for before, after in zip(values, threaded(run, values)):
                before.update(after)
            types.update(session.types)
        here = [sites[i] for i in stage.accelerated]
        types.update((site.node.output[0], types[site.node.input[0]]) for site in here)
        dying = frozenset(name for name in stage.inputs if last_use[name] == number and name not in outputs)
        names = dict.fromkeys(site.node.input[0] for site in here)
        # Tensors without later readers are dropped: now if no layer of this step reads them, else after the step.
        later = {name for name, last in last_use.items() if last > number}
        _keep(values, later.union(names))
        yield Step([by_input[name] for name in names], stage, run, values, probe, dying, by_output)
        _keep(values, later)


def _keep(values: list[dict[str, np.ndarray]], names: set[str]) -> None:
    """Drops all tensors but these from all windows."""
    for held in values:
        for name in held.keys() - names:
            del held[name]


def _run_stage(
    session: StageSession, shared: Mapping[str, OrtValue], values: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """A stage's outputs for inputs from `values`. Raises UserError if onnxruntime fails."""
    given = {name: OrtValue.ortvalue_from_numpy(np.ascontiguousarray(values[name])) for name in session.stage.inputs}
    names = session.stage.outputs
    try:
        made = session.session.run_with_ort_values(names, given | dict(shared))
    except Exception as error:
        raise UserError(f"onnxruntime failed to run the model ({one_line(error)})") from error
    return {name: value.numpy() for name, value in zip(names, made)}


def feeds(file: OnnxFile, ids: Sequence[int]) -> dict[str, np.ndarray]:
    """A decoder's inputs for a sequence with an empty cache. Raises UserError for unknown inputs."""
    ids_array = np.asarray(ids, np.int64)[None]
    known = {
        "input_ids": ids_array,
        "attention_mask": np.ones_like(ids_array),
        "position_ids": np.arange(len(ids))[None],
    }
    found = {}
    for item in file.inputs:
        kind = tensor_type(item)
        shape = tensor_shape(item)
        if kind in DTYPES and item.name in known:
            found[item.name] = known[item.name].astype(DTYPES[kind])
        elif kind in DTYPES and len(shape) == CACHE_RANK:
            found[item.name] = np.zeros(empty_cache_shape(file, item.name, shape), DTYPES[kind])
        else:
            raise UserError(f"{file.path}: input {item.name} ({kind}) is none that a decoder has")
    if "input_ids" not in found:
        raise UserError(f"{file.path} is no decoder: it has no input input_ids")
    return found


def _reads(stage: Stage, sites: Sequence[FloatSite]) -> list[str]:
    return [*stage.inputs, *(sites[i].node.input[0] for i in stage.accelerated)]


def _close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> bool:
    if not np.issubdtype(expected.dtype, np.floating):
        return np.array_equal(found, expected)
    found, expected = (values.reshape(-1, values.shape[-1]).astype(np.float32) for values in (found, expected))
    return bool((np.abs(found - expected).max(axis=0) <= tolerance * np.abs(expected).max(axis=0)).all())
