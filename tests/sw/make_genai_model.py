# SPDX-License-Identifier: Apache-2.0
"""Makes genai_*.onnx in tests/sw/data: a small Qwen2 with random weights through onnxruntime-genai's model builder.

    pip install onnxruntime-genai==0.18.0 onnx-ir==1.1.0 torch==2.13.0 transformers==5.23.0
    python tests/sw/make_genai_model.py [--out tests/sw/data]

The models are committed, because these packages are far heavier than the tests that read them. Intermediate size 352
is eleven blocks of 32: packed zero points of an odd number of blocks have a padding nibble.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

# name -> (embedding and head share their weights, options of the builder)
VARIANTS = {
    "genai_qwen2_symmetric": (False, ["is_symmetric=true"]),
    "genai_qwen2_asymmetric": (False, ["is_symmetric=false"]),
    "genai_qwen2_qdq": (False, ["is_symmetric=true", "use_qdq=true"]),
    # With is_symmetric=false builder 0.18.0 writes a tied model that onnxruntime does not load.
    "genai_qwen2_tied": (True, ["is_symmetric=true"]),
}
VOCAB = 256


def make_huggingface_model(folder: Path, tied: bool) -> None:
    """Two layers, hidden size 128, biases on q, k and v as in every Qwen2; seeded."""
    torch.manual_seed(20240607)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def build(source: Path, target: Path, options: list[str]) -> None:
    """Runs the builder and stores its model as one file."""
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", f"{work}/out"]
        command += ["-p", "int4", "-e", "cpu", "-c", f"{work}/cache", "--extra_options", *options]
        subprocess.run(command, check=True)
        model = onnx.load(f"{work}/out/model.onnx")
    # The builder notes the path of its input; the files should not differ from one machine to the next.
    for node in model.graph.node:
        del node.metadata_props[:]
    del model.metadata_props[:]
    onnx.save(model, target)
    print(f"{target}: {target.stat().st_size} bytes")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="onnxruntime-genai models for the tests")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, (tied, options) in VARIANTS.items():
        with tempfile.TemporaryDirectory() as source:
            make_huggingface_model(Path(source), tied)
            build(Path(source), out / f"{name}.onnx", options)


if __name__ == "__main__":
    main()
