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

from tests.helpers.clock import patience
from tests.helpers.paths import ROOT

REPO, COMMIT = "people/tiny", "0123456789abcdef0123456789abcdef01234567"
# What the repository holds besides, and what no one needs.
OTHERS = ("pytorch_model.bin", "onnx/model.safetensors", "onnx/config.json", "consolidated.safetensors")
MODELING = """from transformers import LlamaForCausalLM

class TinyForCausalLM(LlamaForCausalLM):
    pass
"""
LOAD = """
import sys, torch
from pipeline.models.load import ModelRef, load_model
model = load_model(ModelRef(sys.argv[1], trust_remote_code=sys.argv[2] == "trust"), 97)
print(type(model).__name__, sum(p.double().sum().item() for p in model.parameters()))
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


def load(hub: Hub, home: Path, trust: bool, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LOAD, REPO, "trust" if trust else "no"],
        cwd=ROOT,
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("trust", [False, True])
def test_three_processes_fetch_each_file_once(hub: Hub, tmp_path: Path, trust: bool) -> None:
    total = sum(
        tensor.double().sum().item() for tensor in load_file(tmp_path / "made" / "model.safetensors").values()
    )
    started = [load(hub, tmp_path / "home", trust) for _ in range(3)]
    outputs = [process.communicate(timeout=patience(200))[0].split("\n")[-2] for process in started]
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
    offline = load(hub, tmp_path / "home", trust, HF_HUB_OFFLINE="1")
    assert offline.communicate(timeout=patience(200))[0].split("\n")[-2] == outputs[0]
    assert not hub.fetched and not locks.exists()


def test_what_the_hub_does_not_have_is_bad_data(hub: Hub, tmp_path: Path) -> None:
    hub.files.clear()
    process = load(hub, tmp_path / "home", False)
    assert (
        f"BadData: {REPO} holds no model.safetensors; run `hf download"
        in process.communicate(timeout=patience(200))[0]
    )
    offline = load(hub, tmp_path / "empty", False, HF_HUB_OFFLINE="1")
    assert f"BadData: cannot load the model '{REPO}'" in offline.communicate(timeout=patience(200))[0]
