# SPDX-License-Identifier: Apache-2.0
"""The command line: every device gives the same text, figures are correct, and every refusal is one line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from tokenizers import Tokenizer

from sw import generate
from sw.common.errors import UserError
from sw.export.gguf import export_gguf
from sw.runtime import Usage
from sw.runtime import setup as decoder_setup
from sw.text.folder import TextFolder
from tests.sw.export.test_gguf import CONTEXT, empty_cache, step, write_gguf

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = "{% for message in messages %}{{ message.role[0] + message.content }}<|im_end|>{% endfor %}"
PROMPT = "Hé!"
PROMPT_IDS = 6
"""Tokens of PROMPT in TEMPLATE: u, H, the two bytes of é, !, and the end."""
KEYS = (
    *("model", "device", "memory", "config", "config_digest", "programs", "attention", "adapter"),
    *("prompt", "system", "context"),
    *("sampling", "prompt_ids", "ids", "text", "stop", "prefill", "decode", "roofline", "seconds"),
)
PHASE_KEYS = {
    *("tokens", "cycles", "beats", "device", "onnxruntime", "conversion", "driver", "seconds"),
    *("tokens_per_second", "per_token"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small decoder with random weights, a chat template and a context of 32 tokens."""
    path = tmp_path_factory.mktemp("model")
    write_gguf(path / "m.gguf", kind="Q4_0", changes={"tokenizer.chat_template": TEMPLATE})
    return export_gguf(path / "m.gguf", path / "out")


@pytest.fixture
def copied(model, tmp_path):
    """The model in a folder whose files a test may change."""
    for source in model.parent.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    return tmp_path / model.name


