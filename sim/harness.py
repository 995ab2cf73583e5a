# SPDX-License-Identifier: Apache-2.0
"""Run one bench: generate its Verilog, build it for a simulator, run it, and read its results.

cocotb-test has the command lines and the environment that cocotb needs. This module adds three things: Verilog and
built simulators are cached by content, every tool's output goes to a log, and every run has a timeout.
"""

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import string
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hw.spec.config import AcceleratorConfig, option
from sim.benches import Bench
from sim.cache import BUILD, ROOT, cached, digest, generator_digest, locked
from sim.shared_objects import link_objects, runtime_objects

__all__ = ["SIMULATORS", "Result", "SetupError", "check_path", "manifest", "require", "run_bench", "settings", "stop"]

SIMULATORS = ("verilator", "icarus")

# With -Wall a warning ends the build. Only the ports are visible to cocotb: public signals inside would prevent most of
# Verilator's optimisations. The benches are short, so a fast compilation is better than a fast simulation.
VERILATOR_ARGS = ["-Wall", "--public-depth", "1"]
# The wheel's makefile lacks the option that includes a precompiled header, which only larger models have.
VERILATOR_MAKE_ARGS = ["-j2", "OPT_FAST=-O1", "OPT_SLOW=-O0", "OPT_GLOBAL=-O1", "CFG_CXXFLAGS_PCH_I=-include"]
TIMESCALE = "1ns/1ps"
PATH_CHARACTERS = frozenset(f"{string.ascii_letters}{string.digits}/._-+,=@%~!^{{}}[]*?")
"""Benches work in a path of these characters (tested). They fail with a space, with non-ASCII letters and with most of
the shell's special characters."""
WAIVERS = ROOT / "sim" / "waivers.vlt"

_running: set[subprocess.Popen[bytes]] = set()


class SetupError(Exception):
    """A problem of the machine or of the options, in one line; the command line exits with 2."""


@dataclass
class Result:
    """The results of one bench."""

    bench: Bench
    simulator: str
    seed: int
    passed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Failing tests and the first line of the reason."""
    seconds: float = 0.0
    log: Path = BUILD

    @property
    def ok(self) -> bool:
        """Whether tests ran and all of them passed."""
        return bool(self.passed) and not self.failed


def settings() -> dict[str, Any]:
    """Inside a bench: its ``params`` and ``settings`` in one dictionary."""
    return json.loads(os.environ.get("GRISTMILL_SETTINGS", "{}"))


def manifest() -> dict[str, Any]:
    """Inside a bench: the manifest of the hardware under test."""
    return json.loads(Path(os.environ["GRISTMILL_MANIFEST"]).read_text())


def check_path(folder: Path) -> None:
    """Check that Verilator can work in a folder: its makefiles do not support spaces and many other special characters.

    Raises
    ------
    SetupError : an unsupported character; the message names it
    """
    wrong = [part for part in str(folder) if part not in PATH_CHARACTERS]
    if wrong:
        name = "a space" if wrong[0] == " " else repr(wrong[0])
        raise SetupError(
            f"the path of this checkout has {name}, which Verilator's makefiles do not support: {str(folder)!r}; "
            "move it to a path of letters from a to z, digits, and . _ - /"
        )


def require(simulator: str) -> None:
    """Check that a simulator is installed, and put the virtual environment's tools on PATH."""
    if simulator not in SIMULATORS:
        raise SetupError(f"Simulator must be one of {', '.join(SIMULATORS)}, not {simulator!r}")
    if simulator == "verilator":
        check_path(ROOT)
    here = str(Path(sys.executable).parent)
    if here not in os.environ.get("PATH", os.defpath).split(os.pathsep):
        os.environ["PATH"] = here + os.pathsep + os.environ.get("PATH", os.defpath)
    if simulator == "icarus" and not (shutil.which("iverilog") and shutil.which("vvp")):
        raise SetupError("Simulator icarus needs iverilog on PATH; install Debian package iverilog")
    if simulator == "verilator" and not shutil.which("verilator"):
        raise SetupError("Simulator verilator needs verilator on PATH; run `make venv`")


