# SPDX-License-Identifier: Apache-2.0
"""Which of the graphs in a folder, or in a repository, is the model. Names are paths from its root, with slashes."""

from collections.abc import Iterable

from sw.common.errors import UserError
from sw.common.text_files import SUBFOLDER

FLOAT = "model.onnx"
QUANTIZED = (FLOAT, "model_q4.onnx", "model_q4f16.onnx")
"""Names of graphs with quantized layers, in order of preference if a folder has several. In SUBFOLDER model.onnx is the
float graph, and comes last."""
ONNX = ".onnx"
LISTED = 4
"""Number of names in a message."""


def choose_graph(where: str, names: Iterable[str], floats: bool) -> str | None:
    """The graph in the root, else in SUBFOLDER; None if there is none.

    where: the folder's name for messages. floats: take the float graph of several, not the quantized one. Raises
    UserError if there are several and their names do not decide.
    """
    graphs = sorted(name for name in names if name.endswith(ONNX))
    for prefix, order in (("", QUANTIZED), (f"{SUBFOLDER}/", (*QUANTIZED[1:], QUANTIZED[0]))):
        found = [name for name in graphs if name.rpartition("/")[0] == prefix.removesuffix("/")]
        if not found:
            continue
        for name in (FLOAT,) if floats else order:
            if prefix + name in found:
                return prefix + name
        if len(found) == 1:
            return found[0]
        listed = ", ".join(name.removeprefix(prefix) for name in found[:LISTED])
        place = f"{where}/{SUBFOLDER}" if prefix else where
        raise UserError(f"{place} holds {len(found)} .onnx files ({listed}), and none is named {FLOAT}: name one")
    return None
