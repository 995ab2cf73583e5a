# SPDX-License-Identifier: Apache-2.0
"""Models by their names, from a small hub on 127.0.0.1: download, cache, revisions, and one line for each failure."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest

from sw.common.errors import UserError
from sw.export.hub import HubName, hub_name
from sw.export.resolve import find_model, resolve_model
from tests.sw.fixtures.checkpoints import make_checkpoint, read_tensors, write_tensors
from tests.sw.fixtures.huggingface.hub_server import TOKEN, commit, hub_server

ROOT = Path(__file__).resolve().parents[3]
TEXTS = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
NAMES = {
    "Qwen/Qwen2.5-0.5B-Instruct-AWQ": HubName("Qwen/Qwen2.5-0.5B-Instruct-AWQ"),
    "a/b@v1.0": HubName("a/b", "v1.0"),
    "a/b@refs/pr/1": HubName("a/b", "refs/pr/1"),
    "a/b:Q4/m-00001-of-00002.gguf": HubName("a/b", None, "Q4/m-00001-of-00002.gguf"),
    "a/b@v1:m.gguf": HubName("a/b", "v1", "m.gguf"),
    **dict.fromkeys(["a/b/c", "/a/b", "./a", "../a", "a", "a/", "a/b@", "a/b:", "a/ b", "~/a", "a/b:c:d", "é/b"]),
    **dict.fromkeys(["build/model.onnx", "build/m.GGUF", "x/model.safetensors"]),
}


@pytest.mark.parametrize(("text", "name"), NAMES.items())
def test_names(text, name):
    assert hub_name(text) == name


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An AutoAWQ checkpoint in two shards, with other files that no export needs."""
    folder = tmp_path_factory.mktemp("files") / "in"
    make_checkpoint(folder, shards=2)
    (folder / "README.md").write_text("# a model")
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    (folder / "original").mkdir()
    (folder / "original" / "model.safetensors").write_bytes(b"again")
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub, and the settings that its client takes from the environment when it is imported."""
    monkeypatch.setenv("GRISTMILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    constants = huggingface_hub.constants
    with hub_server() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "tokens"))
        yield server
        huggingface_hub.close_session()


def one_line(model: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        find_model(model)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_download_and_cache(hub, files, tmp_path, capfd):
    hub.add("org/tiny", files)
    path = find_model("org/tiny")
    assert path == tmp_path / "hub" / "models--org--tiny" / "snapshots" / commit("main")
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    needed = sorted([*TEXTS, *shards, "model.safetensors.index.json"])
    assert hub.downloads() == needed
    assert sorted(item.name for item in path.iterdir()) == needed
    # The cache is enough: there is no second request, and the hub may be away.
    hub.requests.clear()
    hub.status = 500
    assert find_model("org/tiny") == path
    assert find_model(f"org/tiny@{commit('main')}") == path
    assert hub.requests == []
    exported = resolve_model("org/tiny")
    assert exported.parent.name.startswith("tiny-")
    assert json.loads(exported.with_name("config.json").read_text())["name"] == "tiny"
    capfd.readouterr()


def test_revisions(hub, files, tmp_path):
    hub.add("org/tiny", files)
    shutil.copytree(files, tmp_path / "other")
    (tmp_path / "other" / "generation_config.json").write_text('{"eos_token_id": 7}')
    for revision in ("v2", "refs/pr/1"):
        hub.add("org/tiny", tmp_path / "other", revision)
        path = find_model(f"org/tiny@{revision}")
        assert path.name == commit(revision)
        assert json.loads((path / "generation_config.json").read_text()) == {"eos_token_id": 7}
    assert find_model("org/tiny").name == commit("main")
    # The files of a revision may be others.
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "m.gguf").write_bytes(b"GGUF")
    hub.add("org/tiny", tmp_path / "gguf", "gguf")
    assert find_model("org/tiny@gguf").name == "m.gguf"
    one_line("org/tiny@v9", f"org/tiny has no revision v9 ({hub.endpoint})")


def test_settings_come_first(hub, files, tmp_path, capfd):
    """A checkpoint that is refused costs no download of tensors."""
    shutil.copytree(files, tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    config = json.loads(path.read_text())
    for name, changes, floats, problem in (
        ("family", {"model_type": "gemma"}, False, "model_type 'gemma' is not supported"),
        ("method", {"quantization_config": {"quant_method": "fp8"}}, False, "is quantized by 'fp8'"),
        ("float", {"quantization_config": None}, False, "is not quantized"),
        ("quantized", {}, True, "is quantized already"),
    ):
        path.write_text(json.dumps({**config, **changes}))
        hub.add(f"org/{name}", tmp_path / "in")
        with pytest.raises(UserError, match=problem):
            find_model(f"org/{name}", floats=floats)
    path.write_text(json.dumps({**config, "quantization_config": None}))
    hub.add("org/good", tmp_path / "in")
    assert not [name for name in hub.downloads() if name.endswith(".safetensors")]
    assert len(list(find_model("org/good", floats=True).glob("*.safetensors"))) == 2
    capfd.readouterr()


def test_local_path_has_priority(hub, files, tmp_path, monkeypatch):
    hub.add("org/tiny", files)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(files, tmp_path / "org" / "tiny")
    assert find_model("org/tiny") == Path("org/tiny")
    assert hub.requests == []


def test_interrupted_download(hub, files, tmp_path, monkeypatch, capfd):
    """A file that ends early leaves nothing that passes for the model; the next run goes on."""
    # Between its attempts.
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    hub.add("org/tiny", files)
    hub.truncated.add("model-00001-of-00002.safetensors")
    one_line("org/tiny", f"org/tiny: the download from {hub.endpoint} broke off (")
    hub.truncated.clear()
    hub.requests.clear()
    path = find_model("org/tiny")
    assert "config.json" not in hub.downloads()
    assert (path / "model-00001-of-00002.safetensors").read_bytes() == (
        files / "model-00001-of-00002.safetensors"
    ).read_bytes()
    capfd.readouterr()


def test_refusals(hub, files, tmp_path, monkeypatch):
    one_line("org/none", f"no such model: org/none is neither a path nor on the hub ({hub.endpoint})")
    one_line("a--b/c", "a--b/c is no name of a model (")
    hub.gated.add("org/gated")
    one_line(
        "org/gated", f"org/gated is gated: accept its terms at {hub.endpoint}/org/gated, then log in with `hf auth"
    )
    hub.add("org/secret", files)
    hub.private.add("org/secret")
    one_line(
        "org/secret", "org/secret is private, or does not exist: log in with `hf auth login`, or set HF_TOKEN (401"
    )
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert find_model("org/secret").name == commit("main")
    hub.status = 503
    one_line("org/tiny", f"org/tiny cannot be downloaded: {hub.endpoint} answers 503")
    hub.status, hub.page = 0, b"<html>log in to the network</html>"
    one_line("org/tiny", f"org/tiny cannot be downloaded from {hub.endpoint} (Expecting value")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    (tmp_path / "file").write_text("")
    hub.page = b""
    hub.add("org/other", files)
    one_line("org/other", f"org/other cannot be stored in {tmp_path}/file/hub (")


def test_offline(hub, files, tmp_path, monkeypatch):
    where = f"org/tiny is neither a path nor in the local Hugging Face cache ({tmp_path}/hub), and"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    one_line("org/tiny", f"{where} HF_HUB_OFFLINE forbids downloads: unset it, or name a local file or folder")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        one_line("org/tiny", f"{where} http://127.0.0.1:9 cannot be reached ([Errno 111] Connection refused): connect")
    # A snapshot of another program, which has left no list of the files.
    snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / commit("main")
    shutil.copytree(files, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit("main"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert find_model("org/tiny") == snapshot
    for path in snapshot.glob("*.safetensors"):
        path.unlink()
    shutil.rmtree(snapshot / "original")
    one_line("org/tiny", f"{where} HF_HUB_OFFLINE forbids")


def test_gguf(hub, tmp_path):
    folder = tmp_path / "in"
    (folder / "big").mkdir(parents=True)
    parts = [f"big/m-F16-0000{i}-of-00002.gguf" for i in (1, 2)]
    for name in ("m-Q4_0.gguf", "m-Q8_0.GGUF", "mmproj-m.gguf", "config.json", *parts):
        (folder / name).write_bytes(b"GGUF" + name.encode())
    hub.add("org/gguf", folder)
    listed = "big/m-F16-00001-of-00002.gguf, m-Q4_0.gguf, m-Q8_0.GGUF"
    one_line("org/gguf", f"org/gguf has 3 GGUF models, name one as org/gguf:FILE ({listed})")
    one_line("org/gguf:Q4_0", f"org/gguf has no file Q4_0; its GGUF files: {listed}")
    one_line("org/gguf:config.json", "org/gguf has no file config.json; its GGUF files")
    assert find_model("org/gguf:m-Q8_0.GGUF").read_bytes() == b"GGUFm-Q8_0.GGUF"
    assert hub.downloads() == ["m-Q8_0.GGUF"]
    assert find_model(f"org/gguf@main:{parts[0]}").read_bytes() == b"GGUF" + parts[0].encode()
    assert hub.downloads() == [*parts, "m-Q8_0.GGUF"]
    for name in ("m-Q8_0.GGUF", *parts):
        (folder / name).unlink()
    hub.add("org/one", folder)
    assert find_model("org/one").name == "m-Q4_0.gguf"
    (folder / "m-Q4_0.gguf").unlink()
    hub.add("org/zero", folder)
    one_line("org/zero", "org/zero holds no model: no .onnx, .safetensors or GGUF file")
    one_line("org/zero:m.gguf", "org/zero has no file m.gguf; its ONNX files: none")


def test_onnx(hub, tmp_path):
    """onnx-community's layout: one graph with its data, and the text files in the root."""
    folder = tmp_path / "in"
    (folder / "onnx").mkdir(parents=True)
    for name in ("model.onnx", "model.onnx_data", "model.onnx_data_1", "model_q4.onnx", "model_q4.onnx_data"):
        (folder / "onnx" / name).write_bytes(b"\x08" + name.encode())
    for name in ("config.json", "tokenizer.json", "[x].jinja", "model.safetensors"):
        (folder / name).write_text(f'{{"a": "{name}"}}')
    hub.add("org/onnx", folder)
    texts = ["[x].jinja", "config.json"]
    path = find_model("org/onnx")
    assert path.read_bytes() == b"\x08model_q4.onnx"
    assert hub.downloads() == [*texts, "onnx/model_q4.onnx", "onnx/model_q4.onnx_data", "tokenizer.json"]
    hub.requests.clear()
    assert find_model("org/onnx", floats=True) == path.with_name("model.onnx")
    assert hub.downloads() == ["onnx/model.onnx", "onnx/model.onnx_data", "onnx/model.onnx_data_1"]
    assert find_model("org/onnx:onnx/model.onnx") == path.with_name("model.onnx")