def run_bench(bench: Bench, simulator: str, seed: int) -> Result:
    """Run one bench; every error is a failure in the result, with a log."""
    require(simulator)
    begin = time.monotonic()
    run_dir = BUILD / "runs" / f"{re.sub('[^A-Za-z0-9_=.,]+', '-', bench.name).strip('-')}.{simulator}"
    result = Result(bench, simulator, seed)
    with locked(run_dir):
        shutil.rmtree(run_dir, ignore_errors=True)
        run_dir.mkdir(parents=True)
        try:
            verilog, manifest_path = _generate(bench, run_dir / "generate.log", result)
            built = _build(bench, simulator, verilog, run_dir / "build.log", result)
            result.log = run_dir / "run.log"
            _simulate(bench, simulator, built, manifest_path, seed, run_dir, result)
        except _StepFailed as failure:
            result.failed[failure.step] = str(failure)
    result.seconds = time.monotonic() - begin
    return result


class _StepFailed(Exception):
    def __init__(self, step: str, message: str):
        super().__init__(message)
        self.step = step


def _generate(bench: Bench, log: Path, result: Result) -> tuple[Path, Path | None]:
    """Verilog and manifest of the bench's block, from the cache if neither hw/ nor the options have changed."""
    if bench.verilog is not None:
        return bench.verilog.resolve(), None
    params = {"operators": AcceleratorConfig.operators, **bench.params}
    options = [part for name, value in params.items() for part in (option(name), str(value))]
    key = digest(bench.top, options, generator_digest())
    out = BUILD / "verilog" / f"{bench.top}-{key}"

    def make(partial: Path) -> None:
        result.log = log
        command = [sys.executable, "-m", "hw.build", "--top", bench.top, *options, "--out", str(partial)]
        _execute(command, log, "hw.build", cwd=ROOT, timeout=300)

    cached(out, make)
    return out / "gristmill.v", out / "manifest.json"


def _build(bench: Bench, simulator: str, verilog: Path, log: Path, result: Result) -> Path:
    """Directory of the built simulator, from the cache if it was built before."""
    if simulator == "icarus":
        version: object = subprocess.run(["iverilog", "-V"], capture_output=True, text=True, check=False).stdout[:64]
        arguments: list[object] = [TIMESCALE]
    else:
        version = _verilator_versions()
        arguments = [TIMESCALE, _verilator_args(bench), VERILATOR_MAKE_ARGS, WAIVERS.read_bytes()]
    key = digest(simulator, version, importlib.metadata.version("cocotb"), sys.prefix, arguments, verilog.read_bytes())
    out = BUILD / "built" / f"{bench.top}-{simulator}-{key}"

    def make(partial: Path) -> None:
        result.log = log
        _simulator(bench, simulator, verilog, partial, log, f"{simulator} build", 900, compile_only=True).run()

    return cached(out, make)


