# SPDX-License-Identifier: Apache-2.0
"""The manifest: the one file that describes generated hardware to software."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from hw.spec.config import AcceleratorConfig, ConfigError
from hw.spec.memory.geometry import StreamLayout

VERSION = 1
"""Version of the manifest's own format."""


class ManifestError(ValueError):
    """A manifest that cannot be read, or that describes something else. The message names the file."""


@dataclass(frozen=True)
class Field:
    """The place of one field in a port's payload."""

    offset: int
    width: int
    signed: bool
    elements: int = 1
    """Number of equal parts side by side, element 0 lowest; ``width`` is the width of all of them together."""


@dataclass(frozen=True)
class Port:
    """One port of the top module, or the payload of one of its streams."""

    direction: str
    """``"in"`` or ``"out"``, seen from the hardware."""
    width: int
    fields: dict[str, Field] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """The description of a generated block.

    Attributes
    ----------
    block : ``"core"``, or the name of a smaller block
    config : the parameters
    ports : every port that is not part of a stream
    streams : every ready/valid stream by its prefix; ports ``{prefix}_payload``, ``{prefix}_valid``, ``{prefix}_ready``
    properties : latencies in cycles and other figures of the block
    verilog_sha256 : SHA-256 of the Verilog beside the manifest
    """

    block: str
    config: AcceleratorConfig
    ports: dict[str, Port]
    streams: dict[str, Port]
    properties: dict[str, int]
    verilog_sha256: str

    @property
    def top(self) -> str:
        """Name of the Verilog module."""
        return f"gristmill_{self.block}"

    def to_json(self) -> str:
        """The file's text; the same manifest always gives the same bytes."""
        config, stream = self.config, StreamLayout(self.config)

        def ports(items: dict[str, Port]) -> dict:
            return {
                name: {
                    "direction": port.direction,
                    "width": port.width,
                    "fields": {
                        key: [item.offset, item.width, item.signed, item.elements] for key, item in port.fields.items()
                    },
                }
                for name, port in items.items()
            }

        return (
            json.dumps(
                {
                    "gristmill": VERSION,
                    "block": self.block,
                    "top": self.top,
                    "config": config.to_dict(),
                    "config_digest": config.digest,
                    "verilog_sha256": self.verilog_sha256,
                    "widths": {
                        "psum": config.psum_bits,
                        "group": config.group_bits,
                        "activation_sum": config.activation_sum_bits,
                        "centred": config.centred_bits,
                        "sum": config.sum_bits,
                    },
                    "weight_stream": {
                        "beat_bytes": config.beat_bytes,
                        "beats_per_word": stream.beats_per_word,
                        "words_per_slice": stream.words_per_slice,
                        "slices_per_word": stream.slices_per_word,
                        "overhead": round(stream.overhead, 6),
                        "slices_per_beat": round(stream.array_factor, 6),
                    },
                    "properties": self.properties,
                    "ports": ports(self.ports),
                    "streams": ports(self.streams),
                },
                indent=2,
            )
            + "\n"
        )

    @classmethod
    def load(cls, path: Path) -> "Manifest":
        """Read and check a manifest.

        Raises
        ------
        ManifestError : missing, damaged, of another format version, or of a config that its digest contradicts
        """
        try:
            values = json.loads(Path(path).read_text())
            if values.get("gristmill") != VERSION:
                raise ManifestError(f"{path}: manifest version {VERSION} is needed, not {values.get('gristmill')}")
            config = AcceleratorConfig.from_dict(values["config"])
            if values["config_digest"] != config.digest:
                raise ManifestError(f"{path}: the config does not match its digest")

            def ports(items: dict) -> dict[str, Port]:
                return {
                    name: Port(
                        item["direction"], item["width"], {key: Field(*part) for key, part in item["fields"].items()}
                    )
                    for name, item in items.items()
                }

            return cls(
                block=values["block"],
                config=config,
                ports=ports(values["ports"]),
                streams=ports(values["streams"]),
                properties=values["properties"],
                verilog_sha256=values["verilog_sha256"],
            )
        except FileNotFoundError as error:
            raise ManifestError(f"{path}: no manifest there; python -m hw.build writes one") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ManifestError):
                raise
            what = str(error) if isinstance(error, ConfigError) else type(error).__name__
            raise ManifestError(f"{path}: not a manifest ({what})") from error
