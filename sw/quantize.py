# SPDX-License-Identifier: Apache-2.0
"""``python -m sw.quantize``: quantizes the weights of a float model by AWQ on a processor, without a GPU.

    python -m sw.quantize SRC --out DIR [--bits 4 --group-size 64] [--calibration FILE] [--perplexity FILE]

SRC is a Hugging Face folder with float weights or its name on the hub, a GGUF file (its quantized tensors are converted
to float), smollm2, or a float ONNX export of a decoder. AWQ (activation-aware weight quantization, Lin et al. 2023,
arXiv 2306.00978) searches scales and ranges that keep the outputs of the layers on a calibration text, and GPTQ
(Frantar et al. 2022, arXiv 2210.17323) compensates the errors of rounding; see sw.awq.search, sw.awq.clipping and
sw.awq.compensation.
The command writes into DIR: model.onnx with MatMulNBits layers, or an AutoAWQ GEMM folder; the source's text files; and
the report, quantize.json.
"""

import pydoc_data.topics
import shutil
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sw.awq.quantizer import FLOAT, METHODS, ROUNDINGS, Result, Texts, quantize
from sw.awq.rounding import ZERO_POINTS, Form
from sw.awq.sizes import Sizes, compare
from sw.awq.stream import Stream, stream
from sw.checkpoints.autoawq_writer import check_family, write_autoawq_folder
from sw.checkpoints.settings import read_settings
from sw.common.atomic import atomic_directory
from sw.common.command_line import Parser, check_positive
from sw.common.errors import UserError, run_cli
from sw.common.status_line import StatusLine
from sw.common.text_files import read_text
from sw.console.output import print_json
from sw.console.quantize_report import Report, print_table, write_json
from sw.export.floats import float_model
from sw.graph.file import OnnxFile
from sw.graph.rewrite import write_quantized
from sw.model.lm_head import HEAD_MODES
from sw.perplexity import LENGTH, WINDOWS
from sw.runtime import Decoder
from sw.runtime.score import Score, score
from sw.runtime.setup import decoder_limits
from sw.text.folder import TextFolder, encode, open_text
from sw.text.scoring import cut_windows

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128)
FORMATS = ("onnx", "autoawq")
AUTOAWQ_BITS = (3, 4)
CALIBRATION_WINDOWS = 64
BUILT_IN = "pydoc_data.topics"
"""The calibration text without --calibration: a file of every CPython, 700 kB of English about Python."""
HELD_OUT = 4
"""Without --perplexity, one in HELD_OUT windows of the calibration text is kept for evaluation."""
TEXT_FILES = (
    "tokenizer.json",
    "config.json",
    "generation_config.json",
    "genai_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""The files that sw.text.folder reads beside a model."""


@dataclass(frozen=True)
class _Sources:
    """The texts, and their names for the report. evaluation: None if part of the calibration text is held out."""

    calibration: str
    evaluation: str | None
    calibration_name: str
    evaluation_name: str


def _parser() -> Parser:
    parser = Parser(
        prog="python -m sw.quantize", description="Quantize a float decoder to 2-, 3-, 4- or 8-bit weights by AWQ."
    )
    parser.add_argument(
        "source",
        metavar="SRC",
        help="a folder with a float checkpoint, a GGUF file, org/name on the hub, smollm2, or a float ONNX export",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new or empty directory")
    parser.add_argument(
        "--method",
        default="awq,rtn",
        help="awq, rtn (round to nearest), or both: the first is written, the second compared (default: awq,rtn)",
    )
    parser.add_argument(
        "--rounding",
        choices=ROUNDINGS,
        default=ROUNDINGS[0],
        help=f"AWQ's weights: gptq compensates each error by later weights (default: {ROUNDINGS[0]})",
    )
    parser.add_argument("--bits", type=int, choices=BITS, default=4, help="(default: 4)")
    parser.add_argument("--group-size", type=int, choices=GROUP_SIZES, default=64, help="(default: 64)")
    parser.add_argument("--zero-point", choices=ZERO_POINTS, default=ZERO_POINTS[0], help="(default: integer)")
    parser.add_argument("--lm-head", choices=HEAD_MODES, default=HEAD_MODES[0], help="(default: int8)")
    parser.add_argument(
        "--format", choices=FORMATS, default=FORMATS[0], help="form of the written model (default: onnx)"
    )
    calibration = parser.add_argument_group("calibration")
    calibration.add_argument("--calibration", metavar="FILE", help=f"UTF-8; - is stdin (default: {BUILT_IN})")
    calibration.add_argument(
        "--calibration-windows",
        type=int,
        default=CALIBRATION_WINDOWS,
        metavar="N",
        help=f"number of windows of up to 512 tokens, spread over the text (default: {CALIBRATION_WINDOWS})",
    )
    evaluation = parser.add_argument_group("evaluation", "as in python -m sw.perplexity")
    evaluation.add_argument(
        "--perplexity",
        metavar="FILE",
        help="another text (default: a part of the calibration text, which calibration then does not use)",
    )
    evaluation.add_argument("--windows", type=int, default=WINDOWS, metavar="N", help=f"(default: {WINDOWS})")
    evaluation.add_argument("--length", type=int, metavar="L", help=f"tokens of a window (default: {LENGTH})")
    parser.add_argument("--json", action="store_true", help="the report on stdout as one JSON document")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    options = _parser().parse_args(arguments)
    start = time.monotonic()
    methods = _methods(options)
    form = Form(options.bits, options.group_size, options.zero_point)
    sources = _sources(options)
    with (
        atomic_directory(_free(options.out)) as final,
        tempfile.TemporaryDirectory(dir=final) as work,
        StatusLine() as status,
    ):
        scratch = Path(work)
        model = float_model(options.source, scratch / "float", _counter(status, "exporting layer {done} of {total}"))
        if options.format == "autoawq" and (config := model.with_name("config.json")).is_file():
            check_family(read_settings(config))
        folder = open_text(model)
        texts = _texts(options, folder, sources, model)
        result = quantize(
            OnnxFile(model),
            form,
            texts,
            scratch,
            method=methods[0],
            rounding=options.rounding,
            compare=[FLOAT, *methods[1:]],
            int8_head=options.lm_head == "int8",
            progress=_time_left(status),
        )
        path = _write_onnx(methods[0], form, model, folder, result, scratch / "onnx", status)
        scores = [*_compared(result, methods), _score(status, path, methods[0], texts)]
        made = path.parent
        if options.format == "autoawq":
            made = scratch / "autoawq"
            write_autoawq_folder(path, made, _writing(status))
        status.clear()
        sizes = compare(model, path if options.format == "onnx" else made)
        seconds = time.monotonic() - start
        streamed = stream(path, form)
        report = _report(options, methods[0], form, sources, texts, result, scores, sizes, streamed, seconds)
        for item in sorted(made.iterdir()):
            item.rename(final / item.name)
        write_json(report, final / "quantize.json")
    (print_json if options.json else print_table)(report)
    return 0


def _write_onnx(
    method: str, form: Form, model: Path, folder: TextFolder, result: Result, made: Path, status: StatusLine
) -> Path:
    """Writes the quantized graph and the text files into the directory `made`; returns the ONNX file."""
    metadata = {"quantizer": f"gristmill {method}, {form.bits} bits, groups of {form.group_size}"}
    path = write_quantized(model, made, result.layers, result.updates, metadata, _writing(status))
    for name in TEXT_FILES:
        if (folder.folder / name).is_file():
            shutil.copyfile(folder.folder / name, made / name)
    return path


def _report(
    options: Namespace,
    method: str,
    form: Form,
    sources: _Sources,
    texts: Texts,
    result: Result,
    scores: list[Score],
    sizes: Sizes,
    streamed: Stream | None,
    seconds: float,
) -> Report:
    return Report(
        source=options.source,
        out=str(options.out),
        form=form,
        method=method,
        rounding=options.rounding,
        lm_head=options.lm_head,
        format=options.format,
        calibration=sources.calibration_name,
        calibration_tokens=sum(map(len, texts.calibration)),
        evaluation=sources.evaluation_name,
        windows=[len(window) for window in texts.evaluation],
        scores=scores,
        sizes=sizes,
        stream=streamed,
        layers=result.reports,
        seconds=seconds,
    )


def _methods(options: Namespace) -> list[str]:
    """The values of --method. Raises UserError for options that contradict each other."""
    methods = options.method.split(",")
    for name in methods:
        if name not in METHODS:
            raise UserError(f"--method is {' or '.join(METHODS)}, or both with a comma, not {options.method}")
    if len(set(methods)) != len(methods):
        raise UserError(f"--method names {methods[0]} twice")
    check_positive(options.windows, "--windows")
    check_positive(options.calibration_windows, "--calibration-windows")
    if options.length is not None and options.length < 2:
        raise UserError(f"--length is 2 or more, not {options.length}: a window's first token is not predicted")
    if options.zero_point == "fixed" and options.bits == 8:
        raise UserError("--zero-point fixed is for --bits 2, 3 and 4: in the hardware such zero points are below 16")
    if options.format == "autoawq" and (options.bits not in AUTOAWQ_BITS or options.zero_point == "fixed"):
        chosen = "fixed ones" if options.zero_point == "fixed" else f"--bits {options.bits}"
        raise UserError(f"--format autoawq holds --bits 4 (3 too) and integer zero points, not {chosen}")
    return methods


def _free(out: Path) -> Path:
    """The directory to be written. Raises UserError if it is not empty, so that files of two models never mix."""
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} exists and is not empty")
    return out


def _sources(options: Namespace) -> _Sources:
    """The texts. Raises UserError if both are the same file."""
    calibration, evaluation = options.calibration, options.perplexity
    same = f"--perplexity {evaluation} is the calibration text: name another, or none"
    if calibration is not None and calibration == evaluation:
        raise UserError(same)
    text = "\n".join(pydoc_data.topics.topics.values()) if calibration is None else read_text(calibration)
    name = BUILT_IN if calibration is None else str(calibration)
    if not text.strip():
        raise UserError(f"{name} is empty: there is nothing to calibrate on")
    if evaluation is None:
        return _Sources(text, None, name, f"{name}, a part that calibration did not use")
    other = read_text(evaluation)
    if other == text:
        raise UserError(same)
    return _Sources(text, other, name, str(evaluation))


def _texts(options: Namespace, folder: TextFolder, sources: _Sources, model: Path) -> Texts:
    """Calibration and evaluation windows. Raises UserError for a text that is too short for one window."""
    ids, beginning = encode(folder.tokenizer, sources.calibration, False), folder.beginning()
    limits = decoder_limits(model, folder.context)
    context = limits.context - len(beginning)
    length = options.length or min(LENGTH, context)
    if length > context:
        raise UserError(f"--length is at most the model's own context ({context:,} tokens), not {length:,}")
    size = min(LENGTH, context)
    windows = [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]
    held = 0 if sources.evaluation is not None else min(options.windows, max(1, len(windows) // HELD_OUT))
    if len(windows) <= held:
        need = size if sources.evaluation is not None else 2 * size
        raise UserError(f"{sources.calibration_name} has {len(ids):,} tokens, and calibration needs {need:,} or more")
    if sources.evaluation is None:
        # The held-out windows are adjacent, so they can be cut again to another length without any calibration token.
        rest = [token for window in windows[-held:] for token in window]
        windows = windows[:-held]
    else:
        rest = encode(folder.tokenizer, sources.evaluation, False)
    for each in (ids, rest):
        limits.check([*beginning, *each])
    evaluation = cut_windows(rest, options.windows, length)
    if not evaluation:
        raise UserError(f"{sources.evaluation_name} has {len(rest)} tokens, and at least 2 are needed")
    count = min(options.calibration_windows, len(windows))
    spread = [windows[index * len(windows) // count] for index in range(count)]
    return Texts([[*beginning, *window] for window in spread], evaluation, beginning)


def _compared(result: Result, methods: Sequence[str]) -> list[Score]:
    """The scores that were computed during quantization."""
    return [
        Score(name, len(result.nll[name]), float(result.nll[name].sum())) for name in (FLOAT, *reversed(methods[1:]))
    ]


def _score(status: StatusLine, path: Path, method: str, texts: Texts) -> Score:
    """The score of the written model, in onnxruntime."""
    longest = max(map(len, texts.evaluation)) + len(texts.beginning)
    with Decoder(path, None, context=longest) as decoder:
        count = _counter(status, "scoring window {done} of {total}")
        return score(
            decoder, method, texts.beginning, texts.evaluation, lambda done, _: count(done, len(texts.evaluation))
        )


def _counter(status: StatusLine, form: str) -> Callable[[int, int], None]:
    return lambda done, total: status.count(form, done, total)


def _writing(status: StatusLine) -> Callable[[int, int], None]:
    return _counter(status, "writing layer {done} of {total}")


def _time_left(status: StatusLine) -> Callable[[float, str], None]:
    """Shows the part that is done, and the time that the rest takes at the same speed."""
    start = time.monotonic()

    def show(done: float, name: str) -> None:
        seconds = (time.monotonic() - start) * (1 - done) / done if done else 0.0
        left = f", {seconds / 60:.1f} min left" if done else ""
        status.count("calibrating: {done} of {total} %", int(100 * done), 100, f"{left}  {name}")

    return show


if __name__ == "__main__":
    run_cli(main)
