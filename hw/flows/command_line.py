# SPDX-License-Identifier: Apache-2.0
"""Options that the generator's command lines share."""

import argparse
from dataclasses import fields

from hw.spec.config import RULES, AcceleratorConfig


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """An option for every parameter of the config."""
    for item in fields(AcceleratorConfig):
        option = f"--{item.name.replace('_', '-')}"
        rule = RULES[item.name]
        parser.add_argument(option, type=type(item.default), default=item.default, help=f"{rule.text}: {rule}")
