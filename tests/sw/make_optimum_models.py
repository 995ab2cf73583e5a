# SPDX-License-Identifier: Apache-2.0
"""Makes optimum_*.onnx in tests/sw/data: small decoders with random weights, exported by Hugging Face's optimum.

    pip install torch==2.13.0 transformers==4.57.6 optimum==2.1.0 optimum-onnx==0.1.0 accelerate==1.15.0 \\
        onnx==1.23.2 onnxruntime==1.31.1
    python tests/sw/make_optimum_models.py [--out tests/sw/data] [NAME ...]

They are what `optimum-cli export onnx --task text-generation-with-past` writes (by way of TorchScript), quantised by
onnxruntime. optimum-onnx does not work with the transformers of make_torch_models.py.
"""
# pyright: reportMissingImports=false

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import onnx
import torch
from optimum.exporters.onnx import main_export
from tiny_decoders import INTERMEDIATE, Quantisation, configuration, quantise, random_weights, save
from transformers import Qwen2Config, Qwen2ForCausalLM


def export(
    seed: int, *, dtype: str = "fp32", tied: bool = False, plain_norms: bool = False, intermediate: int = INTERMEDIATE
) -> onnx.ModelProto:
    """A Qwen2 in the opset that optimum chooses (18). dtype: fp32 or fp16. plain_norms: see random_weights."""
    config = configuration("qwen2", tie_word_embeddings=tied, intermediate_size=intermediate)
    model = Qwen2ForCausalLM(Qwen2Config(**config))
    weights = random_weights("qwen2", seed, tied=tied, plain_norms=plain_norms, intermediate=intermediate)
    missing, unexpected = model.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()}, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"} and bool(missing) == tied
    with tempfile.TemporaryDirectory() as work:
        model.save_pretrained(f"{work}/model")
        task = "text-generation-with-past"
        main_export(f"{work}/model", f"{work}/onnx", task=task, dtype=dtype, do_validation=False)
        return onnx.load(f"{work}/onnx/model.onnx")


MAKERS: dict[str, Callable[[], tuple[onnx.ModelProto, Quantisation | None]]] = {
    "optimum_qwen2": lambda: (export(31, plain_norms=True), Quantisation(symmetric=True)),
    "optimum_qwen2_float16": lambda: (export(32, dtype="fp16"), Quantisation(symmetric=False)),
    "optimum_qwen2_unquantised": lambda: (export(33, tied=True, intermediate=64), None),
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="optimum's exports for the tests")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MAKERS)} (default: all)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in options.names or MAKERS:
        model, how = MAKERS[name]()
        save(quantise(model, how) if how else model, options.out / f"{name}.onnx")


if __name__ == "__main__":
    main()
