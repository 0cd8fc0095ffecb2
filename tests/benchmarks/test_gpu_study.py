"""The study of conf/gpu.yaml at a toy size: on a bare machine, in pieces, packed, unpacked, told."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks.gpu.decoding import missing_rows
from benchmarks.gpu_study import __main__ as gpu_study
from benchmarks.gpu_study import page as gpu_page
from benchmarks.gpu_study import travel
from benchmarks.gpu_study.travel import light_copy
from benchmarks.rows import row, write
from jobs.executors.inline import InlineExecutor
from jobs.stages.pipeline import run_pipeline
from pipeline.config.files import load_config
from pipeline.config.models import ScratchModel
from pipeline.config.schema import Config
from pipeline.data.prepare import settings
from pipeline.models.shape import shapes_of
from pipeline.results.summary import Summary
from pipeline.store.files import read_all
from pipeline.store.rows import PromptRow
from pipeline.train.checkpoints import complete
from tests.helpers.clock import patience, wait_for
from tests.helpers.documents import made_books
from tests.helpers.paths import ROOT
from tests.helpers.toys import artifact

BLOCKED = ("ray", "deepspeed", "mlflow", "datasets", "pyarrow", "pandas")
SMALL = {"hidden": 32, "heads": 2, "kv_heads": 2, "intermediate": 64, "max_positions": 288}
PRETRAIN = {"batch_sequences": 4, "learning_rate": 0.01, "warmup_steps": 5, "compile": False, "patience": 2}


def toy(data: Path) -> dict[str, Any]:
    """What a toy changes of conf/gpu.yaml: sizes, and the device."""
    lengths = [("4K", 48), ("8K", 96), ("16K", 192)]
    budgets = {16: 0.4, 32: 0.6}
    losses = {"full_loss": "total_variation", "sparse_loss": "total_variation"}
    story = {"kind": "lwm", "name": "narrativeqa-sample", "path": "./narrativeqa", "use": ["train", "test"]}
    return {
        "extends": str(ROOT / "conf" / "gpu.yaml"),
        "data": {
            "root": str(data),
            "sources": [
                {"kind": "pg19", "name": "pg19-sample", "path": "./pg19"},
                {"kind": "longbench", "name": "qmsum-sample", "task": "qmsum", "path": "./longbench"},
                {**story, "prompt_split": "train", "rows": [0], "template": "{book}"},
            ],
            "tokenizer": {"kind": "bpe", "vocab_size": 400},
            "sequence_tokens": 256,
            "contexts": [{"name": name, "tokens": tokens} for name, tokens in lengths],
            "max_new_tokens": 24, "prompts": 4, "validation_prompts": 2,
        },
        "target": {**SMALL, "layers": 3, "pretrain": {**PRETRAIN, "steps": 60}},
        "drafter": {**SMALL, "layers": 1, "pretrain": {**PRETRAIN, "steps": 20}},
        "labels": {"top_k": 8, "sequences_per_shard": 16},
        "train": {
            "steps": 10, "batch_sequences": 2, "micro_batch_sequences": 2, "window_tokens": 16, "windows": 2,
            "min_prefix_tokens": 32, "warmup_steps": 2, "checkpoint_every": 20, "validate_every": 10,
            "validation_budgets": [16, "full"],
            "variants": [
                {"name": "untrained", "steps": 0},
                {"name": "full_only", "sparse_weight": 0, "full_loss": "total_variation"},
                {"name": "single_budget", "budgets": {32: 1}, "num_views": 1, **losses},
                {"name": "multi_view", "budgets": budgets, **losses},
            ],
        },
        "decode": {"compile": "none"},
        "sweep": {
            "budgets": [16, 32, "full"], "gammas": [1, 2, 4],
            "measure": {"budgets": [16], "gammas": [2], "prompts": 1, "repeats": 1},
        },
        "report": {"least_documents": 2, "bootstrap_samples": 100},
        "run": {"device": "cpu"},
    }  # fmt: skip


class Here:
    """The machine that the study is prepared on: data, config, and the light copy of what was prepared."""

    def __init__(self, folder: Path) -> None:
        made_books(folder / "data")
        self.folder, self.config = folder, folder / "toy.yaml"
        self.config.write_text(yaml.safe_dump(toy(folder / "data")))
        self.prepared = run_pipeline(self.load(folder / "here"), "prepare")
        self.light = folder / "light"
        assert gpu_study.main(["carry", str(self.prepared), str(self.light)]) == 0

    def load(self, storage: Path, *overrides: str) -> Config:
        return load_config(self.config, [*overrides, f"storage={storage}"])


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Here:
    return Here(tmp_path_factory.mktemp("gpu"))


@pytest.fixture(scope="module")
def uninterrupted(here: Here) -> Path:
    """The storage of a run where the data are, in one piece."""
    run_pipeline(here.load(here.folder / "here"))
    return here.folder / "here"


class There:
    """A machine with a copy of the code that is no checkout, without the data and without most libraries."""

    def __init__(self, here: Here, folder: Path) -> None:
        self.here, self.code, self.storage, self.output = (
            here,
            folder / "code",
            folder / "runs",
            folder / "out",
        )
        for package in ("jobs", "pipeline", "kernels", "benchmarks", "conf"):
            shutil.copytree(ROOT / package, self.code / package)
        (folder / "bare").mkdir()
        block = "\n".join(f"sys.modules[{name!r}] = None" for name in BLOCKED)
        (folder / "bare" / "sitecustomize.py").write_text(f"import sys\n{block}\n")
        self.environment = {**os.environ, "PYTHONPATH": str(folder / "bare"), "BUDGETDRAFT_COMMIT": "abc"}

    def start(self) -> subprocess.Popen[str]:
        command = [
            sys.executable, "-m", "benchmarks.gpu_study", "run", str(self.here.config),
            f"data.prepared={self.here.light}", "data.root=/nowhere", "--storage", str(self.storage),
            "--output", str(self.output), "--minutes", "5",
        ]  # fmt: skip
        return subprocess.Popen(
            command, cwd=self.code, env=self.environment, stderr=subprocess.PIPE, text=True
        )


@pytest.fixture(scope="module")
def there(here: Here, tmp_path_factory: pytest.TempPathFactory) -> There:
    """The study done there: stopped while the target is trained, then gone on with."""
    there = There(here, tmp_path_factory.mktemp("there"))
    first = there.start()
    wait_for(
        lambda: (
            list(there.storage.glob("pretrain-target-*/metrics.jsonl"))
            and complete(artifact(there.storage, "pretrain-target"))
        ),
        "the target was in training", 120, first, lambda: first.communicate()[1][-3000:],
    )  # fmt: skip
    first.send_signal(signal.SIGTERM)
    told = first.communicate(timeout=patience(120))[1]
    assert first.returncode == 143, told[-3000:]
    folder = artifact(there.storage, "pretrain-target")
    assert complete(folder) and not (folder / "model").exists(), "stopped between two steps, and saved"
    second = there.start()
    told = second.communicate(timeout=patience(300))[1]
    assert second.returncode == 0, told[-3000:]
    assert "resume" in told or "train target" in told
    return there


@pytest.mark.long
def test_pieces_elsewhere_give_what_one_piece_gives_here(uninterrupted: Path, there: There) -> None:
    """On a bare machine, from the light copy: the same fingerprints, weights and rows."""
    names = {path.parent.name for path in uninterrupted.glob("*/manifest.json")}
    stages = {name.rpartition("-")[0] for name in names}
    assert {"teach", "sample", "drafter-multi_view", "drafter-untrained", "sweep", "report"} <= stages
    ours = {path.parent.name for path in there.storage.glob("*/manifest.json")}
    # A report is named by its rows, of which some are times.
    assert names - ours == {artifact(uninterrupted, stage).name for stage in ("prepare", "report")}
    for stage in stages - {"prepare", "teach", "sample", "sweep", "report"}:
        a, b = (
            load_file(artifact(s, stage) / "model/model.safetensors") for s in (uninterrupted, there.storage)
        )
        assert all(torch.equal(a[name], b[name]) for name in a) and a.keys() == b.keys(), stage
    assert counted(uninterrupted) == counted(there.storage)
    manifest = json.loads((artifact(there.storage, "sweep") / "manifest.json").read_text())
    assert manifest["provenance"]["git_sha"] == "abc"


def counted(storage: Path) -> list[PromptRow]:
    """What does not depend on a clock."""
    rows = read_all(artifact(storage, "sweep") / "rows", PromptRow)
    assert {row.mode for row in rows} == {"replay", "estimate", "measure"}
    assert {row.cell.control for row in rows} == {None, "other_prompt"}
    return [row for row in rows if row.mode != "measure"]


@pytest.mark.long
def test_what_comes_back_is_small_and_reports_elsewhere(
    here: Here, uninterrupted: Path, there: There, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = sorted(there.output.iterdir())
    assert [part.name for part in parts] == [f"study.tar.gz.{number:02d}" for number in range(len(parts))]
    assert gpu_study.main(["unpack", str(there.output), str(tmp_path / "back")]) == 0
    back = tmp_path / "back"
    assert not list(back.glob("teach-*/labels")) and not list(back.glob("*/checkpoints"))
    for name in ("pretrain-target", "drafter-multi_view"):
        small = load_file(artifact(back, name) / "model/model.safetensors")
        whole = load_file(artifact(there.storage, name) / "model/model.safetensors")
        assert all(torch.equal(small[key], whole[key].bfloat16()) for key in whole), name
        assert AutoModelForCausalLM.from_pretrained(artifact(back, name) / "model").dtype == torch.bfloat16

    def refuse(*arguments: object) -> None:
        raise AssertionError("a report of what came back asks for no work")

    for verb in ("map", "map_actors", "train"):
        monkeypatch.setattr(InlineExecutor, verb, refuse)
    shutil.rmtree(artifact(back, "report"))
    made = run_pipeline(here.load(back, f"data.prepared={here.prepared}"))
    theirs = artifact(uninterrupted, "report") / "summary.json"
    ours, whole = (Summary.model_validate_json(file.read_text()) for file in (made, theirs))
    assert ours.headline and ours.headline == whole.headline and ours.controls == whole.controls
    assert all(stage.cached for stage in ours.stages[:-1]) and not ours.stages[-1].cached


@pytest.mark.long
def test_the_page_says_what_was_reached_and_what_not(here: Here, uninterrupted: Path, tmp_path: Path) -> None:
    best = row(
        "GPU speculation ÷ our graphed AR, 4K, γ = 8",
        [2.5],
        6.55,
        synthetic=True,
        note="…, best γ",
        device="x",
    )
    write([best, *missing_rows()], tmp_path / "bench.json")
    (tmp_path / "notes.md").write_text("- a rate of 0.01 diverged")
    command = [
        "page",
        str(here.config),
        "--storage",
        str(uninterrupted),
        "--bench",
        str(tmp_path / "bench.json"),
    ]
    assert (
        gpu_study.main([*command, "--notes", str(tmp_path / "notes.md"), "--output", str(tmp_path / "page")])
        == 0
    )
    page = (tmp_path / "page" / "README.md").read_text()
    told = Summary.model_validate_json((tmp_path / "page" / "summary.json").read_text())
    lows = {
        f"multi_view − full_only, B = 16, {gpu_page.place(g.cell)}: lower bound": g.value.low
        for g in told.headline
        if (g.cell.drafter, g.baseline, g.cell.budget, g.cell.control, g.cell.gamma, g.prompts)
        == ("multi_view", "full_only", 16, None, 2, "all")
    }
    assert lows and lows == {c.row: c.value for c in told.checks if "full_only" in c.row}
    assert all(c.met == (c.value > 0) for c in told.checks if "full_only" in c.row)
    speeds = [check for check in told.checks if check.row.startswith("decode speed ÷ our own AR")]
    assert {check.row.split(", ")[1] for check in speeds} == {"4K", "8K", "16K"} and len(speeds) == 6
    assert "a rate of 0.01 diverged" in page and "| 4K | 0.68 | 50 | 6.55 | 2.50 [2.50, 2.50] |" in page
    assert all(line.count("|") == line.replace("\\|", "").count("|") for line in page.splitlines())
    assert (tmp_path / "page" / "acceptance_by_budget_chunk_topk.png").stat().st_size > 1000


def test_minutes_that_are_over_end_a_piece(here: Here, tmp_path: Path) -> None:
    command = ["run", str(here.config), f"data.prepared={here.light}", "--minutes", "0.0001"]
    assert (
        gpu_study.main([*command, "--storage", str(tmp_path / "a"), "--output", str(tmp_path / "b")]) == 143
    )
    assert (tmp_path / "b" / "study.tar.gz.00").exists()


def test_what_does_not_fit_stays_behind_or_is_refused(
    here: Here, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = here.load(uninterrupted)
    whole = sum(part.stat().st_size for part in travel.pack(config, uninterrupted, tmp_path))
    monkeypatch.setattr(travel, "MOST_BYTES", whole - 1000)
    monkeypatch.setattr(travel, "PART_BYTES", whole // 3)
    parts = travel.pack(config, uninterrupted, tmp_path)
    travel.unpack(tmp_path, tmp_path / "back")
    assert len(parts) == 3 and not (artifact(tmp_path / "back", "pretrain-target") / "model").exists()
    assert (artifact(tmp_path / "back", "drafter-multi_view") / "model").exists()
    parts[0].rename(tmp_path / "elsewhere")
    assert gpu_study.main(["unpack", str(tmp_path), str(tmp_path / "again")]) == 3
    monkeypatch.setattr(travel, "MOST_BYTES", 1000)
    with pytest.raises(travel.BadData, match="even without the target"):
        travel.pack(config, uninterrupted, tmp_path)


def test_prepared_data_of_other_settings_or_damaged_are_refused(here: Here, tmp_path: Path) -> None:
    given = f"data.prepared={here.light}"
    with pytest.raises(travel.BadData, match=r"other settings of data\.max_new_tokens, seed"):
        run_pipeline(here.load(tmp_path, given, "data.max_new_tokens=20", "seed=1"), "prepare")
    light_copy(here.light, tmp_path / "copy")
    torn = tmp_path / "copy" / "tokenizer" / "tokenizer.json"
    torn.write_text(torn.read_text()[:-5])
    for folder, complaint in (
        (tmp_path / "copy", "tokenizer/tokenizer.json"),
        (tmp_path / "none", "manifest.json"),
    ):
        with pytest.raises(travel.BadData, match=complaint):
            run_pipeline(here.load(tmp_path, f"data.prepared={folder}"), "prepare")


def test_the_study_is_the_one_that_was_planned() -> None:
    """What it promises: models, lengths, equal steps, temperatures; and the size of all that comes back."""
    config = load_config(ROOT / "conf" / "gpu.yaml", [])
    assert isinstance(config.target, ScratchModel) and isinstance(config.drafter, ScratchModel)
    shapes = shapes_of(config, config.data.tokenizer.vocab_size)
    assert shapes["target"].parameters <= 28e6 and config.target.layers >= 16 and config.drafter.layers <= 2
    longest = max(context.tokens for context in config.data.contexts) + config.data.max_new_tokens
    assert longest == config.data.sequence_tokens == config.target.max_positions == 16_384
    steps = {variant.name: variant.steps for variant in config.train.variants}
    assert steps == {"untrained": 0, "full_only": None, "single_budget": None, "multi_view": None}
    assert set(config.train.variants[-1].budgets) == {256, 512, 1024, 2048} <= set(config.sweep.budgets)
    assert config.sweep.temperatures == (1.0, 0.0) and config.decode.compile == "cudagraphs"
    small = load_config(ROOT / "conf" / "gpu-small.yaml", [])
    assert settings(small) == settings(config), "one preparation serves both"
    assert (
        small.train.steps < config.train.steps
        and small.target.model_copy(update={"pretrain": config.target.pretrain}) == config.target
    )
    weights = 2 * (shapes["target"].parameters + len(steps) * shapes["drafter"].parameters)
    assert weights < travel.MOST_BYTES, "in bfloat16, before the archive is compressed"
