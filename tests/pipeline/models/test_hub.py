"""Models of the hub: one download for all processes of a node. The hub is a small server on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import PreTrainedModel

from pipeline.config.models import PretrainedModel
from pipeline.errors import BadData
from pipeline.models.hub import config_folder, config_here
from tests.helpers.clock import patience
from tests.helpers.paths import ROOT
from tests.helpers.zoo import tiny

REPO, COMMIT = "people/tiny", "0123456789abcdef0123456789abcdef01234567"
# What the repository holds besides, and what no one needs.
OTHERS = ("pytorch_model.bin", "onnx/model.safetensors", "onnx/config.json", "consolidated.safetensors")
MODELING = """from transformers import LlamaForCausalLM

class TinyForCausalLM(LlamaForCausalLM):
    pass
"""
# Copies of one process, as the libraries take long to import; they load at the same time.
LOAD = """
import os, sys, torch, transformers.models.llama.modeling_llama
from pipeline.errors import BadData
from pipeline.models.load import ModelRef, load_model
repo, trust, copies = sys.argv[1], sys.argv[2] == "trust", int(sys.argv[3])
for _ in range(copies):
    if not os.fork():
        try:
            model = load_model(ModelRef(repo, trust_remote_code=trust), 97)
            told = f"{type(model).__name__} {sum(p.double().sum().item() for p in model.parameters())}"
        except BadData as error:
            told = f"BadData: {error}"
        os.write(1, f"{told}\\n".encode())
        os._exit(0)
for _ in range(copies):
    assert os.wait()[1] == 0
"""


class Hub(ThreadingHTTPServer):
    """Answers for one repository as the hub does, slowly enough that processes meet; counts downloads."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.files, self.fetched = files, Counter[str]()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path, files = self.path.partition("?")[0], self.server.files
        resolve = f"/{REPO}/resolve/{COMMIT}/"
        if path == f"/api/models/{REPO}/revision/main":
            self.send(json.dumps({"id": REPO, "sha": COMMIT, "siblings": []}).encode())
        elif path == f"/api/models/{REPO}/tree/{COMMIT}":
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            self.send(json.dumps(tree).encode())
        elif path.startswith(resolve) and (name := path.removeprefix(resolve)) in files:
            if self.command == "GET":
                self.server.fetched[name] += 1
                time.sleep(0.3)
            self.send(files[name])
        else:
            self.send(b"{}", 404)

    def send(self, data: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:
        return None


@pytest.fixture
def hub(make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> Iterator[Hub]:
    """A tiny Llama under a class of its own, which `modeling_tiny.py` defines."""
    folder = tmp_path / "made"
    make_model().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_tiny.py").write_text(MODELING)
    files = {file.name: file.read_bytes() for file in folder.iterdir()} | dict.fromkeys(OTHERS, b"{}")
    server = Hub(files)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def load(hub: Hub, home: Path, trust: bool, copies: int = 1, offline: bool = False) -> list[str]:
    """What each of so many processes says at its end."""
    known = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline))}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, REPO, "trust" if trust else "no", str(copies)],
        cwd=ROOT,
        env={**os.environ, **known},
        capture_output=True,
        text=True,
        timeout=patience(200),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-copies:]


@pytest.mark.slow
@pytest.mark.parametrize("trust", [False, True])
def test_three_processes_fetch_each_file_once(hub: Hub, tmp_path: Path, trust: bool) -> None:
    total = sum(
        tensor.double().sum().item() for tensor in load_file(tmp_path / "made" / "model.safetensors").values()
    )
    outputs = load(hub, tmp_path / "home", trust, copies=3)
    assert len(outputs) == 3
    for output in outputs:
        name, loaded = output.split()
        assert name == ("TinyForCausalLM" if trust else "LlamaForCausalLM")
        assert float(loaded) == pytest.approx(total)
    wanted = {"config.json", "generation_config.json", "model.safetensors"}
    assert hub.fetched == Counter(wanted | {"modeling_tiny.py"} if trust else wanted)

    # What is in the cache serves without the hub, and without a right to write.
    hub.fetched.clear()
    locks = tmp_path / "home" / "hub" / ".locks"
    locks.rename(tmp_path / "locks")
    assert load(hub, tmp_path / "home", trust, offline=True) == outputs[:1]
    assert not hub.fetched and not locks.exists()


@pytest.mark.slow
def test_what_the_hub_does_not_have_is_bad_data(hub: Hub, tmp_path: Path) -> None:
    hub.files.clear()
    (told,) = load(hub, tmp_path / "home", False)
    assert f"BadData: the model {REPO} holds no model.safetensors; run `hf download" in told
    (told,) = load(hub, tmp_path / "empty", False, offline=True)
    assert f"BadData: cannot load the model '{REPO}'" in told


def test_a_home_that_nobody_has_is_a_folder_that_is_not_there() -> None:
    assert config_folder("~nobody-here/model") is None


def test_where_a_config_is(tmp_path: Path) -> None:
    def spec(path: str) -> PretrainedModel:
        return PretrainedModel(kind="pretrained", path=path)

    tiny("llama").save_pretrained(tmp_path / "model")
    assert config_here(spec(str(tmp_path / "model")), "target") == tmp_path / "model"
    (tmp_path / "empty").mkdir()
    for path, part in ((str(tmp_path / "empty"), "not on this machine"), ("./nowhere", "no such folder")):
        with pytest.raises(BadData, match=part):
            config_here(spec(path), "target")
