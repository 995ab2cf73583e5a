# SPDX-License-Identifier: Apache-2.0
"""Closed pipes, full disks and odd paths: at most one line of output, and a correct exit status."""

import ast
import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from hw.flows import lower
from hw.flows.blocks import BLOCKS
from hw.spec.cli import UserError
from hw.spec.config import AcceleratorConfig
from sim import run as sim_run
from sim.harness import SetupError
from sw.common.atomic import atomic_directory
from sw.export.resolve import cache_directory

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
MODEL = "tests/sw/fixtures/data/genai_qwen2_symmetric.onnx"
LIMIT = 1 << 12
"""Limit of a file's size in bytes, by which a test simulates a full disk."""
ODD = "a 'b\"c;$d"
FULL_DISK = "error: cannot write to standard output: No space left on device\n"


def commands() -> list[str]:
    """Every module that runs as a program."""
    found = []
    for package in ("hw", "sim", "sw"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if '\nif __name__ == "__main__":' in path.read_text():
                parts = path.relative_to(ROOT).with_suffix("").parts
                found.append(".".join(part for part in parts if part != "__main__"))
    return found


@pytest.fixture
def ends(tmp_path):
    """Outputs by name: a pipe without a reader, a full disk, no file."""
    reader, closed = os.pipe()
    os.close(reader)
    full = os.open("/dev/full", os.O_WRONLY)
    yield {"closed": closed, "full": full}
    os.close(closed)
    os.close(full)


def python(*arguments: str, unbuffered: bool = False, **options) -> subprocess.CompletedProcess[str]:
    """Runs Python in the project's root, and captures the streams that are not redirected."""
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment |= {"PYTHONUNBUFFERED": "1"} if unbuffered else {}
    environment |= options.pop("env", {})
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    words = [sys.executable, *arguments]
    done = subprocess.run(
        words, cwd=ROOT, env=environment, text=True, errors="replace", timeout=300, check=False, **streams
    )
    for text in (done.stdout, done.stderr):
        assert "Traceback" not in (text or "") and "Exception ignored" not in (text or ""), text
    return done


def program(body: str) -> tuple[str, str]:
    """A command line whose main has this body."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    return "-c", f"import os, sys\nfrom hw.spec.cli import UserError, run_cli\ndef main():\n{lines}run_cli(main)"


# Every command


def test_every_command_is_run_by_run_cli():
    found = commands()
    assert {"hw.build", "sim.run", "sim.device", "sw.generate", "sw.doctor"} <= set(found)
    for name in found:
        path = ROOT.joinpath(*name.split("."))
        text = (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
        block = ast.parse(text).body[-1]
        assert isinstance(block, ast.If)
        assert ast.unparse(block.body[0]).startswith("run_cli("), name


@pytest.mark.parametrize("command", [name for name in commands() if name != "sim.device"])
def test_help(command, ends):
    """The rules apply to argparse's output too."""
    closed = python("-m", command, "--help", stdout=ends["closed"])
    assert (closed.returncode, closed.stderr) == (0, "")
    full = python("-m", command, "--help", stdout=ends["full"])
    assert (full.returncode, full.stderr) == (2, FULL_DISK)


@pytest.mark.parametrize("command", commands())
def test_error(command, ends):
    """A wrong option with a closed or full stderr prints nothing on stdout, and the status stays the same."""
    for end in ends.values():
        done = python("-m", command, "--no-such-option", stderr=end)
        assert (done.returncode, done.stdout) == (2, "")


WORK = {
    "hw.build": "-m hw.build --tile 4 --top fork --out OUT",
    "sim.run": "-m sim.run --list",
    "sw.layers": f"-m sw.layers {MODEL} --device reference --limit 1",
    "sw.layers, JSON": f"-m sw.layers {MODEL} --device reference --limit 1 --json",
}


@pytest.mark.parametrize("words", WORK.values(), ids=WORK.keys())
def test_work(words, ends, tmp_path):
    """Commands that do their work, with each stream in turn closed or full."""
    words = words.replace("OUT", str(tmp_path / "out")).split()
    plain = python(*words)
    assert plain.returncode == 0 and plain.stdout
    assert "error" not in plain.stderr
    for unbuffered in (False, True):
        closed = python(*words, stdout=ends["closed"], unbuffered=unbuffered)
        assert (closed.returncode, closed.stderr) == (0, plain.stderr)
        full = python(*words, stdout=ends["full"], unbuffered=unbuffered)
        assert (full.returncode, full.stderr) == (2, plain.stderr + FULL_DISK)
    for end in ends.values():
        done = python(*words, stderr=end)
        assert done.returncode == 0 and len(done.stdout.splitlines()) == len(plain.stdout.splitlines())
    nothing = python("-c", f"import os, sys\nos.closerange(0, 3)\nos.execv(sys.executable, {[sys.executable, *words]})")
    assert (nothing.returncode, nothing.stdout, nothing.stderr) == (0, "", "")


# run_cli


@pytest.mark.parametrize("unbuffered", [False, True])
def test_long_output(ends, unbuffered):
    """With an output larger than any buffer the command ends, and its context managers exit."""
    loop = "try:\n    while True: print('x' * 1000)\nfinally:\n    print('left', file=sys.stderr)"
    closed = python(*program(loop), stdout=ends["closed"], unbuffered=unbuffered)
    assert (closed.returncode, closed.stderr) == (0, "left\n")
    full = python(*program(loop), stdout=ends["full"], unbuffered=unbuffered)
    assert (full.returncode, full.stderr) == (2, f"left\n{FULL_DISK}")


def test_own_status(ends):
    """The command's own status stays the same if a closed pipe loses only its output."""
    assert python(*program("print('bad')\nreturn 1"), stdout=ends["closed"]).returncode == 1
    assert python(*program("print('bad')\nreturn 1"), stdout=ends["full"]).returncode == 2
    wrong = python(*program("print('text')\nraise UserError('wrong')"), stdout=ends["closed"])
    assert (wrong.returncode, wrong.stderr) == (2, "error: wrong\n")
    assert python(*program("print('text', flush=True)\nreturn 1"), stdout=ends["closed"]).returncode == 0


def test_nothing_swallows_it(ends):
    """An except Exception or except OSError between a print and run_cli does not hide a full disk."""
    body = "try:\n    print('x', flush=True)\nexcept OSError: return 0\nexcept Exception: return 0\nreturn 0"
    assert python(*program(body), stdout=ends["full"]).returncode == 2


def test_progress_is_lost_alone(ends):
    """A run continues if its progress has no reader."""
    body = "for i in range(3): print('step', i, file=sys.stderr, flush=True)\nprint('done')"
    for end in ends.values():
        done = python(*program(body), stderr=end)
        assert (done.returncode, done.stdout) == (0, "done\n")


def test_closed_from_the_start(tmp_path):
    """Files that are opened later do not get the descriptor numbers, and so the text, of closed streams."""
    body = f"f = open({str(tmp_path / 'data')!r}, 'w')\nprint('to stdout')\nprint('to stderr', file=sys.stderr)\n"
    body += "status = os.system('echo from a child && echo error >&2')\nf.write(f'data {status}')\nf.close()"
    words = [sys.executable, *program(body)]
    done = python("-c", f"import os, sys\nos.closerange(0, 3)\nos.execv(sys.executable, {words})")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "data").read_text() == "data 0"


