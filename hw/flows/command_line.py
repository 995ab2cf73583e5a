# SPDX-License-Identifier: Apache-2.0
"""The options of a config and the exit codes of errors, which the generator's command lines share."""

import argparse
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import fields

from hw.flows.errors import FlowError
from hw.spec.cli import INTERRUPTED
from hw.spec.config import DEFAULT_LANES_TEXT, RULES, AcceleratorConfig, ConfigError, option
from hw.spec.parts import DEFAULT_OPERATORS_TEXT, default_operators


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Adds an option for every parameter of the config."""
    # Defaults that depend on the other options.
    texts = {"operators": DEFAULT_OPERATORS_TEXT, "lanes": DEFAULT_LANES_TEXT}
    for item in fields(AcceleratorConfig):
        rule, default = RULES[item.name], item.default
        text = f"{rule.text}: {rule}"
        if item.name in texts:
            default, text = None, f"{text} (default: {texts[item.name]})"
        parser.add_argument(option(item.name), type=type(item.default), default=default, help=text)


def config_of(options: Namespace, target: str) -> AcceleratorConfig:
    """The config that the options of :func:`add_config_options` describe, for a target. Raises ConfigError."""
    given = {name: value for name in RULES if (value := getattr(options, name)) is not None}
    return AcceleratorConfig.from_options({"operators": default_operators(target), **given})


def exit_code(run: Callable[[], int]) -> int:
    """Calls ``run`` and returns its result; after an error returns its exit code and prints one line on stderr.

    Errors are those of the config and of the flows, and of the file system.
    """
    try:
        return run()
    except (ConfigError, FlowError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status if isinstance(error, FlowError) else 2
    except KeyboardInterrupt:
        return INTERRUPTED
