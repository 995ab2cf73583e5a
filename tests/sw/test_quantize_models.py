# SPDX-License-Identifier: Apache-2.0
"""Real shapes through the quantizer: AWQ's quality on SmolLM2, and the memory for Qwen2.5-0.5B's shape."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sw.checkpoints.autoawq_writer import write_autoawq_folder
from sw.export.huggingface import export_checkpoint
from sw.graph.linears import find_linears
from sw.synthetic import QWEN2_5_0_5B, write_float

ROOT = Path(__file__).resolve().parents[2]
PEAK = """
import resource, sys
from sw import quantize
quantize.main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""
"""It runs in a separate process, because a peak is that of the whole life of a process; in KiB."""


def quantize(*arguments: object) -> tuple[dict, int]:
    """The command's report, and its largest resident memory in bytes."""
    command = [sys.executable, "-c", PEAK, *map(str, arguments), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), 1024 * int(done.stderr.splitlines()[-1])


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_smollm2(tmp_path):
    """On a text that is not the calibration text, AWQ recovers more than half of the loss of rounding to nearest, in
    less than 3 GB. An export to AutoAWQ and back keeps every q, zero point and scale.
    """
    report, peak = quantize("smollm2", "--out", tmp_path / "onnx")
    assert report["recovered"] > 0.5
    assert peak < 3e9
    assert len(report["layers"]) == 210 and all(layer["fold"] for layer in report["layers"])
    assert sum(layer["error"] < layer["error_rtn"] for layer in report["layers"]) == 210
    write_autoawq_folder(tmp_path / "onnx" / "model.onnx", tmp_path / "awq")
    found = find_linears(export_checkpoint(tmp_path / "awq", tmp_path / "again"))
    for layer, expected in zip(found, find_linears(tmp_path / "onnx" / "model.onnx"), strict=True):
        for field in ("q", "scales", "zero_points"):
            assert np.array_equal(getattr(layer, field), getattr(expected, field)), (layer.name, field)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_qwen_shape(tmp_path):
    """24 blocks of Qwen2.5-0.5B's shape, random weights: memory holds a block and the head, not the whole model."""
    write_float(tmp_path / "float", QWEN2_5_0_5B)
    report, peak = quantize(
        tmp_path / "float", "--out", tmp_path / "out", "--calibration-windows", 4, "--windows", 1, "--method", "awq"
    )
    assert peak < 4e9
    assert report["bytes"]["float16"] == 988_065_536
    assert report["bytes"]["smaller"] > 55.08
    assert len(report["layers"]) == 168 and all(layer["fold"] for layer in report["layers"])
