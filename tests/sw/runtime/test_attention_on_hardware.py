# SPDX-License-Identifier: Apache-2.0
"""Decoders with attention on the generated hardware: logits and caches are the reference device's, bit for bit."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

from hw.spec.config import SCORE_UNIT
from hw.spec.control.registers import ERROR_TEXTS, ErrorCode
from sw.devices.base import Device, DeviceError
from sw.devices.kv260 import KV260Device
from sw.devices.library import build_library
from sw.devices.reference import ReferenceDevice
from sw.devices.rtl import RtlDevice
from sw.graph.file import OnnxFile
from sw.runtime import ProgramDecoder
from tests.sw.fixtures.fake_board import FakeBoard
from tests.sw.fixtures.linears import same_bits
from tests.sw.fixtures.random_decoder import write_random
from tests.sw.runtime.test_programs import hardware

pytestmark = [pytest.mark.simulator, pytest.mark.full]

CONFIG = hardware(score_words=16 * SCORE_UNIT)
CONTEXT = 160
GRAPHS = {"plain": {"head_size": 64}, "padded": {"head_size": 80}, "normed": {"head_size": 32, "head_norms": "qk"}}
CALLS = (
    (8, "every"),
    (1, "every"),
    (5, "last"),
    *[(8, "prefill")] * 6,
    (1, "best"),
    (1, "best"),
    (8, "every"),
    (1, "best"),
)
"""Tokens and output. Fewer rows of scores fit a bank after 64 and after 128 positions."""


@contextmanager
def open_hardware(name: str, folder: Path) -> Iterator[Device]:
    if name == "rtl":
        with RtlDevice(CONFIG, memory="hostile", files=build_library(CONFIG)) as device:
            yield device
        return
    with closing(FakeBoard(folder, CONFIG, "kv260-2400")) as board, KV260Device(host=board) as device:
        yield device


def call(decoder: ProgramDecoder, ids: list[int], output: str) -> np.ndarray:
    if output == "prefill":
        decoder.prefill(ids)
    elif output == "best":
        return np.array([decoder.greedy(ids)], np.float32)
    else:
        return decoder.forward(ids, every=output == "every")
    return np.zeros(0, np.float32)


@pytest.mark.parametrize("name", ["rtl", "kv260"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_equals_the_reference(name, graph, tmp_path):
    """Tokens and blocks of a prompt at many positions, whose programs are moved; a cache is saved and restored."""
    path = write_random(tmp_path, context=CONTEXT, **GRAPHS[graph])
    (tmp_path / "board").mkdir()
    with open_hardware(name, tmp_path / "board") as device, ReferenceDevice(CONFIG) as reference:
        decoders = [
            ProgramDecoder(OnnxFile(path), where, context=CONTEXT, tell=pytest.fail) for where in (device, reference)
        ]
        print("seed", seed := 11)
        ids = np.random.default_rng(seed).integers(0, 256, CONTEXT).tolist()
        for tokens, output in CALLS:
            start = decoders[0].length
            found, expected = (call(decoder, ids[start : start + tokens], output) for decoder in decoders)
            assert same_bits(found, expected), (start, output)
        saved, others = (decoder.cache_arrays() for decoder in decoders)
        # The exponents of positions that were never written may be anything.
        assert all(np.array_equal(saved[name], others[name]) for name in saved if not name.endswith("exponents"))
        length = decoders[0].length
        decoders[0].reset()
        decoders[0].prefill(ids[100:108])
        decoders[0].restore(saved, length)
        found, expected = (call(decoder, ids[:1], "last") for decoder in decoders)
        assert same_bits(found, expected)
        assert decoders[0].usage.beats > decoders[1].usage.beats


def test_the_guard(tmp_path):
    """The hardware refuses an append outside of the registers' range, and names its layer."""
    path = write_random(tmp_path, head_size=64, context=CONTEXT)
    with open_hardware("rtl", tmp_path) as device:
        decoder = ProgramDecoder(OnnxFile(path), device, context=CONTEXT, tell=pytest.fail)
        expected = decoder.forward([1, 2, 3])
        decoder.reset()
        assert isinstance(device, RtlDevice)
        device.registers.write("cache_end", device.registers.read("cache_first") + 1)
        text = ERROR_TEXTS[ErrorCode.CACHE]
        with pytest.raises(DeviceError, match=rf"^layer layers\.0\.self_attn\.(keys|values)\.\d: {text} at address"):
            decoder.forward([1, 2, 3])
        device.allow_appends(None)
        assert same_bits(decoder.forward([1, 2, 3]), expected)
