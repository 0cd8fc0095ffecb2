"""The command line as a user meets it: real processes, exit codes, streams. Stages are stubs."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pipeline.config.schema import Config
from pipeline.errors import BadData
from pipeline.models.convert import convert_bin
from tests.helpers.configs import MINIMAL
from tests.helpers.paths import ROOT

STUBS = """
import sys, time, types
from pipeline.errors import BadData, Incomplete, NotFinite

def run_pipeline(config, until):
    print("log line")
    print(config.run.executor, config.storage, config.train.steps, until, file=sys.stderr)
    {body}
    return config.storage + "/" + until

def generate(config, **settings):
    print(sorted(settings.items()))

for name, function in (("stages.pipeline", run_pipeline), ("commands.generate", generate)):
    module = types.ModuleType("jobs." + name)
    setattr(module, function.__name__, function)
    sys.modules["jobs." + name] = module
from jobs.cli.main import main
main()
"""


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "jobs", *args]


def with_stubs(*args: str, body: str = "pass") -> list[str]:
    return [sys.executable, "-c", STUBS.format(body=body), *args]


def run(call: list[str], stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
    done = subprocess.run(call, cwd=ROOT, input=stdin, capture_output=True, timeout=60)
    return subprocess.CompletedProcess(call, done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture
def minimal(tmp_path: Path) -> str:
    path = tmp_path / "minimal.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return str(path)


@pytest.mark.parametrize("arguments", [("--help",), ("run", "--help"), ("config", "CONFIG")])
def test_answers_fast(minimal: str, arguments: tuple[str, ...]) -> None:
    call = command(*(minimal if argument == "CONFIG" else argument for argument in arguments))
    assert run(call).returncode == 0  # warms the disk cache
    began = time.perf_counter()
    assert run(call).returncode == 0
    # The promise is one second on an idle machine; the slack is for a busy one.
    assert time.perf_counter() - began < 3


def test_nothing_heavy_is_imported() -> None:
    heavy = {"torch", "transformers", "datasets", "mlflow", "ray", "deepspeed", "matplotlib", "numpy"}
    code = "import sys, jobs.cli; print(' '.join(sys.modules))"
    assert not heavy & set(run([sys.executable, "-c", code]).stdout.split())


def test_help_documents_commands_and_exit_codes() -> None:
    text = run(command("--help")).stdout
    names = ("run", "prepare", "teach", "train", "sweep", "report", "generate", "convert", "config", "doctor")
    assert all(f"\n  {name} " in text for name in names)
    assert all(f"\n    {code:<5}" in text for code in (0, 1, 2, 3, 4, 130, 143))


def test_config_prints_what_resolves(minimal: str) -> None:
    done = run(command("config", minimal, "train.steps=9", "--executor", "ray", "--storage", "/a b: c"))
    assert done.returncode == 0
    config = Config.model_validate(yaml.safe_load(done.stdout))
    assert (config.train.steps, config.run.executor, config.storage) == (9, "ray", "/a b: c")


@pytest.mark.parametrize(
    ("name", "until"),
    [("run", "report"), *((stage, stage) for stage in ("prepare", "teach", "train", "sweep", "report"))],
)
def test_stage_commands(minimal: str, name: str, until: str) -> None:
    done = run(with_stubs(name, minimal, "train.steps=3", "--storage", "/tmp/x", "--executor", "ray"))
    assert done.returncode == 0, done.stderr
    assert f"ray /tmp/x 3 {until}" in done.stderr
    assert done.stdout.splitlines()[-1] == f"/tmp/x/{until}"


@pytest.mark.parametrize(
    ("body", "code", "parts"),
    [
        ("raise BadData('books.jsonl is torn')", 3, ["bad data: books.jsonl is torn"]),
        ("raise Incomplete('3 cells failed')", 4, ["incomplete: 3 cells failed"]),
        ("raise NotFinite('step 7 is the first')", 4, ["incomplete: step 7 is the first"]),
        (
            "import os, signal\n    try: os.kill(os.getpid(), signal.SIGTERM)\n"
            "    except KeyboardInterrupt: raise KeyboardInterrupt from None",
            143,
            ["terminated; the same command resumes"],
        ),
        ("raise KeyboardInterrupt", 130, ["interrupted; the same command resumes"]),
        ("1 / 0", 1, ["Traceback", "ZeroDivisionError"]),
    ],
)
def test_exit_codes(minimal: str, body: str, code: int, parts: list[str]) -> None:
    done = run(with_stubs("run", minimal, body=body))
    assert done.returncode == code
    assert all(part in done.stderr for part in parts), done.stderr
    assert ("Traceback" in done.stderr) == (code == 1)
    assert done.stdout == "log line\n"


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(minimal: str, sent: signal.Signals, code: int) -> None:
    body = "print('ready', flush=True); time.sleep(30)"
    # A shell's background jobs ignore Ctrl-C, and so would what they start: `env` undoes that.
    undone = ["env", "--default-signal=INT", *with_stubs("run", minimal, body=body)]
    with subprocess.Popen(undone, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        while process.stdout.readline() != b"ready\n":
            assert process.poll() is None
        process.send_signal(sent)
        assert process.wait(timeout=20) == code
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
    done = run(command(*(minimal if argument == "CONFIG" else argument for argument in arguments)))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert all(part in done.stderr for part in parts), done.stderr


def test_generate_passes_settings(minimal: str, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Once upon a time", encoding="utf-8")
    given = ["--prompt-file", str(tmp_path / "prompt.txt"), "--drafter", "full_only", "--budget", "full"]
    given += ["--policy", "snapkv", "--gamma", "7", "--temperature", "0.5", "--max-new-tokens", "9"]
    given += ["--threshold", "0.25"]
    expected: dict[str, object] = {
        "prompt": "Once upon a time",
        "drafter": "full_only",
        "policy": "snapkv",
        "budget": "full",
        "gamma": 7,
        "threshold": 0.25,
        "temperature": 0.5,
        "max_new_tokens": 9,
        "seed": 3,
    }
    assert run(with_stubs("generate", minimal, *given, "--seed", "3")).stdout.strip() == str(
        sorted(expected.items())
    )


def test_generate_reads_standard_input_and_defaults_from_the_config(minimal: str) -> None:
    done = run(with_stubs("generate", minimal), stdin="Grüße".encode())
    settings = dict(ast.literal_eval(done.stdout))
    assert settings["prompt"] == "Grüße"
    sweep = MINIMAL["sweep"]
    assert settings["budget"] == sweep["budgets"][0] and settings["gamma"] == sweep["gammas"][0]
    assert settings["max_new_tokens"] == MINIMAL["data"]["max_new_tokens"]


@pytest.mark.parametrize(("stdin", "part"), [(b" \n", "is empty"), (b"\xff\xfe", "is not UTF-8")])
def test_generate_refuses_a_bad_prompt(minimal: str, stdin: bytes, part: str) -> None:
    done = run(with_stubs("generate", minimal), stdin=stdin)
    assert done.returncode == 3 and part in done.stderr


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
    done = run(command("convert", str(source), str(output)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(output)
    assert sorted(file.name for file in output.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json",
    ]  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(output, use_safetensors=True).state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())
    assert json.loads((output / "tokenizer_config.json").read_text()) == {"bos_token": "<s>"}


def test_convert_says_what_is_wrong(tmp_path: Path) -> None:
    done = run(command("convert", "my-org/my-model", str(tmp_path / "safe")))
    assert done.returncode == 3
    assert "my-org/my-model is not a folder" in done.stderr and "hf download" in done.stderr
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
            "missing ['model.embed",
        ),
        (lambda folder: replace_weights(folder, {"model.norm.weight": torch.ones(9)}), "size mismatch"),
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
        convert_bin(tmp_path / "bin", tmp_path / "safe")
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
    code = f"import jobs, os; print(*map(os.environ.get, {names}))"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY", "MLFLOW"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment | {"RAY_USAGE_STATS_ENABLED": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["1", "true"]