def test_slow_reader():
    """If another program made the pipe non-blocking, the writer waits."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    size = 1 << 20
    with subprocess.Popen([sys.executable, *program(f"print('x' * {size})")], cwd=ROOT, stdout=writer) as process:
        os.close(writer)
        with os.fdopen(reader, "rb") as stream:
            assert len(stream.read()) == size + 1
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("encoding", "written"), [("utf-8", "é ─ \udcff?"), ("latin-1", "é ? ÿ?"), ("ascii", "? ? \udcff?")]
)
def test_encodings(encoding, written):
    """Characters that the terminal cannot show become question marks, and the bytes of a path stay the same."""
    env = {"PYTHONIOENCODING": encoding}
    text = r"print('\xe9 \u2500 \udcff\ud800')"
    done = subprocess.run(
        [sys.executable, *program(text)], cwd=ROOT, env=os.environ | env, capture_output=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode(encoding, "surrogateescape") == f"{written}\n"


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("open('/nowhere/x')", "No such file or directory: /nowhere/x"),
        (f"raise OSError({errno.ENOSPC}, 'No space left on device')", "No space left on device"),
        ("raise OSError('5 requested and 3 written')", "5 requested and 3 written"),
        ("import no_such_package", "the Python package 'no_such_package' is not installed"),
        (
            "import tempfile\nfolder = tempfile.mkdtemp()\nos.chdir(folder)\nos.rmdir(folder)\nos.getcwd()",
            "the current folder does not exist any more",
        ),
    ],
)
def test_one_line(body, line):
    done = python(*program(body))
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {line}\n")


# Files


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))


def test_generator_on_a_full_disk(tmp_path):
    """A full disk leaves neither half a file nor a traceback."""
    words = ("-m", "hw.build", "--tile", "4", "--top", "drain", "--out", str(tmp_path))
    done = python(*words, preexec_fn=limit_files)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["middle", "module"])
def test_yosys_on_a_full_disk(monkeypatch, where):
    """A full disk is detected although yosys ends with status 0."""
    plain = lower.run_yosys

    def cut(script, timeout):
        done = plain(script, timeout)
        target = script.with_suffix(".v")
        text = target.read_text()
        size = len(text) // 2 if where == "middle" else text.index("\nendmodule\n") + len("\nendmodule\n")
        assert size < len(text)
        target.write_text(text[:size])
        return done

    component = BLOCKS["drain"](AcceleratorConfig(tile=4))
    assert lower.to_verilog(component, "plain").rstrip().endswith("endmodule")
    monkeypatch.setattr(lower, "run_yosys", cut)
    with pytest.raises(lower.LowerError, match=r"yosys wrote only a part of cut: is the disk of .* full\?"):
        lower.to_verilog(BLOCKS["drain"](AcceleratorConfig(tile=4)), "cut")


@pytest.mark.parametrize("name", ["t mp", ODD, b"caf\xe9\xff".decode(errors="surrogateescape")])
def test_odd_folders(tmp_path, name):
    """--out and TMPDIR contain characters that yosys cannot quote; the Verilog is the same."""
    words = ("-m", "hw.build", "--tile", "4", "--top", "fork", "--out")
    assert python(*words, str(tmp_path / "plain")).returncode == 0
    folder = tmp_path / name
    folder.mkdir()
    done = python(*words, str(folder / "out"), env={"TMPDIR": str(folder)})
    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / "out" / "gristmill.v").read_text() == (tmp_path / "plain" / "gristmill.v").read_text()
    if name == ODD:
        done = python("-m", "hw.resources", "--tile", "4", "--top", "fork", env={"TMPDIR": str(folder)})
        assert (done.returncode, done.stderr) == (0, "")


def test_numpy_on_a_full_disk(tmp_path):
    """numpy's message states how much it wrote, but no reason; so the error asks whether the disk is full."""
    line = "cannot write to .*: 5 requested and 3 written; is the disk full\\?"
    with pytest.raises(UserError, match=line), atomic_directory(tmp_path / "out"):
        raise OSError("5 requested and 3 written")
    assert not list(tmp_path.iterdir())


def test_no_home(monkeypatch):
    monkeypatch.setenv("GRISTMILL_CACHE", "~no-such-user/cache")
    with pytest.raises(UserError, match="~no-such-user/cache: there is no such home directory; set GRISTMILL_CACHE"):
        cache_directory()


# Options


def test_sim_run_refuses_a_tile(capsys):
    """sim.run checks the option itself, before anything runs."""
    assert sim_run.main(["--tile", "7"]) == 2
    assert capsys.readouterr() == ("", "error: tile is one of 4, 8, 16, 32, not 7\n")
    with pytest.raises(SetupError):
        sim_run.select(sim_run.BENCHES, tile=64)