def _simulate(
    bench: Bench, simulator: str, built: Path, manifest_path: Path | None, seed: int, run_dir: Path, result: Result
) -> None:
    results_xml = run_dir / "results.xml"
    env = {
        "COCOTB_RESULTS_FILE": str(results_xml),
        "COCOTB_ANSI_OUTPUT": "0",
        "GRISTMILL_SETTINGS": json.dumps({**bench.params, **bench.settings}),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    if manifest_path is not None:
        env["GRISTMILL_MANIFEST"] = str(manifest_path)
    if simulator == "verilator":
        env["COCOTB_TRUST_INERTIAL_WRITES"] = "1"  # its writes are right, and cocotb need not emulate them
    try:
        _simulator(
            bench,
            simulator,
            Path(),
            built,
            result.log,
            "simulation",
            bench.timeout,
            extra_env=env,
            seed=seed,
            work_dir=run_dir,
            plus_args=[] if bench.trace is None else ["--trace", "--trace-file", str(bench.trace)],
        ).run()
    except _StepFailed as failure:
        result.failed[failure.step] = str(failure)
    # The exit code does not depend on the tests' results.
    if results_xml.exists():
        for case in ET.parse(results_xml).iter("testcase"):
            name = case.get("name", "?")
            bad = [child for child in case if child.tag in ("failure", "error")]
            if bad:
                reason = (bad[0].get("message") or bad[0].text or bad[0].tag).strip()
                result.failed[name] = reason.splitlines()[0] if reason else bad[0].tag
            elif case.find("skipped") is None:
                result.passed.append(name)
    if not result.passed and not result.failed:
        result.failed["simulation"] = f"{bench.module} ran no test at all"


def _verilator_versions() -> tuple[str, str]:
    """The package, and where it is: its headers are part of every build."""
    return importlib.metadata.version("verilator"), sys.prefix


def _verilator_args(bench: Bench) -> list[str]:
    return VERILATOR_ARGS if bench.trace is None else [*VERILATOR_ARGS, "--trace"]


def _simulator(
    bench: Bench, simulator: str, verilog: Path, sim_dir: Path, log: Path, step: str, timeout: int, **options: Any
) -> Any:
    """A cocotb-test simulator that uses `_execute` for its commands, and either only builds or only runs."""
    from cocotb_test import simulator as cocotb_simulator

    base = {"verilator": cocotb_simulator.Verilator, "icarus": cocotb_simulator.Icarus}[simulator]

    class Simulator(base):
        def run(self) -> None:
            self.logger.setLevel("ERROR")  # its remarks about skipped compilations are for its own cache
            self.set_env()
            for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):  # of the make that started us; not for Verilator's
                self.env.pop(name, None)
            command = self.build_command()
            for part in command if self.compile_only else command[-1:]:
                part = [argument for argument in part if argument != "--public-flat-rw"]
                if part[0] == "make":
                    self._share_objects(part)
                self._step(part)

        def _step(self, command: list[str]) -> None:
            _execute(command, log, step, cwd=self.work_dir, timeout=timeout, env=self.env)

        def _share_objects(self, make: list[str]) -> None:
            key = digest(*_verilator_versions(), _verilator_args(bench), VERILATOR_MAKE_ARGS)
            objects = runtime_objects(key, sim_dir, lambda targets: self._step([*make, *targets]))
            link_objects(objects, sim_dir)

    return Simulator(
        toplevel=f"gristmill_{bench.top}" if bench.verilog is None else bench.top,
        module=bench.module,
        sim_build=str(sim_dir),
        verilog_sources=[str(WAIVERS), str(verilog)] if simulator == "verilator" else [str(verilog)],
        python_search=[str(ROOT)],
        timescale=TIMESCALE,
        **(
            dict(compile_args=_verilator_args(bench), make_args=VERILATOR_MAKE_ARGS) if simulator == "verilator" else {}
        ),
        **options,
    )


def _execute(
    command: list[str], log: Path, step: str, cwd: Path | str, timeout: int, env: Mapping[str, str] | None = None
) -> None:
    """Run a command with its output in `log`. After the timeout, ask a simulation what it waits for, and kill it."""
    with log.open("ab") as stream:
        stream.write(f"$ {' '.join(map(str, command))}\n".encode())
        stream.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=env,
            start_new_session=True,
        )
        _running.add(process)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            waiting = _ask_what_it_waits_for(process, log) if step == "simulation" else "the tool"
            raise _StepFailed(step, f"not done after {timeout} s; it waited for {waiting}") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            _running.discard(process)
    if code:
        raise _StepFailed(step, f"exit code {code}: {_complaint(log)}")


def stop() -> None:
    """Kill every running tool and simulation, for example because the user has interrupted the run."""
    for process in list(_running):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _ask_what_it_waits_for(process: subprocess.Popen[bytes], log: Path) -> str:
    process.send_signal(signal.SIGUSR1)  # sim.bench.streams answers it
    for _ in range(30):
        time.sleep(0.1)
        if named := re.findall(r"^WAITING FOR (.*)$", log.read_text(errors="replace"), re.MULTILINE):
            return "; ".join(named)
    return "nothing that it could name: the simulator itself does not respond"


def _complaint(log: Path) -> str:
    """The line of a log that most likely describes the error."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"%(Error|Warning)|\berror\b", line, re.IGNORECASE)]
    return (telling[0] if telling else lines[-1])[:300]
