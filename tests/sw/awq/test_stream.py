# SPDX-License-Identifier: Apache-2.0
"""The stream's bytes are those that the device's memory holds."""

import pytest

from sw.awq.rounding import Form, nearest
from sw.awq.stream import stream
from sw.devices import make_config
from sw.devices.pack import prepare
from sw.export.floats import float_model
from sw.export.gguf import export_gguf
from sw.graph.file import OnnxFile
from sw.graph.float_linears import find_sites
from sw.graph.linears import find_linears
from sw.graph.rewrite import write_quantized
from tests.sw.export.test_gguf import write_gguf


@pytest.mark.parametrize(("bits", "head", "width"), [(2, True, 4), (2, False, 2), (3, True, 4), (4, True, 4)])
def test_packed_layers(bits, head, width, tmp_path):
    """head: whether the model has an int8 head; else it is float."""
    write_gguf(tmp_path / "m.gguf", "llama", "Q8_0", table="Q8_0")
    source = export_gguf(tmp_path / "m.gguf", tmp_path / "eight")
    eight = {layer.name: layer for layer in find_linears(source)}
    path = float_model(tmp_path / "m.gguf", tmp_path / "float")
    file, form = OnnxFile(path), Form(bits, 32)
    layers = {}
    for site in find_sites(file):
        if not site.is_head:
            layers[site.name] = nearest(site.weight(file), form).layer(site.name)
        elif head:
            layers[site.name] = eight["/lm_head/MatMulNBits"]
    made = write_quantized(path, tmp_path / "out", {n: (lambda each=each: each) for n, each in layers.items()}, {}, {})
    found = stream(made, form)
    assert found is not None and found.weight_bits == width
    config, own = (make_config(weight_bits=each) for each in (width, bits))
    body = [layer for layer in layers.values() if layer.bits == bits]
    assert found.layers == sum(prepare(config, layer).beats.size for layer in body)
    assert found.head == (prepare(config, eight["/lm_head/MatMulNBits"]).beats.size if head else 0)
    assert found.narrow is not None and found.narrow == sum(prepare(own, layer).beats.size for layer in body)
    assert found.float16 == 2 * sum(layer.q.size for layer in body)
    assert (found.narrow < found.layers) == (bits == 2 and head)


def test_no_hardware(tmp_path):
    """A group that no tile divides: the report has no figure then."""
    write_gguf(tmp_path / "m.gguf", "llama", "Q8_0", table="Q8_0")
    source = export_gguf(tmp_path / "m.gguf", tmp_path / "eight")
    assert stream(source, Form(8, 32)) is not None
    assert stream(source, Form(9, 32)) is None or stream(source, Form(17, 32)) is None
