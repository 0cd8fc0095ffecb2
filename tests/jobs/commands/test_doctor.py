"""The doctor names what is wrong and what to do, and fails only then."""

from __future__ import annotations

import importlib.metadata
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from jobs.commands import doctor
from jobs.mlflow_address import tracking_problem
from pipeline.config.schema import Config
from pipeline.errors import ConfigError
from tests.helpers.configs import MINIMAL
from tests.helpers.zoo import saved, tiny


@pytest.fixture(autouse=True)
def _versions_are_another_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda name: ["torch>=1.0", "absent>1; extra == 'dev'"]
    )


def make(tmp_path: Path, **groups: Any) -> Config:
    return Config.model_validate(MINIMAL | {"storage": str(tmp_path / "runs")} | groups)


def table(capsys: pytest.CaptureFixture[str]) -> dict[str, tuple[str, str]]:
    """name → (status, text)"""
    lines = capsys.readouterr().out.splitlines()
    return {line[6:20].strip(): (line[:5].strip(), line[21:]) for line in lines}


def test_healthy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.doctor(make(tmp_path)) == 0
    rows = table(capsys)
    assert {status for status, _ in rows.values()} <= {"ok", "warn"}
    assert rows["storage"] == ("ok", f"{tmp_path / 'runs'} can be written")
    assert not list((tmp_path / "runs").iterdir()), "the probe is gone"


def test_without_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.doctor(None) == 0
    assert {"python", "torch", "name clash", "cuda"} <= set(table(capsys))


def test_every_fault_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["torch>=99", "no-such-thing>=1"])
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "zero.json").write_text("{")
    sources = [{"kind": "text", "name": "mine", "files": [str(tmp_path / "*.none")]}]
    config = make(
        tmp_path,
        storage=str(tmp_path / "file" / "runs"),
        data=MINIMAL["data"] | {"sources": sources},
        drafter={"kind": "pretrained", "path": str(tmp_path / "empty")},
        train=MINIMAL["train"] | {"deepspeed": str(tmp_path / "zero.json")},
        run={"executor": "ray", "device": "cuda", "gpus_per_task": 1},
        tracking={"uri": "http://ann:pa55@127.0.0.1:9"},
    )
    assert doctor.doctor(config) == 4
    rows = table(capsys)
    for name, part in {
        "torch": "needs torch>=99: run `make setup`",
        "no-such-thing": "not installed",
        "storage": "set storage=PATH",
        "tracking": "no server answers at http://127.0.0.1:9/health",
        "data mine": "no file matches",
        "drafter": "no config.json",
        "deepspeed": "zero.json': Expecting",
    }.items():
        assert rows[name][0] == "fail" and part in rows[name][1], (name, rows[name])
    assert "pa55" not in str(rows)


def test_offline_hub_is_told_from_a_missing_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "hub/models--some--drafter").mkdir(parents=True)
    config = make(
        tmp_path,
        target={"kind": "pretrained", "path": "some/target"},
        drafter={"kind": "pretrained", "path": "some/drafter"},
    )
    assert doctor.doctor(config) == 4
    rows = table(capsys)
    assert rows["target"][0] == "fail" and "HF_HUB_OFFLINE" in rows["target"][1]
    assert rows["drafter"][0] == "ok"


@pytest.mark.parametrize(
    ("answer", "status", "part"),
    [
        (200, "ok", "on the hub"),
        (401, "warn", "hf auth login"),
        (404, "warn", "misspelt"),
        (503, "fail", "answers 503"),
        (None, "fail", "out of reach"),
    ],
)
def test_the_hub_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: int | None, status: str, part: str
) -> None:
    from huggingface_hub import constants

    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(answer or 500)
            self.end_headers()
            self.wfile.write(b'{"id": "some/stories"}')

        def log_message(self, *args: object) -> None:
            return None

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        port = 9 if answer is None else http.server_port
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        found = doctor._hub("data stories", "some/stories", "dataset")
        http.shutdown()
    assert (found.status, found.name) == (status, "data stories") and part in found.text
    assert asked == ([] if answer is None else ["/api/datasets/some/stories"])


