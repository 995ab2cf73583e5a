# SPDX-License-Identifier: Apache-2.0
"""``python -m sw.generate``: what the device computes by default and with --operators, and the line that says so."""

import onnx
import pytest

from hw.spec.config import OPERATORS
from sw import generate
from tests.sw.test_generate import PROMPT, copied, model, run

__all__ = ["copied", "model"]


@pytest.mark.parametrize("operators", [*OPERATORS, "host"])
@pytest.mark.parametrize("options", [[], ["--temperature", 1, "--top-p", 0.01]], ids=["greedy", "drawn"])
def test_operators(options, operators, model, capsys):
    """A model that runs as programs, or its linear layers alone, gives onnxruntime's tokens."""
    wanted = run(capsys, model, "--max-new-tokens", 12, *options)["ids"]
    arguments = ["--device", "reference", "--operators", operators, "--tile", 8, "--max-new-tokens", 12, *options]
    values = run(capsys, model, *arguments)
    assert values["config"]["operators"] == ("decoder" if operators == "decoder" else "linear")
    assert values["programs"] == values["attention"] == (operators == "decoder")
    assert values["ids"] == wanted


def softcap(path):
    """Gives the scores of the model a limit, which no program has."""
    graph = onnx.load(path)
    for node in graph.graph.node:
        if node.op_type == "GroupQueryAttention":
            node.attribute.append(onnx.helper.make_attribute("softcap", 30.0))
    onnx.save(graph, path)


LINES = {
    "whole": ([], "the accelerator runs the whole token, attention included; only the embedding is in onnxruntime"),
    "asked": (["--score-words", "0"], "onnxruntime computes attention: the hardware has score_words 0"),
    "bits": (
        ["--weight-bits", "5", "--operators", "decoder"],
        "onnxruntime computes attention, because of the hardware: a KV cache takes weight_bits of 4 or 8, not 5",
    ),
    "graph": (["softcap"], "onnxruntime computes attention, because of layers.0.self_attn: its scores have a softcap"),
    "small": (
        ["--score-words", "64", "--context", "32", "--max-tokens", "1"],
        "the accelerator runs the whole token, attention included; only the embedding is in onnxruntime",
    ),
    "host": (["--operators", "host"], "the accelerator runs the linear layers alone: --operators host"),
    "linear": (
        ["--operators", "linear"],
        "the accelerator runs the linear layers alone: the hardware has operators linear",
    ),
}
END = {
    "the accelerator runs the whole": "the model ran as programs, attention included; only the embedding was in",
    "onnxruntime computes attention": "the model ran as programs, with attention in onnxruntime",
}


@pytest.mark.parametrize(("options", "line"), LINES.values(), ids=LINES)
def test_where_a_token_runs(options, line, copied, capsys):
    """One line before the text says it, and one after; hardware has attention only where the graph has, too."""
    if "softcap" in options:
        softcap(copied)
    arguments = ["--model", str(copied), "--prompt", PROMPT, "--device", "reference", "--max-new-tokens", "2"]
    assert generate.main([*arguments, "--tile", "8", *(option for option in options if option != "softcap")]) == 0
    out, err = capsys.readouterr()
    assert [text for text in err.splitlines() if text.startswith("note: ")] == [f"note: {line}"]
    assert [start for start, text in END.items() if text in out] == [start for start in END if line.startswith(start)]
    assert ("scores in each of two banks" in err) == line.startswith("the accelerator runs the whole")
