# SPDX-License-Identifier: Apache-2.0
"""A config in some lines, for people."""

from collections.abc import Iterable

from hw.spec.config import SCORE_UNIT, AcceleratorConfig
from hw.spec.memory.geometry import StreamLayout

Row = tuple[str, str]

_OPERATORS = {
    "decoder": "decoder: a vector unit after the array, and programs",
    "linear": "linear: the array without a vector unit",
}


def config_rows(config: AcceleratorConfig) -> list[Row]:
    """The array, the operators, the weight stream and the limits: titles and texts."""
    stream = StreamLayout(config)
    rows = [
        ("array", f"{config.tile} x {config.tile} PEs, {config.weight_bits}-bit weights, "
                  f"{config.activation_bits}-bit activations, {config.zero_point} zero points"),
        ("operators", f"{_OPERATORS[config.operators]}; results a cycle: {config.lanes}"),
        ("weight stream", f"{config.ports} x {config.port_width} bits = {config.beat_bytes} bytes a cycle, "
                          f"{100 * stream.overhead:.2f} % over ideal at K {stream.typical_layer.k}, "
                          f"group {stream.typical_layer.group_size}"),
        ("limits", f"M {config.max_tokens}, K {config.max_k:,}, groups of {config.max_group_size} (longer: split)"),
    ]  # fmt: skip
    if config.has_attention:
        rows.append(
            ("attention", f"{config.score_words:,} scores in each of two banks: M tokens at once see up to "
                          f"{config.score_words // config.max_tokens // SCORE_UNIT * SCORE_UNIT:,} positions")
        )  # fmt: skip
    if stream.array_factor > 1:
        rows.append(
            ("warning", f"a beat holds {stream.array_factor:g} slices and the array takes one per cycle: "
                        f"weights flow at 1/{stream.array_factor:g} beat a cycle")
        )  # fmt: skip
    return rows


def format_rows(rows: Iterable[Row]) -> str:
    """One line for each row, with the titles aligned."""
    return "\n".join(f"{name:>14}  {text}" for name, text in rows)