def test_deepspeed_settings_are_read(tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    train = MINIMAL["train"] | {"deepspeed": str(file)}
    assert doctor._deepspeed(make(tmp_path, train=train, run={"executor": "ray"})).text.endswith(
        "ZeRO stage 2"
    )


def test_name_clash(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    doctor.check_name_clash()
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda n: "0.12" if n == "kernels" else real(n))
    with pytest.raises(ConfigError, match="pip uninstall kernels"):
        doctor.check_name_clash()
    assert doctor.doctor(None) == 4
    assert table(capsys)["name clash"][0] == "fail"


@pytest.fixture
def server() -> Iterator[str]:
    """Healthy below /good, asking for a login below /private, not found elsewhere."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response({"/good/health": 200, "/private/health": 401}.get(self.path, 404))
            self.end_headers()

        def log_message(self, *args: object) -> None:
            return None

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://ann:pa55@127.0.0.1:{http.server_port}"
        http.shutdown()


def test_tracking_servers(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert tracking_problem(f"{server}/good/") is None
    assert tracking_problem(f"{server}/private") is None
    problem = tracking_problem(server)
    assert problem and "answers 404" in problem and "pa55" not in problem


def test_tracking_stores(tmp_path: Path) -> None:
    assert tracking_problem(f"sqlite:///{tmp_path}/new/mlflow.db") is None
    assert "plain folders" in str(tracking_problem(str(tmp_path)))
    assert "sqlite:////absolute" in str(tracking_problem("sqlite://mlflow.db"))
    assert "cannot be written" in str(tracking_problem(f"sqlite:///{tmp_path}"))
    (tmp_path / "text.db").write_text("this is no database, and long enough to be seen as none" * 40)
    assert "not a database" in str(tracking_problem(f"sqlite:///{tmp_path}/text.db"))


def spoil(folder: Path, file: str, data: bytes) -> None:
    (folder / file).write_bytes(data)


def quantise(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(values | {"quantization_config": {"quant_method": "gptq"}})
    )


# Architecture, its changes, what is done to its folder, and what the doctor says.
MODELS: list[tuple[str, dict[str, Any], Any, str | None]] = [
    ("llama", {}, None, None),
    ("mixtral", {}, None, None),
    ("mistral", {"sliding_window": 96}, None, None),
    ("falcon", {}, None, "falcon does not attend through transformers' attention interface"),
    ("gemma2", {}, None, "a cap on attention scores (softcap)"),
    ("t5", {}, None, "is no causal language model"),
    ("mistral", {"sliding_window": 95}, None, "a sliding window of 95 tokens, and texts get 96 tokens long"),
    ("gpt2", {}, None, "64 learned positions and no more, and texts get 96 tokens long"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, None,
     "rope_type dynamic"),
    ("llama", {}, quantise, "its weights are quantised (gptq)"),
    ("llama", {}, lambda folder: spoil(folder, "model.safetensors", b"torn"), "not a whole safetensors file"),
    ("llama", {}, lambda folder: spoil(folder, "config.json", b"{"), "cannot read the config of the target"),
    ("llama", {}, lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    ("llama", {}, lambda folder: (folder / "model.safetensors").unlink(), "budgetdraft convert"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "change", "part"), MODELS)
def test_models_that_cannot_be_run(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    changes: dict[str, Any],
    change: Any,
    part: str | None,
) -> None:
    """Texts have 96 tokens; the models of the zoo are built for 64."""
    folder = tmp_path / "model"
    if name == "t5":
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "t5"}')
    else:
        saved(tiny(name, **changes), folder)
    if change:
        change(folder)
    config = make(tmp_path, target={"kind": "pretrained", "path": str(folder)})
    assert doctor.doctor(config) == (4 if part else 0)
    status, text = table(capsys)["target"]
    assert (status, part or str(folder)) == ("fail" if part else "ok", part or text) and str(folder) in text
    assert part is None or part in text


def test_texts_beyond_a_models_positions_are_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sequences of 96 tokens; of a model that cannot be run at all nothing more is said."""
    saved(tiny("llama"), tmp_path / "model")
    config = make(tmp_path, target={"kind": "pretrained", "path": str(tmp_path / "model")})
    assert doctor.doctor(config) == 0
    status, text = table(capsys)["positions"]
    assert status == "warn" and text.startswith("target is built for 64 positions, and data.sequence_tokens")
    (tmp_path / "model/config.json").write_text("{}")
    assert doctor.doctor(config) == 4
    assert "positions" not in table(capsys)


def test_models_to_be_trained_have_a_line_only_where_they_cannot_be_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.doctor(make(tmp_path)) == 0
    assert not {"target", "drafter"} & set(table(capsys))
    rope = {"rope_type": "dynamic", "factor": 2.0}
    drafter = MINIMAL["drafter"] | {"max_positions": 80, "rope_scaling": rope}
    assert doctor.doctor(make(tmp_path, drafter=drafter)) == 4
    status, text = table(capsys)["drafter"]
    assert status == "fail" and "over 80 tokens, and texts get 96 tokens long" in text
