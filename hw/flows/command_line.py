# SPDX-License-Identifier: Apache-2.0
"""Options that the generator's command lines share."""

import argparse
from dataclasses import fields

from hw.spec.config import AcceleratorConfig

CONFIG_HELP = {
    "tile": "rows and columns of the systolic array: 4, 8, 16 or 32",
    "weight_bits": "bits of a weight, 2 to 8",
    "activation_bits": "bits of an activation mantissa, 8 to 16",
    "zero_point": "integer, or fixed (11 fraction bits, for GGUF Q4_1 and other float zero points)",
    "ports": "weight ports: 1, 2 or 4",
    "port_width": "bits of a weight port: 32, 64 or 128",
    "max_tokens": "maximum number of tokens of one layer, up to 64",
    "max_k": "maximum number of in_features of one layer, up to 32,768",
    "max_group_size": "longest group that the accumulators hold: 32, 64, 128 or 256; the packer splits longer ones",
}


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """An option for every parameter of the config."""
    for item in fields(AcceleratorConfig):
        option = f"--{item.name.replace('_', '-')}"
        parser.add_argument(option, type=type(item.default), default=item.default, help=CONFIG_HELP[item.name])
