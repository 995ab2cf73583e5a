# SPDX-License-Identifier: Apache-2.0
"""The latencies of the performance model equal those in the hardware's manifests."""

import gc
from dataclasses import replace

import pytest

from hw.flows.blocks import BLOCKS, describe_properties
from hw.spec.config import AcceleratorConfig
from hw.spec.latencies import ATTENTION, Latencies
from hw.spec.presets import PRESETS, preset


def compare(config: AcceleratorConfig) -> None:
    figures = Latencies(config).figures()
    assert len(figures) == 19 + config.has_attention * len(ATTENTION)
    for block, figure, cycles in figures:
        assert (block, figure, describe_properties(BLOCKS[block](config))[figure]) == (block, figure, cycles)
    # Objects that were not elaborated are collected here, where their warning is ignored, and not in another test.
    gc.collect()


@pytest.mark.filterwarnings("ignore::amaranth.UnusedElaboratable")
@pytest.mark.parametrize("name", PRESETS)
def test_latencies_are_those_of_the_manifests(name: str):
    # With the vector unit, which has blocks and latencies of its own and changes none of the others.
    compare(replace(preset(name), operators="decoder"))


@pytest.mark.filterwarnings("ignore::amaranth.UnusedElaboratable")
@pytest.mark.parametrize("sizes", [{"lanes": 2}, {"tile": 32, "lanes": 4}], ids=str)
def test_latencies_with_attention(sizes: dict[str, int]):
    compare(replace(preset("tile16"), operators="decoder", score_words=4096, **sizes))


def test_latencies_depend_on_the_config():
    small, large = Latencies(AcceleratorConfig(tile=4)), Latencies(AcceleratorConfig(tile=32))
    assert small.core < large.core and small.activation_unit < large.activation_unit
