"""The command line as a user meets it: exit codes and streams. Stages are stubs.

What a process is needed for runs in one: imports, signals, tracebacks, logs, the environment.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from typer.testing import CliRunner

from jobs.cli.main import app
from pipeline.config.schema import Config
from pipeline.errors import BadData, Incomplete, NotFinite
from pipeline.models.convert import convert
from pipeline.observe.logs import PACKAGES
from tests.helpers.clock import patience
from tests.helpers.configs import MINIMAL
from tests.helpers.paths import ROOT

STUBS = """
import sys, time, types

def run_pipeline(config, until):
    print("log line")
    {body}

module = types.ModuleType("jobs.stages.pipeline")
module.run_pipeline = run_pipeline
sys.modules["jobs.stages.pipeline"] = module
from jobs.cli.main import main
main()
"""


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a command sets for its process: a handler of SIGTERM, levels of loggers."""
    before, levels = (
        signal.getsignal(signal.SIGTERM),
        {name: logging.getLogger(name).level for name in PACKAGES},
    )
    monkeypatch.setattr("jobs._received", set())  # signals that earlier tests have sent to this process
    yield
    signal.signal(signal.SIGTERM, before)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def call(*arguments: str, stdin: bytes = b"") -> Result:
    """The command in this process."""
    return CliRunner().invoke(app, list(arguments), input=stdin, prog_name="budgetdraft")


def with_stubs(*args: str, body: str) -> list[str]:
    return [sys.executable, "-c", STUBS.format(body=body), *args]


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, **environment}
    return subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=patience(60)
    )


@pytest.fixture
def minimal(tmp_path: Path) -> str:
    path = tmp_path / "minimal.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return str(path)


ANSWERS = """
import sys
from jobs.cli.main import app
for arguments in (["--help"], ["run", "--help"], ["config", sys.argv[1]]):
    app(arguments, prog_name="budgetdraft", standalone_mode=False)
print(" ".join(sys.modules))
"""


def test_nothing_heavy_is_imported_for_help_and_config(minimal: str) -> None:
    """Which is what lets them answer at once."""
    heavy = {
        "torch",
        "transformers",
        "datasets",
        "mlflow",
        "ray",
        "deepspeed",
        "matplotlib",
        "numpy",
        "pandas",
    }
    done = run([sys.executable, "-c", ANSWERS, minimal])
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.splitlines()[-1].split())
    assert "typer" in imported and not heavy & imported


def test_help_documents_commands_and_exit_codes() -> None:
    text = run([sys.executable, "-m", "jobs", "--help"]).stdout
    names = ("run", "prepare", "teach", "train", "sweep", "report", "generate", "convert", "config", "doctor")
    assert all(f"\n  {name} " in text for name in names)
    assert all(f"\n    {code:<5}" in text for code in (0, 1, 2, 3, 4, 130, 143))


def test_config_prints_what_resolves(minimal: str) -> None:
    done = call("config", minimal, "train.steps=9", "--executor", "ray", "--storage", "/a b: c")
    assert done.exit_code == 0
    config = Config.model_validate(yaml.safe_load(done.stdout))
    assert (config.train.steps, config.run.executor, config.storage) == (9, "ray", "/a b: c")


@pytest.mark.parametrize(
    ("name", "until"),
    [("run", "report"), *((stage, stage) for stage in ("prepare", "teach", "train", "sweep", "report"))],
)
def test_stage_commands(minimal: str, name: str, until: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Config, str]] = []

    def run_pipeline(config: Config, until: str) -> str:
        asked.append((config, until))
        print("log line")
        return f"{config.storage}/{until}"

    monkeypatch.setattr("jobs.stages.pipeline.run_pipeline", run_pipeline)
    done = call(name, minimal, "train.steps=3", "--storage", "/tmp/x", "--executor", "ray")
    assert done.exit_code == 0, done.stderr
    ((config, last),) = asked
    assert (config.run.executor, config.storage, config.train.steps, last) == ("ray", "/tmp/x", 3, until)
    assert done.stdout.splitlines()[-1] == f"/tmp/x/{until}"


