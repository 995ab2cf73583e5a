# SPDX-License-Identifier: Apache-2.0
"""``AcceleratorConfig``: the parameters of one accelerator, validated once, and every width derived from them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

SCALE_BITS = 16
"""Bits of a scale mantissa ``sm``, signed."""
EXPONENT_BITS = 8
"""Bits of a row exponent ``E[n]`` and of a token exponent ``e[m]``, signed."""
FIXED_ZERO_POINT_BITS = 16
"""Bits of a zero point with ``zero_point="fixed"``, signed."""
FIXED_FRACTION_BITS = 11
"""Fraction bits ``f`` of a zero point with ``zero_point="fixed"``."""
FLOAT_BITS = 32
"""Bits of a result: IEEE 754 binary32."""
MAX_N = 1 << 18
"""Maximum number of output rows of one layer (Qwen2.5's vocabulary, 151,936 rows, fits)."""
MAX_K = 1 << 15
"""Maximum number of in_features K of one layer in any hardware."""
SCORE_UNIT = 64
"""A row of scores on chip has room for a multiple of this number of scores: whole groups of a cache of values."""
ATTENTION_K = 256
"""Activations of a layer of attention, at most: elements of a head, or positions of a chunk. Planes repeat them."""
MAX_SUM_BITS = 64
"""Widest accumulator: numpy's int64 is the definition of the numerics."""


OPERATORS = ("decoder", "linear")
"""Kinds of hardware: with the vector unit, and without."""


class ConfigError(ValueError):
    """A value outside the supported range, or not supported by this configuration. The message names rule and value."""


@dataclass(frozen=True)
class Choice:
    """A parameter that has one of a few values."""

    text: str
    values: tuple[int, ...] | tuple[str, ...]

    def check(self, name: str, value: object) -> None:
        """Raises ConfigError unless the value is one of them."""
        if type(value) is not type(self.values[0]) or value not in self.values:
            raise ConfigError(f"{name} is one of {', '.join(map(str, self.values))}, not {value!r}")

    def __str__(self) -> str:
        first, last = self.values[0], self.values[-1]
        if isinstance(first, int) and self.values == tuple(range(first, first + len(self.values))):
            return f"{first} to {last}"
        return f"{', '.join(map(str, self.values[:-1]))} or {last}"


@dataclass(frozen=True)
class Limit:
    """A parameter that is a whole number within bounds."""

    text: str
    low: int
    high: int

    def check(self, name: str, value: object) -> None:
        """Raises ConfigError unless the value is within the bounds."""
        if isinstance(value, bool) or not isinstance(value, int) or not self.low <= value <= self.high:
            raise ConfigError(f"{name} is a whole number from {self.low} to {self.high:,}, not {value!r}")

    def __str__(self) -> str:
        return f"{self.low} to {self.high:,}"


def _parameter(default: Any, rule: Choice | Limit) -> Any:
    return field(default=default, metadata={"rule": rule})


DEFAULT_OPERATORS = "decoder"
"""``operators`` of command lines; :func:`hw.spec.parts.default_operators` depends on the target, too."""


def default_lanes(tile: int, operators: str) -> int:
    """``lanes`` of hardware that is described without it: tile / 16, with the vector unit tile / 8, and at least 1.

    At tile 32 one result a cycle would take longer than the array in most layers. With the vector unit a layer also
    waits for the last results of the layer before.
    """
    return max(1, tile // (8 if operators == "decoder" else 16))


DEFAULT_LANES_TEXT = "tile / 8, with operators linear tile / 16, and at least 1"
"""The same as a text for the help of command lines."""


def signed_bits(bound: int) -> int:
    """Width of a two's complement number that holds every value from ``-bound`` to ``bound``."""
    return bound.bit_length() + 1


@dataclass(frozen=True)
class AcceleratorConfig:
    """Parameters of one accelerator. Frozen and hashable; everything else derives from these fields.

    Parameters
    ----------
    operators : ``"decoder"`` with the vector unit, ``"linear"`` without. Command lines have the default
        :data:`DEFAULT_OPERATORS`
    tile : rows (along K) and columns (along N) of the systolic array: 4, 8, 16 or 32
    weight_bits : bits of a quantized weight ``q``, 2 to 8
    activation_bits : bits of an activation mantissa ``X``, 8 to 16
    zero_point : ``"integer"`` (unsigned, ``weight_bits``) or ``"fixed"`` (signed 16 bits, 11 of them fraction)
    ports : weight ports, 1, 2 or 4
    port_width : bits of a port per cycle, 32, 64 or 128
    max_tokens : maximum number of tokens M of one layer, up to 64
    max_k : maximum number of in_features K of one layer with padding, up to 32,768; a multiple of ``tile``
    max_group_size : longest group that the accumulators hold; the packer splits longer ones, which is exact
    score_words : scores of attention that each of two banks on chip holds; 0: attention stays on the host
    lanes : results that leave the array per cycle: 1, 2, 4 or 8, at most ``tile``. Command lines, and
        :meth:`from_options`, have a default that depends on tile and operators: :func:`default_lanes`

    Raises
    ------
    ConfigError : a value outside its rule; the message names the rule and the value
    """

    operators: str = _parameter(
        "linear",
        Choice("the operations of the hardware: linear layers only, or also the operators between them", OPERATORS),
    )
    tile: int = _parameter(16, Choice("rows and columns of the systolic array", (4, 8, 16, 32)))
    weight_bits: int = _parameter(4, Choice("bits of a weight", tuple(range(2, 9))))
    activation_bits: int = _parameter(16, Choice("bits of an activation mantissa", tuple(range(8, 17))))
    zero_point: str = _parameter(
        "integer",
        Choice(
            "zero points, fixed with 11 fraction bits for GGUF Q4_K and other float zero points",
            ("integer", "fixed"),
        ),
    )
    ports: int = _parameter(4, Choice("weight ports", (1, 2, 4)))
    port_width: int = _parameter(128, Choice("bits of a weight port", (32, 64, 128)))
    max_tokens: int = _parameter(16, Limit("maximum number of tokens of one layer", 1, 64))
    max_k: int = _parameter(8192, Limit("maximum number of in_features of one layer", 32, MAX_K))
    max_group_size: int = _parameter(
        128, Choice("longest group that the accumulators hold; the packer splits longer ones", (32, 64, 128, 256))
    )
    lanes: int = _parameter(1, Choice("results that leave the array per cycle", (1, 2, 4, 8)))
    score_words: int = _parameter(
        0, Limit("scores of attention in each of two banks on chip, 0 for attention on the host", 0, 1 << 18)
    )

    def __post_init__(self) -> None:
        for name, rule in RULES.items():
            rule.check(name, getattr(self, name))
        if self.max_k % self.tile:
            raise ConfigError(f"max_k is a multiple of the tile ({self.tile}), not {self.max_k}")
        if self.lanes > self.tile:
            raise ConfigError(f"lanes is at most the tile ({self.tile}), not {self.lanes}")
        if self.score_words and not self.has_vector_unit:
            raise ConfigError(f"score_words is 0 without the vector unit (operators linear), not {self.score_words}")
        if self.score_words % SCORE_UNIT:
            raise ConfigError(f"score_words is a multiple of {SCORE_UNIT}, not {self.score_words}")
        if self.score_words and self.max_k < 2 * ATTENTION_K:
            # So the activations of two layers of attention, each with max_tokens tokens, fit on chip together.
            raise ConfigError(f"max_k is at least {2 * ATTENTION_K} with score_words, not {self.max_k}")
        if self.sum_bits > MAX_SUM_BITS:
            raise ConfigError(
                f"the sum over max_k={self.max_k} takes {self.sum_bits} bits, and the numerics are defined in"
                f" {MAX_SUM_BITS}: lower max_k, weight_bits or activation_bits"
            )

    @property
    def has_vector_unit(self) -> bool:
        """Whether the hardware has the operators between linear layers: the epilogues, and the opcode VECTOR."""
        return self.operators == "decoder"

    @property
    def has_attention(self) -> bool:
        """Whether the hardware has attention, and with it the opcodes APPEND, SCORES and VALUES."""
        return self.score_words > 0

    @property
    def reads_by_pieces(self) -> bool:
        """Whether layers of several tokens read their activations piece by piece, as the layer before writes them."""
        return self.has_attention and self.max_tokens > 1

    @property
    def vector_lanes(self) -> int:
        """Lanes of the vector unit: at least two, because some operations take pairs of columns."""
        return max(2, self.lanes)

    @property
    def has_programs(self) -> bool:
        """Whether the hardware fetches programs from memory. Hardware without it takes descriptors one by one."""
        return self.has_vector_unit

    # Formats

    @property
    def beat_bits(self) -> int:
        """Bits of one beat of the weight stream, over all ports."""
        return self.ports * self.port_width

    @property
    def beat_bytes(self) -> int:
        """Bytes of one beat of the weight stream, over all ports."""
        return self.beat_bits // 8

    @property
    def fraction_bits(self) -> int:
        """``f``: fraction bits of a zero point."""
        return FIXED_FRACTION_BITS if self.zero_point == "fixed" else 0

    @property
    def zero_point_bits(self) -> int:
        """Bits of one zero point."""
        return FIXED_ZERO_POINT_BITS if self.zero_point == "fixed" else self.weight_bits

    @property
    def zero_point_signed(self) -> bool:
        """Whether a zero point is two's complement."""
        return self.zero_point == "fixed"

    # Largest magnitudes, from which every width follows

    @property
    def activation_max(self) -> int:
        """Largest magnitude of an activation mantissa; the format is symmetric, so -2^(bits-1) never occurs."""
        return (1 << (self.activation_bits - 1)) - 1

    @property
    def weight_max(self) -> int:
        """Largest quantized weight."""
        return (1 << self.weight_bits) - 1

    @property
    def centred_max(self) -> int:
        """Largest magnitude of ``q * 2^f - z``."""
        if self.zero_point == "integer":
            return self.weight_max
        z_max = 1 << (FIXED_ZERO_POINT_BITS - 1)
        return (self.weight_max << self.fraction_bits) + z_max

    @property
    def scale_max(self) -> int:
        """Largest magnitude of a scale mantissa; symmetric, like the activations."""
        return (1 << (SCALE_BITS - 1)) - 1

    @property
    def psum_bits(self) -> int:
        """Signed width of a column's partial sum over one K-slice."""
        return signed_bits(self.tile * self.weight_max * self.activation_max)

    @property
    def group_bits(self) -> int:
        """Signed width of ``P``: the sum of ``q * X`` over a group."""
        return signed_bits(self.max_group_size * self.weight_max * self.activation_max)

    @property
    def activation_sum_bits(self) -> int:
        """Signed width of ``A``: the sum of ``X`` over a group."""
        return signed_bits(self.max_group_size * self.activation_max)

    @property
    def centred_bits(self) -> int:
        """Signed width of ``V = P * 2^f - z * A``."""
        return signed_bits(self.max_group_size * self.centred_max * self.activation_max)

    @property
    def sum_bits(self) -> int:
        """Signed width of ``Y``: the sum of ``sm * V`` over the groups."""
        return signed_bits(self.max_k * self.centred_max * self.activation_max * self.scale_max)

    @property
    def exponent_sum_bits(self) -> int:
        """Signed width of the power of two that scales ``Y``: ``E[n] - 15 + e[m] - f``."""
        return signed_bits((2 << (EXPONENT_BITS - 1)) + SCALE_BITS - 1 + self.fraction_bits)

    # Identity

    def to_dict(self) -> dict:
        """The parameters as a JSON-ready dictionary.

        Without attention ``score_words`` is absent: manifest and digest of such hardware are those that it had before
        this parameter existed.
        """
        return {name: value for name, value in asdict(self).items() if name != "score_words" or value}

    @classmethod
    def from_dict(cls, values: dict) -> "AcceleratorConfig":
        """Inverse of :meth:`to_dict`; unknown or missing names raise :class:`ConfigError`."""
        names, given = {field.name for field in fields(cls)}, {"score_words": 0, **values}
        if set(given) != names:
            raise ConfigError(f"a config has the fields {', '.join(sorted(names))}, not {', '.join(sorted(values))}")
        return cls(**given)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "AcceleratorConfig":
        """The config of a command line: parameters by name; those that are missing or None have their defaults.

        Unknown names raise :class:`ConfigError`.
        """
        given = {name: value for name, value in options.items() if value is not None}
        lanes = default_lanes(given.get("tile", cls.tile), given.get("operators", cls.operators))
        return cls.from_dict({**cls().to_dict(), "lanes": lanes, **given})

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the parameters, 64 hexadecimal digits. With it software refuses hardware of another config."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


RULES: dict[str, Choice | Limit] = {item.name: item.metadata["rule"] for item in fields(AcceleratorConfig)}
"""The rule and the description of each parameter."""


def option(name: str) -> str:
    """The option of all command lines that sets a parameter: ``--max-k`` for ``max_k``."""
    return f"--{name.replace('_', '-')}"


def choices(name: str) -> tuple:
    """The values of a parameter whose rule is a :class:`Choice`."""
    rule = RULES[name]
    assert isinstance(rule, Choice)
    return rule.values
