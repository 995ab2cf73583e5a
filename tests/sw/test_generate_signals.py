# SPDX-License-Identifier: Apache-2.0
"""sw.generate as a process: interrupted, terminated, with a closed output, with an output that lacks characters."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sw.export.gguf import export_gguf
from sw.text.folder import TextFolder
from tests.sw.export.test_gguf import write_gguf

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small decoder with random weights."""
    path = tmp_path_factory.mktemp("model")
    write_gguf(path / "m.gguf", kind="Q4_0")
    return export_gguf(path / "m.gguf", path / "out")


# Runs the command line with a decoder that takes half a second per token.
SLOW = (
    "import signal, sys, time; import sw.generate as g; from sw.common.errors import run_cli\n"
    "from sw.runtime import Decoder\n"
    # A test run in the background of a shell inherits SIGINT ignored.
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "plain = Decoder.forward\n"
    "Decoder.forward = lambda self, ids, every=False: (time.sleep(0.5), plain(self, ids, every))[1]\n"
    "{more}\n"
    "run_cli(g.main)\n"
)


def interrupted(model, number, *options, more="", again=False):
    """Sends a signal at the third new token; returns (status, stdout, stderr, seconds until the process ended)."""
    arguments = ["--model", model, "--prompt", "Hi", "--device", "reference", "--max-new-tokens", "25", *options]
    line = [sys.executable, "-c", SLOW.format(more=more), *map(str, arguments)]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        err = ""
        for text in process.stderr:
            err += text
            if "new tokens 3 of" in text or "new tokens 5 of" in text:
                break
        start = time.monotonic()
        process.send_signal(number)
        if again:
            time.sleep(1)
            process.send_signal(number)
        out, rest = process.communicate(timeout=60)
    return process.returncode, out, err + rest, time.monotonic() - start


def test_interrupt(model):
    """After Ctrl-C the command prints the answer so far, with its figures."""
    status, out, err, seconds = interrupted(model, signal.SIGINT)
    assert (status, "Traceback" in err) == (130, False)
    assert seconds < 15
    assert "host, ms per token" in out
    assert re.search(r"interrupted; \d+ prompt tokens, [345678] new ones", out)


def test_interrupt_json(model):
    status, out, err, _ = interrupted(model, signal.SIGINT, "--json")
    assert (status, "Traceback" in err) == (130, False)
    values = json.loads(out)
    assert values["stop"] == "interrupted"
    assert len(values["ids"]) >= 3
    assert values["decode"]["tokens"] in (len(values["ids"]) - 1, len(values["ids"]))
    assert values["text"] == TextFolder(model.parent).decode(values["ids"])


def test_second_interrupt(model):
    """A second interrupt ends the process immediately."""
    more = "g.print_table = lambda report: time.sleep(60)"
    status, _, err, seconds = interrupted(model, signal.SIGINT, more=more, again=True)
    assert status == 130
    assert seconds < 15
    assert "Traceback" not in err


def test_terminated(model):
    status, _, err, seconds = interrupted(model, signal.SIGTERM)
    assert (status, "Traceback" in err) == (143, False)
    assert seconds < 15


def test_closed_pipe(model):
    """`| head` is no error."""
    line = f"{sys.executable} -m sw.generate --model {model} --prompt Hi --device onnxruntime | head -c 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], cwd=ROOT, capture_output=True, timeout=100, check=False
    )
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr


def test_one_pipe(model):
    """With 2>&1 no progress is within the text; with separate pipes stderr has the progress."""
    line = [sys.executable, "-m", "sw.generate", "--model", str(model), "--prompt", "Hi", "--device", "onnxruntime"]

    def run(stderr, *options):
        """(stdout, stderr); stdout contains both if they are one pipe."""
        done = subprocess.run(
            [*line, "--max-new-tokens", "20", *options], cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, timeout=100
        )
        assert done.returncode == 0
        return done.stdout.decode(), (done.stderr or b"").decode()

    document, progress = run(subprocess.PIPE, "--json")
    text = json.loads(document)["text"]
    assert len(text) > 5 and progress.count("new tokens ") == 10
    together, _ = run(subprocess.STDOUT)
    assert f"tokens\n{text}\n" in together and "new tokens " not in together
    alone, progress = run(subprocess.PIPE)
    assert alone.startswith(f"{text}\n") and progress.count("new tokens ") == 10
    # A JSON document is printed at the end.
    together, _ = run(subprocess.STDOUT, "--json")
    assert "new tokens 20 of 20\n{" in together


def test_other_encoding(model):
    """A terminal without the characters of an answer gets question marks."""
    script = SLOW.replace("time.sleep(0.5)", "0").format(more="g.TextFolder.decode = lambda self, ids: 'é' * len(ids)")
    line = [sys.executable, "-c", script, "--model", str(model), "--prompt", "Hi", "--device", "onnxruntime"]
    environment = {"PYTHONIOENCODING": "ascii", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [*line, "--max-new-tokens", "3"], cwd=ROOT, env=environment, capture_output=True, timeout=100, check=False
    )
    assert (done.returncode, done.stdout[:3]) == (0, b"???"), done.stderr
