# SPDX-License-Identifier: Apache-2.0
"""The tables of README and docs, made from the figures."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hw.spec.parts import BOARDS
from sw.pages.store import Sections

_MEMORY_NAMES = {
    "ideal": "ideal",
    "kv260-2400": "KV260 model, 2400 MT/s",
    "kv260-2133": "KV260 model, 2133 MT/s",
}
_BLOCK_TABLES = ("resources_tile_16_decoder", *(f"resources_tile_{tile}" for tile in (4, 8, 16, 32)))
_DESIGN = ("tile", "operators", "zero points")
_METHODS = {"float": "float", "rtn": "round to nearest", "awq": "AWQ and GPTQ"}


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], right: bool = False) -> str:
    """A table in Markdown. right: align all columns but the first to the right."""
    rule = "|---|" + ("---:|" if right else "---|") * (len(head) - 1)
    return "\n".join(["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)])


def designs(sections: Sections, kind: str) -> dict[str, tuple[str, str, str]]:
    """Sections of designs on the KV260, those with the vector unit first: tile, operators and kind of zero points.

    kind: what was measured, "levels" or "resources".
    """
    operators = {"_attention": "decoder, attention", "_decoder": "decoder", None: "linear"}
    pattern = re.compile(rf"{kind}_tile_(\d+)(_attention|_decoder)?(_fixed)?")
    found = {name: match for name in sections if (match := pattern.fullmatch(name))}
    places = {suffix: place for place, suffix in enumerate(operators)}
    order = sorted(found, key=lambda name: (places[found[name][2]], bool(found[name][3]), int(found[name][1])))
    return {
        name: (found[name][1], operators[found[name][2]], "fixed" if found[name][3] else "integer") for name in order
    }


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def tokens(sections: Sections) -> str:
    """One token of Qwen2.5-0.5B by memory."""
    head = (
        *("memory", "cycles", "useful bytes", "share of the ports' bandwidth", "share of the memory's bandwidth"),
        *("tokens/s of these layers at 250 MHz", "cycles starved for weights, activations, output"),
    )
    rows = [
        (
            _MEMORY_NAMES[row["memory"]],
            f"{row['cycles']:,}",
            f"{row['useful_bytes']:,}",
            _percent(row["port_fraction"]),
            _percent(row["memory_fraction"]),
            f"{row['tokens_per_second']:.1f}",
            ", ".join(f"{row[f'starved_{cause}']:,}" for cause in ("weights", "activations", "output")),
        )
        for row in sections["tokens"]["figures"]
    ]
    return markdown_table(head, rows)


def layers(sections: Sections) -> str:
    """Single layers in ideal memory."""
    head = (
        *("layer", "tile", "M", "K", "N", "weight beats", "activation beats", "bound", "cycles", "cycles / bound"),
        *("in a row / bound", "sharing / weight beats"),
    )

    def ratio(value: float | None, bound: float) -> str:
        return "" if value is None else f"{value / bound:.4f}"

    rows = []
    for row in sections["layers"]["figures"]:
        if row["memory"] == "ideal":
            compute = row["m"] * row["k"] // row["tile"] * -(-row["n"] // row["tile"])
            keys = ("tile", "m", "k", "n", "beats", "activation_beats", "bound", "cycles")
            rows.append(
                (
                    row["name"],
                    *(f"{row[key]:,}" for key in keys),
                    ratio(row["cycles"], row["bound"]),
                    ratio(row["cycles_in_a_row"], row["bound"]),
                    ratio(row["cycles_sharing"], max(row["beats"], compute)),
                )
            )
    return markdown_table(head, rows)


def attention(sections: Sections) -> str:
    """Whole tokens and prompts with attention on the device."""
    head = (
        *("", "tile", "key bits", "cycles", "linear layers", "attention", "waiting"),
        *("predicted / cycles", "tokens/s at 250 MHz", "limit of the beats"),
    )
    rows = [
        (
            f"{row['name']} {row['length']:,}",
            *(f"{row[key]:,}" for key in ("tile", "key_bits", "cycles")),
            *(_percent(row[part] / row["cycles"]) for part in ("linear", "attention", "waiting")),
            f"{row['predicted'] / row['cycles']:.4f}",
            *(f"{row[key]:.1f}" for key in ("tokens_per_second", "limit")),
        )
        for row in sections["attention"]["figures"]
    ]
    return markdown_table(head, rows, right=True)


def gemm(sections: Sections) -> str:
    """The matrix multiplication of arXiv 2503.16731."""
    head = ("tile", "memory", "cycles", "GFLOPS at 100 MHz", "of the array's peak")
    rows = [
        (
            str(row["tile"]),
            _MEMORY_NAMES[row["memory"]],
            f"{row['cycles']:,}",
            f"{row['gflops']:.1f}",
            _percent(row["m"] * row["k"] * row["n"] / row["tile"] ** 2 / row["cycles"]),
        )
        for row in sections["gemm"]["figures"]
    ]
    return markdown_table(head, rows)


def demo(sections: Sections) -> str:
    """The end of what `make demo` prints."""
    figures: dict[str, Any] = sections["demo"]["figures"]
    prefill, decode, roof = figures["prefill"], figures["decode"], figures["roofline"]
    rate = f"tokens/s of the linear layers at {roof['hz'] / 1e6:.0f} MHz"
    rows = [
        ("", "prompt", "decoding"),
        ("tokens", f"{prefill['tokens']:,}", f"{decode['tokens']:,}"),
        ("cycles per token", *(f"{phase['per_token']['cycles']:,.0f}" for phase in (prefill, decode))),
        (rate, *(f"{phase['tokens_per_second']:,.1f}" for phase in (prefill, decode))),
        ("tokens/s if all ports carried weights in every cycle", "", f"{roof['tokens_per_second']:,.1f}"),
        ("  reached share of this rate", "", f"{100 * roof['reached']:.1f} %"),
        ("simulation, s per token", *(f"{phase['per_token']['device']:,.2f}" for phase in (prefill, decode))),
    ]
    lines = [f" {title:52}{first:>10}{second:>12}" for title, first, second in rows]
    lines.insert(1, " " + 74 * "─")
    speed = (prefill["cycles"] + decode["cycles"]) / (prefill["device"] + decode["device"]) / 1e6
    tail = (
        f"the model ended its answer; {len(figures['prompt_ids']):,} prompt tokens, {len(figures['ids']):,} new ones,"
        f" {figures['seconds']:.0f} s"
    )
    memory = f"cycles are simulated, memory {figures['memory']}; {speed:.2f} million a second"
    return "\n".join(["```", figures["text"], "", *(line.rstrip() for line in lines), "", tail, memory, "```"])


def resources(sections: Sections) -> str:
    """The accelerator's totals in every design, with percentages of the KV260's part."""
    limits, rows, kinds = BOARDS["kv260"].resources, [], ()
    for section, names in designs(sections, "resources").items():
        total: dict[str, float] = sections[section]["figures"]["total"]
        shares = (f" ({100 * value / limits[kind]:.1f} %)" if kind in limits else "" for kind, value in total.items())
        rows.append((*names, *(_count(value) + share for value, share in zip(total.values(), shares, strict=True))))
        kinds = tuple(total)
    return markdown_table((*_DESIGN, *kinds), rows, right=True)


def _count(value: float) -> str:
    return f"{value:,.10g}"


def _blocks(section: str) -> Callable[[Sections], str]:
    def table(sections: Sections) -> str:
        figures = sections[section]["figures"]
        blocks = sorted(figures["blocks"].items(), key=lambda item: (-item[1]["LUT"], item[0]))
        rows = [(name, *(_count(value) if value else "" for value in counts.values())) for name, counts in blocks]
        return markdown_table(("block", *figures["total"]), rows, right=True)

    table.__doc__ = f"The accelerator's blocks in the design of {section}."
    return table


def ulx3s(sections: Sections) -> str:
    """The self-test on the ULX3S, at both tiles."""
    both = [sections[f"ulx3s_tile_{tile}"]["figures"] for tile in (4, 8)]
    simulated = [sections["ulx3s_simulated"]["figures"][f"tile_{tile}"] for tile in (4, 8)]
    names = {"lut4": "LUT4", "ff": "FF", "lutram": "LUTRAM", "bram18": "BRAM18", "mult18": "MULT18"}
    rows = [
        ("frequency reached", *(f"{each['timing']['achieved_mhz']:.2f} MHz" for each in both)),
        ("slowest path", *(sections["ulx3s_paths"]["figures"][f"tile_{tile}"] for tile in (4, 8))),
    ]
    for key, name in names.items():
        cells = [each["utilisation"][key] for each in both]
        rows.append((f"{name} ({cells[0]['available']:,})", *(f"{cell['used']:,}" for cell in cells)))
    results = (f"{each['results']}, {each['cycles']}" for each in simulated)
    rows.append(("simulated (`make sim`): results, cycles", *results))
    return markdown_table(("", "tile 4", "tile 8"), rows)


def quantize(sections: Sections) -> str:
    """Perplexities of SmolLM2 before and after quantization."""
    perplexity: dict[str, float] = sections["quantize"]["figures"]["perplexity"]
    first = perplexity["float"]
    rows = [
        (_METHODS[name], f"{value:.4f}", f"{100 * (value / first - 1):+.2f} %" if value != first else "")
        for name, value in sorted(perplexity.items(), key=lambda item: list(_METHODS).index(item[0]))
    ]
    return markdown_table(("", "perplexity", "against float"), rows)


WIDTHS: tuple[str, ...] = ("quantize", "quantize_4", "quantize_3", "quantize_2")
"""Sections of the same model in several widths."""


def quantize_bits(sections: Sections) -> str:
    """What each width costs, in perplexity and in bytes."""
    head = (
        *("bits", "groups of", "round to nearest", "AWQ and GPTQ", "against float"),
        *("file, MB", "times smaller than float16"),
        *("stream without the head, MB", "the same, hardware of this width", "times smaller than float16"),
    )
    rows = []
    for name in filter(sections.__contains__, WIDTHS):
        figures = sections[name]["figures"]
        perplexity, size, stream = figures["perplexity"], figures["bytes"], figures["stream"]
        rows.append(
            (
                str(figures["bits"]),
                str(figures["group_size"]),
                *(f"{perplexity[name]:,.2f}" for name in ("rtn", "awq")),
                f"{100 * (perplexity['awq'] / perplexity['float'] - 1):+.1f} %",
                f"{size['quantized'] / 1e6:.2f}",
                f"{size['float16'] / size['quantized']:.2f}",
                *(f"{stream[name] / 1e6:.2f}" for name in ("layers", "narrow")),
                f"{stream['float16'] / stream['narrow']:.2f}",
            )
        )
    return markdown_table(head, rows, right=True)


def adapter(sections: Sections) -> str:
    """Cycles of a LoRA adapter relative to those of the model."""
    rows = [
        (
            str(row["rank"]),
            *(
                f"{row[f'{which}_{tokens}']:,} ({100 * row[f'{which}_{tokens}'] / row[f'model_{tokens}']:.1f} %)"
                for tokens in (1, 16)
                for which in ("all", "q_v")
            ),
        )
        for row in sections["adapter"]["figures"]
    ]
    head = ("rank", "1 token, all layers", "1 token, q and v", "16 tokens, all layers", "16 tokens, q and v")
    return markdown_table(head, rows, right=True)


def quantize_trials(sections: Sections) -> str:
    """The effect of each part of the method."""
    rows = [(row["part"], f"{row['perplexity']:.2f}") for row in sections["quantize_trials"]["figures"]]
    return markdown_table(("part of the method, alone or added", "perplexity"), rows)


def levels(sections: Sections) -> str:
    """Logic depth of the accelerator: the deepest path, and how many bits end a path of which depth."""
    measured = designs(sections, "levels")
    found = {name: sections[name]["figures"] for name in measured}
    steps = sorted({int(step) for figures in found.values() for step in figures["histogram"]})
    head = (*_DESIGN, "levels", *(f"up to {step}" if step else "none" for step in steps))
    rows = (
        (*names, f"{found[section]['levels']:.2f}", *(f"{found[section]['histogram'].get(str(s), 0):,}" for s in steps))
        for section, names in measured.items()
    )
    return markdown_table(head, rows, right=True)


TABLES: dict[str, Callable[[Sections], str]] = {
    "adapter": adapter,
    "attention": attention,
    "demo": demo,
    "gemm": gemm,
    "layers": layers,
    "levels": levels,
    "quantize": quantize,
    "quantize_bits": quantize_bits,
    "quantize_trials": quantize_trials,
    "resources": resources,
    **{section: _blocks(section) for section in _BLOCK_TABLES},
    "tokens": tokens,
    "ulx3s": ulx3s,
}
"""Every table by the name that markers use."""