def test_whole_file_beside_shards(hub, files, tmp_path):
    """As in a local folder, model.safetensors has priority; Mistral's consolidated file is left where it is."""
    shutil.copytree(files, tmp_path / "in")
    (tmp_path / "in" / "consolidated.safetensors").write_bytes(b"again")
    hub.add("org/shards", tmp_path / "in")
    assert not (find_model("org/shards") / "consolidated.safetensors").exists()
    write_tensors(tmp_path / "in" / "model.safetensors", read_tensors(files))
    hub.add("org/whole", tmp_path / "in")
    hub.requests.clear()
    find_model("org/whole")
    assert [name for name in hub.downloads() if name.endswith(".safetensors")] == ["model.safetensors"]


@pytest.mark.slow
def test_command_line(hub, files, tmp_path):
    """The real environment variables: download and run, and run again offline with the same answer."""
    hub.add("org/tiny", files)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf")}

    def run(model: str, **more: str) -> subprocess.CompletedProcess[str]:
        options = ["--device", "reference", "--tile", "4", "--prompt", "hi", "--max-new-tokens", "2", "--json"]
        command = [sys.executable, "-m", "sw.generate", "--model", model, *options]
        return subprocess.run(
            command, cwd=ROOT, env=environment | more, capture_output=True, text=True, check=False, timeout=120
        )

    first = run("org/tiny")
    assert first.returncode == 0
    second = run("org/tiny", HF_HUB_OFFLINE="1")
    assert json.loads(second.stdout)["ids"] == json.loads(first.stdout)["ids"]