@pytest.mark.parametrize(
    ("error", "received", "code", "part"),
    [
        (BadData("books.jsonl is torn"), set(), 3, "bad data: books.jsonl is torn"),
        (Incomplete("3 cells failed"), set(), 4, "incomplete: 3 cells failed"),
        (NotFinite("step 7 is the first"), set(), 4, "incomplete: step 7 is the first"),
        # Ray turns what the signal raises during its calls into a plain interrupt.
        (KeyboardInterrupt(), {signal.SIGTERM}, 143, "terminated; the same command resumes"),
        (KeyboardInterrupt(), set(), 130, "interrupted; the same command resumes"),
    ],
)
def test_exit_codes(
    minimal: str,
    error: BaseException,
    received: set[int],
    code: int,
    part: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run_pipeline(config: Config, until: str) -> str:
        print("log line")
        raise error

    monkeypatch.setattr("jobs._received", received)
    monkeypatch.setattr("jobs.stages.pipeline.run_pipeline", run_pipeline)
    done = call("run", minimal)
    assert (done.exit_code, done.stderr, done.stdout) == (code, f"{part}\n", "log line\n")


def test_an_unexpected_error_shows_its_traceback(minimal: str) -> None:
    done = run(with_stubs("run", minimal, body="1 / 0"))
    assert (done.returncode, done.stdout) == (1, "log line\n")
    assert "Traceback" in done.stderr and "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(minimal: str, sent: signal.Signals, code: int) -> None:
    body = "print('ready', flush=True); time.sleep(600)"
    # A shell's background jobs ignore Ctrl-C, and so would what they start: `env` undoes that.
    undone = ["env", "--default-signal=INT", *with_stubs("run", minimal, body=body)]
    with subprocess.Popen(undone, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        while process.stdout.readline() != b"ready\n":
            assert process.poll() is None
        process.send_signal(sent)
        assert process.wait(timeout=patience(60)) == code
        assert b"the same command resumes" in process.stderr.read()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("run",), ["Missing argument 'CONFIG'"]),
        (("fly",), ["No such command 'fly'"]),
        (("run", "CONFIG", "--executor", "slurm"), ["slurm", "inline"]),
        (("run", "CONFIG", "train.steps=-1"), ["train.steps = -1", "at least 0"]),
        (("run", "CONFIG", "train.stepz=1"), ["did you mean steps?"]),
        (("config", "/nowhere/minimal.yaml"), ["there is no file /nowhere/minimal.yaml"]),
        (("generate", "CONFIG", "--budget", "17"), ["--budget 17", "divisible by 8"]),
        (("generate", "CONFIG", "--gamma", "0"), ["--gamma"]),
        (("generate", "CONFIG", "--prompt-file", "/nowhere"), ["/nowhere"]),
    ],
)
def test_wrong_usage(minimal: str, arguments: tuple[str, ...], parts: list[str]) -> None:
    done = call(*(minimal if argument == "CONFIG" else argument for argument in arguments))
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit)
    assert all(part in done.stderr for part in parts), done.stderr


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `generate` was called with, without its config."""
    given: dict[str, Any] = {}
    monkeypatch.setattr("jobs.commands.generate.generate", lambda config, **settings: given.update(settings))
    return given


def test_generate_passes_settings(minimal: str, tmp_path: Path, settings: dict[str, Any]) -> None:
    (tmp_path / "prompt.txt").write_text("Once upon a time", encoding="utf-8")
    given = ["--prompt-file", str(tmp_path / "prompt.txt"), "--drafter", "full_only", "--budget", "full"]
    given += ["--policy", "snapkv", "--gamma", "7", "--temperature", "0.5", "--max-new-tokens", "9"]
    assert call("generate", minimal, *given, "--threshold", "0.25", "--seed", "3").exit_code == 0
    assert settings == {
        "prompt": "Once upon a time",
        "drafter": "full_only",
        "policy": "snapkv",
        "budget": "full",
        "gamma": 7,
        "threshold": 0.25,
        "temperature": 0.5,
        "max_new_tokens": 9,
        "seed": 3,
        "rule": "exact",
    }


def test_generate_by_a_lossy_rule_is_greedy(minimal: str, settings: dict[str, Any]) -> None:
    done = call("generate", minimal, "--rule", "dropmatch", "--temperature", "0.5", stdin=b"Once")
    assert done.exit_code == 2 and "--rule dropmatch is for greedy decoding" in done.stderr and not settings
    assert call("generate", minimal, "--rule", "dropmatch", stdin=b"Once").exit_code == 0
    assert settings["rule"] == "dropmatch"


def test_generate_reads_standard_input_and_defaults_from_the_config(
    minimal: str, settings: dict[str, Any]
) -> None:
    assert call("generate", minimal, stdin="Grüße".encode()).exit_code == 0
    assert settings["prompt"] == "Grüße"
    sweep = MINIMAL["sweep"]
    assert settings["budget"] == sweep["budgets"][0] and settings["gamma"] == sweep["gammas"][0]
    assert settings["max_new_tokens"] == MINIMAL["data"]["max_new_tokens"]


@pytest.mark.parametrize(("stdin", "part"), [(b" \n", "is empty"), (b"\xff\xfe", "is not UTF-8")])
def test_generate_refuses_a_bad_prompt(
    minimal: str, stdin: bytes, part: str, settings: dict[str, Any]
) -> None:
    done = call("generate", minimal, stdin=stdin)
    assert done.exit_code == 3 and part in done.stderr and not settings


def pickled_model(folder: Path, shards: int) -> PreTrainedModel:
    """A tiny random Llama saved as older tools do: pickled, in shards, with a buffer that is no weight."""
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    state = dict(model.state_dict()) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    folder.mkdir()
    config.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        names = [f"pytorch_model-{k + 1:05d}-of-{shards:05d}.bin" for k in range(shards)]
        weight_map = {key: names[k % shards] for k, key in enumerate(state)}
        for name in names:
            torch.save({key: state[key] for key in state if weight_map[key] == name}, folder / name)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return model


@pytest.mark.parametrize("shards", [1, 2])
def test_convert_gives_the_same_weights_as_safetensors(tmp_path: Path, shards: int) -> None:
    source, output = tmp_path / "bin", tmp_path / "safe"
    model = pickled_model(source, shards)
    done = call("convert", str(source), str(output))
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(output)
    assert sorted(file.name for file in output.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json",
    ]  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(output, use_safetensors=True).state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())
    assert json.loads((output / "tokenizer_config.json").read_text()) == {"bos_token": "<s>"}


def test_convert_says_what_is_wrong(tmp_path: Path) -> None:
    done = call("convert", "my-org/my-model", str(tmp_path / "safe"))
    assert done.exit_code == 3
    assert "my-org/my-model is neither a folder nor" in done.stderr and "hf download" in done.stderr
    assert done.stdout == ""


def replace_weights(folder: Path, content: object) -> None:
    torch.save(content, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (lambda folder: (folder / "pytorch_model.bin").unlink(), "holds no pytorch_model.bin"),
        (
            lambda folder: (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04 torn"),
            "not a whole checkpoint",
        ),
        (
            lambda folder: replace_weights(folder, {"model.norm.weight": torch.ones(16)}),
            "lacks 20 weights",
        ),
        (lambda folder: replace_weights(folder, {"model.norm.weight": torch.ones(9)}), "have other sizes"),
        (lambda folder: replace_weights(folder, {"weight": Path("a")}), "not a whole checkpoint of tensors"),
        (lambda folder: (folder / "config.json").unlink(), "config.json cannot be used"),
        (lambda folder: (folder.parent / "safe").mkdir(), "exists; name a new folder"),
    ],
)
def test_convert_refuses_what_it_cannot_use(
    tmp_path: Path, spoil: Callable[[Path], object], part: str
) -> None:
    pickled_model(tmp_path / "bin", 1)
    spoil(tmp_path / "bin")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BadData) as caught:
        convert(tmp_path / "bin", tmp_path / "safe")
    assert part in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_log_lines_name_their_stage(minimal: str) -> None:
    body = (
        "import logging; logging.getLogger('jobs.stages.train').info('step 10'); "
        "logging.getLogger('other.lib').info('chatter'); logging.getLogger('other.lib').warning('careful')"
    )
    lines = run(with_stubs("run", minimal, body=body)).stderr.splitlines()
    texts = [line.split(maxsplit=1)[1] for line in lines if line[2:3] == ":"]
    assert [text.split() for text in texts] == [
        ["train", "step", "10"],
        ["other.lib", "warning:", "careful"],
    ]


def test_environment_is_set_before_libraries_and_the_users_stands() -> None:
    names = ("RAY_USAGE_STATS_ENABLED", "MLFLOW_DISABLE_TELEMETRY")
    taken = "os.environ.pop('MLFLOW_DISABLE_TELEMETRY', None)"
    code = f"import os; {taken}; import jobs; print(*map(os.environ.get, {names}))"
    done = run([sys.executable, "-c", code], RAY_USAGE_STATS_ENABLED="1")
    assert done.stdout.split() == ["1", "true"]