def run(capsys, model, *arguments):
    """Runs the command line in this process, without a device unless one is given; returns its JSON."""
    options = list(map(str, arguments))
    if "--device" not in options:
        options += ["--device", "onnxruntime"]
    if "--prompt" not in options:
        options += ["--prompt", PROMPT]
    assert generate.main(["--model", str(model), *options, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def command(*arguments, stdin=b""):
    """The command line as a user calls it: (status, stdout, stderr)."""
    line = [sys.executable, "-W", "error", "-m", "sw.generate", *map(str, arguments)]
    done = subprocess.run(line, cwd=ROOT, input=stdin, capture_output=True, timeout=300, check=False)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def configure(model, **values):
    """Changes the model's config.json."""
    path = model.parent / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def greedy(model, prompt_ids, count):
    """The likeliest tokens by plain onnxruntime, which computes the whole sequence again for each token."""
    session = onnxruntime.InferenceSession(model)
    ids = list(prompt_ids)
    for _ in range(count):
        logits, _ = step(session, ids, empty_cache(session), len(ids))
        ids.append(int(logits[-1].argmax()))
    return ids[len(prompt_ids) :]


@pytest.mark.parametrize(
    ("device", "score_words"),
    [("onnxruntime", "auto"), ("reference", "auto"), ("rtl", 0), pytest.param("rtl", "auto", marks=pytest.mark.full)],
)
def test_greedy(device, score_words, model, capsys):
    """The tokens equal onnxruntime's on every device, with the prompt in one block or several."""
    options = ("--device", device, "--score-words", score_words, "--tile", 8, "--max-new-tokens", 12)
    values = run(capsys, model, *options)
    assert tuple(values) == KEYS
    folder = TextFolder(model.parent)
    assert values["prompt_ids"] == folder.tokenizer.encode(f"u{PROMPT}<|im_end|>").ids
    assert values["ids"] == greedy(model, values["prompt_ids"], 12)
    assert values["text"] == folder.decode(values["ids"])
    assert values["stop"] == "max_new_tokens"
    assert (values["device"], values["prompt"], values["system"]) == (device, PROMPT, None)
    assert values["programs"] == (device != "onnxruntime")
    assert values["attention"] == (device != "onnxruntime" and score_words == "auto")
    assert values["sampling"] == {"temperature": 0.0, "top_p": 1.0, "seed": 0}
    assert values["context"] == PROMPT_IDS + 12
    prefill, decode, roofline = values["prefill"], values["decode"], values["roofline"]
    assert set(prefill) == set(decode) == PHASE_KEYS
    # The prompt gives the first new token, and the last new token is not computed.
    assert (prefill["tokens"], decode["tokens"]) == (PROMPT_IDS, 11)
    for phase in (prefill, decode):
        parts = [phase[name] for name in ("device", "onnxruntime", "conversion", "driver")]
        assert 0 < sum(parts) <= phase["seconds"] <= values["seconds"]
        assert phase["per_token"]["host"] == pytest.approx(sum(parts[1:]) / phase["tokens"])
    if device == "onnxruntime":
        assert values["config"] is values["config_digest"] is roofline["tokens_per_second"] is None
        assert decode["beats"] == 0
    else:
        assert values["config"]["tile"] == 8
        assert len(values["config_digest"]) == 64
        assert roofline["tokens_per_second"] == pytest.approx(250e6 * 11 / decode["beats"])
    if device == "rtl":
        assert values["memory"] == "kv260-2400"
        assert decode["cycles"] > decode["beats"] > 0
        for phase in (prefill, decode):
            assert phase["per_token"]["cycles"] == phase["cycles"] / phase["tokens"]
            assert phase["tokens_per_second"] == pytest.approx(250e6 * phase["tokens"] / phase["cycles"])
        assert roofline["reached"] == pytest.approx(decode["beats"] / decode["cycles"])
    else:
        assert values["memory"] is decode["tokens_per_second"] is roofline["reached"] is None
        assert decode["cycles"] == 0


def test_blocks(model, capsys):
    """The text is the same for every max_tokens of the hardware."""
    expected = run(capsys, model, "--max-new-tokens", 5)["ids"]
    for tokens in (1, 4, PROMPT_IDS, 16):
        values = run(capsys, model, "--device", "reference", "--max-tokens", tokens, "--max-new-tokens", 5)
        assert values["ids"] == expected
        assert values["prefill"]["tokens"] == PROMPT_IDS


def test_prompts(model, capsys):
    """Template, system message, no template: prompt_ids shows the model's input."""
    tokenizer = TextFolder(model.parent).tokenizer

    def text(*options):
        values = run(capsys, model, "--max-new-tokens", 1, *options)
        return tokenizer.decode(values["prompt_ids"], skip_special_tokens=False)

    assert text("--prompt", "Hi") == "uHi<|im_end|>"
    assert text("--prompt", "Hi", "--system", "be") == "sbe<|im_end|>uHi<|im_end|>"
    assert text("--prompt", "Hi", "--raw") == "Hi"


@pytest.mark.parametrize("option", ["--prompt", "--prompt-file"])
def test_stdin(option, model):
    """The prompt is the whole input without the last line break."""
    arguments = ("--model", model, option, "-", "--device", "onnxruntime", "--max-new-tokens", 1, "--json")
    status, out, _ = command(*arguments, stdin="é\n日\n\n".encode())
    assert status == 0
    assert json.loads(out)["prompt"] == "é\n日\n"
    status, out, err = command(*arguments, stdin=b"caf\xe9")
    assert (status, out, err) == (2, "", "error: stdin is not UTF-8\n")


def test_prompt_file(model, tmp_path, capsys):
    path = tmp_path / "prompt"
    path.write_bytes(b"line\r\n")
    assert generate.main(f"--model {model} --prompt-file {path} --device onnxruntime --json".split()) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "line"


def test_stop_token(copied, capsys):
    """The stop token ends the text and is not part of it."""
    ids = run(capsys, copied, "--max-new-tokens", 8)["ids"]
    stop = next(token for token in ids if ids.index(token) >= 2)
    for value in (stop, [999, stop]):
        configure(copied, eos_token_id=value)
        values = run(capsys, copied, "--max-new-tokens", 8)
        assert (values["ids"], values["stop"]) == (ids[: ids.index(stop)], "stop_token")
    configure(copied, eos_token_id=ids[0])
    values = run(capsys, copied, "--max-new-tokens", 8)
    assert (values["ids"], values["text"], values["stop"]) == ([], "", "stop_token")
    assert values["decode"]["tokens"] == 0
    assert values["decode"]["per_token"]["cycles"] is values["roofline"]["tokens_per_second"] is None


def test_context(model, capsys):
    """The answer may have one token more than the cache holds, because the last one is not computed."""
    for context, new in ((PROMPT_IDS, 1), (PROMPT_IDS + 3, 4), (CONTEXT, CONTEXT - PROMPT_IDS + 1)):
        values = run(capsys, model, "--context", context, "--max-new-tokens", 100)
        assert (len(values["ids"]), values["stop"], values["context"]) == (new, "context", context)
    # The model's own context is the default.
    assert run(capsys, model, "--max-new-tokens", 100)["context"] == CONTEXT


def test_context_of_the_graph(copied, capsys):
    """The length of a rotary table limits the context, whatever config.json contains."""
    for value in (None, 10 * CONTEXT):
        configure(copied, max_position_embeddings=value)
        values = run(capsys, copied, "--max-new-tokens", 100)
        assert (values["context"], values["stop"]) == (CONTEXT, "context")


def test_no_limit(copied, monkeypatch, capsys):
    """A number of tokens that exceeds the machine's memory gives one line."""
    configure(copied, max_position_embeddings=None)
    monkeypatch.setattr(decoder_setup, "rotary_table", lambda node: "")
    arguments = ["--model", str(copied), "--prompt", "Hi", "--device", "onnxruntime"]
    with pytest.raises(UserError, match=r"--context is at most the model's own context \(1,048,576 tokens\)"):
        generate.main([*arguments, "--context", str(10**15)])

    def no_memory(*_, context, **__):
        assert context == 1 << 20
        raise MemoryError

    monkeypatch.setattr(decoder_setup, "Decoder", no_memory)
    with pytest.raises(UserError, match="no memory for the model and a context of 1,048,576 tokens"):
        generate.main([*arguments, "--max-new-tokens", str(10**15)])


def test_unknown_token(copied):
    """A token of another model's tokenizer is refused."""
    tokenizer = Tokenizer.from_file(str(copied.parent / "tokenizer.json"))
    tokenizer.add_special_tokens(["<more>"])
    tokenizer.save(str(copied.parent / "tokenizer.json"))
    with pytest.raises(UserError, match="the tokenizer made token 259, and the model's vocabulary has 259"):
        generate.main(["--model", str(copied), "--prompt", "a<more>", "--device", "reference"])


def test_sampling(model, capsys):
    """Sampling is reproducible, and greedy if temperature or top_p require it."""

    def ids(*options):
        return run(capsys, model, "--max-new-tokens", 15, *options)["ids"]

    hot = ("--temperature", 5)
    assert ids(*hot, "--seed", 1) == ids(*hot, "--seed", 1) != ids(*hot, "--seed", 2)
    assert ids(*hot, "--top-p", 1e-6) == ids() != ids(*hot)


class FakeDecoder:
    """Answers a prompt with given tokens, in blocks of 4. fails: raised instead of the call with this number."""

    block = 4

    def __init__(self, tokens, context=100, fails=None, error: type[BaseException] = KeyboardInterrupt):
        self.tokens, self.context, self.fails, self.error = tokens, context, fails, error
        self.length, self.calls, self.usage = 0, [], Usage()

    def prefill(self, ids):
        assert self.length + len(ids) < 10, "the prompt's last block is the one whose logits are wanted"
        self.forward(ids)

    def forward(self, ids, every=False):
        assert not every and 1 <= len(ids) <= self.block
        # The work of an interrupted call must not be counted.
        self.usage.cycles += 100 * len(ids)
        self.usage.beats += 80
        self.usage.driver += 0.25
        if len(self.calls) == self.fails:
            raise self.error
        self.usage.tokens += len(ids)
        self.calls.append(list(ids))
        self.length += len(ids)
        logits = np.zeros((1, 300), np.float32)
        # The first call after the prompt's last is token 1, and so on.
        logits[0, self.tokens[sum(len(call) == 1 for call in self.calls)]] = 1
        return logits


def answer(model, decoder, count=50, **callbacks):
    """The answer of generate() to a prompt of 10 tokens."""
    folder = TextFolder(model.parent)
    prompt = [*range(65, 75)]
    return generate.generate(decoder, folder, prompt, count, lambda logits: int(logits.argmax()), **callbacks)


def test_streaming(model):
    """Each character appears whole as soon as its last byte is known, and nothing is lost."""
    tokenizer = TextFolder(model.parent).tokenizer
    text = "né 日😀!"
    tokens = [*tokenizer.encode(text).ids, 258]
    shown, read, made = [], [], []
    decoder = FakeDecoder(tokens)
    result = answer(model, decoder, show=shown.append, read=read.append, made=made.append)
    assert shown == list(text)
    assert (result.text, result.ids, result.stop) == (text, tokens[:-1], "stop_token")
    assert read == [0, 4, 8, 10]
    assert made == [*range(1, len(tokens))]
    assert decoder.calls == [[65, 66, 67, 68], [69, 70, 71, 72], [73, 74], *([token] for token in tokens[:-1])]
    # The answer ends in the middle of a character: its bytes are shown as a replacement character.
    euro = tokenizer.encode("a€").ids
    shown.clear()
    assert answer(model, FakeDecoder(euro), 3, show=shown.append).text == "a\ufffd"
    assert shown == ["a", "\ufffd"]


def test_figures(model):
    """Figures are sums over the calls of each phase, and values derived from them."""
    result = answer(model, FakeDecoder([1] * 9), 9)
    prefill, decode = result.prefill, result.decode
    assert (prefill.tokens, prefill.cycles, prefill.beats, prefill.driver) == (10, 1000, 240, 0.75)
    assert (decode.tokens, decode.cycles, decode.beats, decode.host) == (8, 800, 640, 2.0)
    assert decode.tokens_per_second == 250e6 / 100
    assert decode.to_dict()["per_token"]["host"] == 0.25


@pytest.mark.parametrize("call", range(6))
def test_interrupted_anywhere(call, model):
    """Only finished calls count."""
    result = answer(model, FakeDecoder([1] * 9, fails=call))
    assert result.stop == "interrupted"
    assert result.prefill.tokens == [0, 4, 8, 10, 10, 10][call]
    assert result.prefill.cycles == 100 * result.prefill.tokens
    assert len(result.ids) == max(0, call - 2)
    assert result.decode.tokens == max(0, call - 3)
    assert result.decode.cycles == 100 * result.decode.tokens


def test_failure_is_no_interrupt(model):
    with pytest.raises(UserError):
        answer(model, FakeDecoder([1] * 9, fails=4, error=UserError))


@pytest.mark.simulator
def test_text_and_table(model):
    """The text comes first and then the figures; progress is on stderr only."""
    status, out, err = command(
        *("--model", model, "--prompt", PROMPT, "--device", "rtl", "--tile", 8, "--max-new-tokens", 6),
        *("--score-words", 0, "--memory", "ideal"),
    )
    assert status == 0
    lines = out.splitlines()
    start = next(index for index, line in enumerate(lines) if re.search("prompt +decoding", line))
    assert "".join(lines[:start]).strip()
    rows = lines[start:]
    assert any(re.fullmatch(r" *tokens +6 +5 *", line) for line in rows)
    for pattern in (
        r"cycles per token +[\d,]+ +[\d,]+",
        r"tokens/s of the programs at 250 MHz +[\d,]+\.\d +[\d,]+\.\d",
        r"tokens/s if all ports carried weights in every cycle +[\d,]+\.\d",
        r"reached share of this rate +\d+\.\d %",
        r"host, ms per token +\d+\.\d +\d+\.\d",
        r"onnxruntime +\d+\.\d +\d+\.\d",
        r"conversion +\d+\.\d +\d+\.\d",
        r"driver +\d+\.\d +\d+\.\d",
        r"simulation, s per token +\d+\.\d\d +\d+\.\d\d",
    ):
        assert any(re.search(pattern, line) for line in rows), pattern
    assert "stopped at --max-new-tokens; 6 prompt tokens, 6 new ones" in out
    assert "cycles are simulated, memory ideal;" in out
    assert "array  8 x 8 PEs, 4-bit weights" in err
    assert "packing layer" in err
    assert "prompt 6 of 6 tokens" in err
    assert "new tokens 6 of 6" in err
    assert "\r" not in err


def test_table_without_hardware(model, capsys):
    """The table has no row that needs hardware."""
    for device in ("reference", "onnxruntime"):
        arguments = ["--model", str(model), "--prompt", "Hi", "--device", device, "--max-new-tokens", "3"]
        assert generate.main(arguments) == 0
        out = capsys.readouterr().out
        assert "cycles per token" not in out
        assert "tokens/s of the linear layers" not in out
        assert "reached share" not in out
        assert "host, ms per token" in out
        assert ("has no hardware" in out) == ("conversion" in out) == ("if all ports" in out) == (device == "reference")


BAD = {
    "no prompt": ([], "one of the arguments --prompt --prompt-file is required"),
    "two prompts": (["--prompt", "a", "--prompt-file", "b"], ".*not allowed with.*"),
    "empty prompt": (["--prompt", ""], "the prompt is empty"),
    "missing file": (["--prompt-file", "nowhere"], r"nowhere cannot be read \(.*\)"),
    "no such model": (["--prompt", "a", "--model", "nowhere"], r"no such model: nowhere \(.*\)"),
    "no tokens": (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens is 1 or more, not 0"),
    "no context": (["--prompt", "a", "--context", "-3"], "--context is 1 or more, not -3"),
    "long context": (
        ["--prompt", "a", "--context", "33"],
        r"--context is at most the model's own context \(32 tokens\), not 33",
    ),
    "long prompt": (
        ["--prompt", "a" * 50],
        r"the prompt has 52 tokens, more than the model's context holds \(32\)",
    ),
    "prompt and context": (
        ["--prompt", "aaaa", "--context", "5"],
        r"the prompt has 6 tokens, more than --context holds \(5\)",
    ),
    "temperature": (["--prompt", "a", "--temperature", "-1"], "temperature is a number from 0, not -1.0"),
    "top_p": (["--prompt", "a", "--top-p", "0"], "top_p is above 0 and at most 1, not 0.0"),
    "seed": (["--prompt", "a", "--seed", "x"], "argument --seed: invalid int value: 'x'"),
    "device": (
        ["--prompt", "a", "--device", "fpga"],
        "no device is named fpga; there are reference, rtl, kv260, onnxruntime",
    ),
    "no board": (
        ["--prompt", "a", "--device", "kv260"],
        r"/lib/firmware/xilinx/gristmill/manifest.json: no manifest there; .*",
    ),
    "memory": (["--prompt", "a", "--device", "rtl", "--memory", "x"], "memory is one of ideal, .*, not x"),
    "memory of another": (
        ["--prompt", "a", "--device", "onnxruntime", "--memory", "ideal"],
        "--memory is for --device rtl, not onnxruntime",
    ),
    "tile": (["--prompt", "a", "--tile", "12"], "tile is one of 4, 8, 16, 32, not 12"),
    "max_k": (
        ["--prompt", "a", "--max-k", "32"],
        r"layer .*/q_proj.*: K is at most max_k \(32\), not 64; .* --max-k 64 takes it",
    ),
    "no UTF-8": (["--prompt", "\udce9"], "the text is not UTF-8"),
    "system and raw": (
        ["--prompt", "a", "--raw", "--system", "b"],
        "a system message needs a chat template, and --raw uses none",
    ),
    "no tokenizer": (["--prompt", "a", "--model", "mute"], "mute has no tokenizer.json, and a model's text needs one"),
    "no decoder": (["--prompt", "a", "--model", "other"], r".* is no language model: it has no input named input_ids"),
    "damaged model": (["--prompt", "a", "--model", "half"], r"half/model\.onnx is not a complete ONNX file .*"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input(arguments, message, model, tmp_path, monkeypatch, capsys):
    """The error is one line, and no device is opened before it."""
    tokenizer = (model.parent / "tokenizer.json").read_bytes()
    for name in ("mute", "other", "half"):
        (tmp_path / name).mkdir()
        if name != "mute":
            (tmp_path / name / "tokenizer.json").write_bytes(tokenizer)
    (tmp_path / "mute" / "model.onnx").write_bytes(model.read_bytes())
    (tmp_path / "half" / "model.onnx").write_bytes(model.read_bytes()[:5000])
    graph = onnx.load(model, load_external_data=False)
    graph.graph.input[0].name = "ids"
    onnx.save(graph, tmp_path / "other" / "model.onnx")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(decoder_setup, "open_device", lambda *_, **__: pytest.fail("a device was opened"))
    before = sorted(tmp_path.rglob("*"))
    options = arguments if "--model" in arguments else [*arguments, "--model", str(model)]
    with pytest.raises(UserError) as refused:
        generate.main(options)
    assert re.fullmatch(message, str(refused.value)), str(refused.value)
    assert capsys.readouterr().out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_input_of_the_command(model):
    status, out, err = command("--model", model, "--prompt", "x" * 99)
    assert (status, out) == (2, "")
    assert err == "error: the prompt has 101 tokens, more than the model's context holds (32)\n"


def test_model_without_quantized_layers(copied):
    """A device refuses it, because it would have no layer to run."""
    graph = onnx.load(copied)
    for node in graph.graph.node:
        if node.op_type == "MatMulNBits":
            node.domain = "elsewhere"
    onnx.save(graph, copied)
    with pytest.raises(UserError, match="has no quantized linear layers"):
        generate.main(["--model", str(copied), "--prompt", "Hi", "--device", "reference"])


@pytest.mark.slow
def test_smollm2(smollm2, capsys):
    """A real model's answer."""
    question = ("--prompt", "What is the capital of France?")
    values = run(capsys, smollm2, *question, "--max-new-tokens", 20)
    assert values["text"] == "The capital of France is Paris."
    assert values["stop"] == "stop_token"
