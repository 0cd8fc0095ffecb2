"""What `budgetdraft plan` says, against what then happens."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.plan import report as planning
from jobs.plan.amounts import on_disk
from jobs.plan.facts import known
from jobs.plan.memory import memory
from jobs.plan.report import plan
from jobs.stages.pipeline import run_pipeline
from pipeline.config.schema import Config
from pipeline.decode.runner import Runner, Runners
from pipeline.errors import BadData
from pipeline.hardware import Device
from pipeline.plan.sweep_memory import measure_memory
from pipeline.store.files import read_all
from pipeline.store.rows import PromptRow
from pipeline.sweep.counts import count_sweep
from tests.helpers.configs import MINIMAL, SCRATCH
from tests.helpers.documents import story
from tests.helpers.paths import ROOT

# Started by a small process: the count of a child begins at what its parent held, here all of pytest.
PEAK_OF = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[2:])
with open(sys.argv[1], "w") as file:
    file.write(str(1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(done.returncode)
"""
GPU = Device("cuda", 0)
CONTEXTS = [{"name": "64", "tokens": 64}, {"name": "96", "tokens": 96}]


def planned_config(
    folder: Path, storage: Path, change: Callable[[dict[str, Any]], object] | None = None
) -> Config:
    """Both modes over a few texts; `change` edits the values."""
    values = copy.deepcopy(MINIMAL) | {"storage": str(storage)}
    source = {"kind": "text", "name": "tales", "files": ["*.txt"], "validation_fraction": 0.1}
    values["data"] |= {
        "root": str(folder),
        "sources": [{**source, "test_fraction": 0.3}],
        "max_sequences": 40,
    }
    timed = {"drafters": ["multi_view"], "budgets": [16], "prompts": 2, "repeats": 1, "predict": False}
    values["sweep"] |= {"mode": "both", "measure": timed}
    values["labels"] = {"top_k": 3}
    if change:
        change(values)
    return Config.model_validate(values)


def test_a_run_makes_what_was_planned(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(values: dict[str, Any]) -> None:
        values["data"] |= {"max_sequences": 10_000, "contexts": CONTEXTS}
        values["data"] |= {"prompts": 12, "prompts_per_document": 1}  # more than there are documents
        values["train"]["variants"].append({"name": "untrained", "steps": 0})
        values["train"]["checkpoint_every"] = 1
        values["decode"] = {"draft_length": "adaptive"}
        values["sweep"] |= {"baselines": ["self_speculation", "prompt_lookup"], "max_gammas": {"96": 2}}
        values["sweep"] |= {"thresholds": [0.0, 0.4], "temperatures": [0.0, 0.7], "seeds": [0, 1]}
        values["sweep"]["measure"] |= {"temperatures": [0.7], "prompts_together": 2, "repeats": 2}

    def planned() -> dict[str, dict[str, Any]]:
        plan(config, as_json=True, memory_gb=None, tflops=1.0)
        return {amount["name"]: amount for amount in json.loads(capsys.readouterr().out)["amounts"]}

    config = planned_config(corpus, tmp_path, change)
    guessed = planned()
    assert not list(tmp_path.iterdir())
    assert guessed["labelled sequences"]["how"].startswith("estimate: file sizes")
    assert guessed["prompts tales-96"]["how"].startswith("estimate: test documents")
    run_pipeline(config, until="prepare")
    exact = planned()
    assert exact["labelled sequences"]["how"] == exact["labels on disk"]["how"] == "exact"
    sequences = exact["labelled sequences"]["value"]
    # Of 30 files a few more or less fall to training than their share.
    assert guessed["labelled sequences"]["value"] == pytest.approx(sequences, rel=0.25)
    prompts = [exact[f"prompts tales-{context['name']}"]["value"] for context in CONTEXTS]
    assert [guessed[f"prompts tales-{c['name']}"]["value"] for c in CONTEXTS] == pytest.approx(
        prompts, rel=0.2
    )
    assert 2 < max(prompts) < 12

    cached: list[int] = []
    get = Runners.get

    def watched(runners: Runners, *arguments: Any) -> Runner:
        runner = get(runners, *arguments)
        caches = [held.cache for held in runners.held.values()]
        cached.append(sum(part.nbytes for cache in caches for part in [*cache.keys, *cache.values]))
        return runner

    monkeypatch.setattr(Runners, "get", watched)
    monkeypatch.setattr("jobs.stages.train.CHECKPOINTS", "absent")  # they stay to be weighed
    run_pipeline(config, until="sweep")

    def size(pattern: str) -> int:
        return sum(file.stat().st_size for file in tmp_path.glob(pattern))

    labels = list(tmp_path.glob("teach-*/labels/*.npy"))
    headers = 128 * len(labels)
    assert size("teach-*/labels/*.npy") == exact["labels on disk"]["value"] + headers
    for name, stages in (("scratch target", "pretrain-target"), ("drafters", "drafter")):
        written = size(f"{stages}-*/model/*.safetensors") + size(f"{stages}-*/checkpoints/*/*.safetensors")
        assert exact[f"{name} on disk"]["value"] == pytest.approx(written, rel=0.2)

    (swept,) = tmp_path.glob("sweep-*")
    rows = read_all(swept / "rows", PromptRow)
    timed = [row for row in rows if row.mode == "measure"]
    assert len(timed) == exact["rows measured"]["value"] > 0
    assert len({row.cell for row in rows}) == exact["cells"]["value"]
    assert len(rows) - len(timed) == exact["rows of replay"]["value"]
    assert guessed["rows measured"]["value"] == pytest.approx(len(timed), rel=0.2)
    assert guessed["rows of replay"]["value"] == pytest.approx(len(rows) - len(timed), rel=0.2)
    plain = {
        (row.cell.drafter, row.batch, row.cell.temperature, row.cell.seed): row.timing.ar_decode_s
        for row in timed
    }
    ours = [len(row.timing.decode_s) / row.timing.prompts_together for row in timed]
    runs = sum(ours) + sum(map(len, plain.values()))
    assert runs == pytest.approx(exact["timed runs"]["value"])
    assert guessed["timed runs"]["value"] == pytest.approx(runs, rel=0.2)

    shapes, facts = known(config)
    target, drafter = shapes["target"], shapes["drafter"]
    views = target.kv_bytes(2 * 2 * 16 + 3 * 96) + drafter.kv_bytes(2 * 16)  # of two policies, full; of one
    assert measure_memory(config, shapes, facts.prompts, GPU).kv == max(cached) + views


@pytest.mark.slow
def test_what_predictions_add_was_planned(corpus: Path, tmp_path: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        values["sweep"] |= {"baselines": ["self_speculation", "prompt_lookup"], "gammas": list(range(1, 9))}
        values["sweep"] |= {"temperatures": [0.0, 0.7], "seeds": [0]}
        values["sweep"]["measure"] |= {"predict": True}

    config = planned_config(corpus, tmp_path, change)
    planned = count_sweep(config, known(config)[1].prompts)
    run_pipeline(config, until="sweep")
    (swept,) = tmp_path.glob("sweep-*")
    measured = [row for row in read_all(swept / "rows", PromptRow) if row.mode == "measure"]
    again = [read_all(swept / folder, PromptRow) for folder in ("run_off", "rechecked")]
    named = 2 * 8 * (1 + 2 + 1) * 2  # prompts × γ × views × texts
    assert named < len(measured) <= planned.measured <= 1.2 * len(measured)
    assert [len(rows) for rows in again] == [2 * 3] * 2 and planned.rechecked == 2 * 2 * 3
    assert not any(row.cell.temperature for rows in again for row in rows), "the fastest are greedy cells"
    runs = sum(len(row.timing.decode_s) for row in sum(again, measured))
    for rows in (measured, *again):
        plain = {
            (row.cell.drafter, row.prompt_id, row.cell.temperature): row.timing.ar_decode_s for row in rows
        }
        runs += sum(map(len, plain.values()))
    assert runs <= planned.runs <= 1.25 * runs


def test_timed_decoding_is_in_the_hours(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = planned_config(corpus, tmp_path)
    plan(config, as_json=True, memory_gb=None, tflops=2.0, step_ms=30.0)
    document = json.loads(capsys.readouterr().out)
    (runs,) = (amount["value"] for amount in document["amounts"] if amount["name"] == "timed runs")
    shapes, _ = known(config)
    # Two prompts of 64 tokens, read twice by the target and by multi_view.
    flops = 2 * sum(2 * 64 * (2 * s.parameters + 4 * s.layers * s.query * 32) for s in shapes.values())
    seconds = runs * 15 * 0.03 + flops / 2e12
    assert document["hours"]["sweep measure"] == pytest.approx(seconds / 3600)

    monkeypatch.setattr(planning, "device_of", lambda config: GPU)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    plan(config, as_json=False, memory_gb=None, tflops=2.0)
    text = capsys.readouterr().out
    assert "give --step-ms X" in text and "sweep measure" not in text.partition("device-hours")[2]


def test_too_few_prompts_to_recommend_anything_are_told(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight prompts are as many clocks alone and four in pairs; five documents are the least."""

    def told(**measure: int) -> str:
        def change(values: dict[str, Any]) -> None:
            values["data"]["prompts"] = 8
            values["sweep"]["measure"] |= measure

        config = planned_config(corpus, tmp_path, change)
        plan(config, as_json=False, memory_gb=None, tflops=1.0)
        return capsys.readouterr().out

    assert "nothing will be recommended" not in told(prompts=8)
    said = "at most 4 documents with a clock of their own, and report.least_documents is 5: nothing will be"
    assert said in told(prompts=8, prompts_together=2) and said in told(prompts=4)


def test_what_is_there_needs_no_room(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing free on the disk a config is refused, by all that it lacks."""
    config = planned_config(corpus, tmp_path)

    def lacking() -> float:
        shapes, facts = known(config)
        files = list(on_disk(config, shapes, facts, count_sweep(config, facts.prompts)))
        rows, missing = files[-1]
        assert rows.name == "rows on disk" and missing == rows.value > 0
        return sum(missing for _, missing in files[:-1])

    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 0}))
    with pytest.raises(BadData, match=r"need 0\.0 GB more, and 0\.0 GB are free in .*labels\.max_sequences"):
        plan(config, as_json=False, memory_gb=None, tflops=1.0)
    everything = lacking()
    run_pipeline(config, until="teach")
    later = lacking()
    assert 0 < later < everything
    run_pipeline(config, until="train")
    assert lacking() == 0


def test_fields_beyond_the_positions_of_a_model_are_named(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built = planned_config(corpus, tmp_path, lambda values: values["target"].update(max_positions=90))
    plan(built, as_json=False, memory_gb=None, tflops=1.0)
    assert "\ntarget is built for 90 positions, and data.sequence_tokens (96)" in capsys.readouterr().out


def test_a_model_that_is_not_here_is_named_by_its_field(corpus: Path, tmp_path: Path) -> None:
    spec = {"kind": "pretrained", "path": "nobody/nothing-here"}
    config = planned_config(corpus, tmp_path, lambda v: v.update(drafter=spec))
    with pytest.raises(BadData, match=r"^drafter\.path = nobody/nothing-here: its config\.json is not on"):
        plan(config, as_json=False, memory_gb=None, tflops=None)


@pytest.mark.parametrize("path", ["./my-draftr", "/nowhere/llama", "models/x/y", "my-draftr", "~/draftr"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(
    corpus: Path, tmp_path: Path, path: str
) -> None:
    config = planned_config(
        corpus, tmp_path, lambda v: v.update(drafter={"kind": "pretrained", "path": path})
    )
    with pytest.raises(BadData, match=rf"^drafter\.path = {path}: there is no such folder$"):
        plan(config, as_json=False, memory_gb=None, tflops=None)


@pytest.mark.parametrize(
    ("stage", "field", "value"),
    [("pretrain target", "train.micro_batch_sequences", 1), ("teach", "labels.batch_sequences", 2)],
)
def test_what_does_not_fit_is_refused_with_a_value_that_does(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, field: str, value: int
) -> None:
    monkeypatch.setattr(planning, "device_of", lambda config: GPU)

    def peak(change: dict[str, Any]) -> int:
        config = planned_config(corpus, tmp_path, lambda v: [v[g].update(c) for g, c in change.items()])
        (found,) = [peak for peak in memory(config, *known(config), GPU) if peak.stage == stage]
        return found.total

    group, name = field.split(".")
    limit, unchanged = peak({group: {name: value}}), peak({})
    assert limit < unchanged
    config = planned_config(corpus, tmp_path)
    with pytest.raises(BadData) as refused:
        plan(config, as_json=False, memory_gb=limit / 1e9, tflops=1.0)
    assert f"stage {stage} needs" in str(refused.value)
    assert f"set {field}={value}, with which it takes" in str(refused.value)


def test_nothing_is_advised_where_nothing_helps(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "device_of", lambda config: Device("cpu", 10**9))
    with pytest.raises(
        BadData, match=r"stage teach needs 1\.0 GB .* none of labels\.batch_sequences, .* alone"
    ):
        plan(planned_config(corpus, tmp_path), as_json=False, memory_gb=0.5, tflops=1.0)


def run(tmp_path: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], int]:
    """A command, and the largest resident bytes of its process."""
    peak, command = tmp_path / "peak", [sys.executable, "-m", "jobs", *arguments]
    call = [sys.executable, "-c", PEAK_OF, str(peak), *command]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    return done, int(peak.read_text())


def write_stories(folder: Path) -> None:
    """Texts of several thousand tokens."""
    folder.mkdir()
    for number in range(24):
        (folder / f"{number}.txt").write_text("".join(story(100 * number + k) for k in range(12)))


@pytest.mark.slow
def test_the_peak_of_a_real_process(tmp_path: Path) -> None:
    """Measured: the largest resident size of the stages up to teach, against the largest that was planned."""
    folder, storage = tmp_path / "texts", tmp_path / "runs"
    write_stories(folder)

    def change(values: dict[str, Any]) -> None:
        values["data"] |= {"sequence_tokens": 1024, "max_sequences": 16}
        model = {"layers": 4, "hidden": 128, "intermediate": 384, "max_positions": 1024}
        values["target"] = {**SCRATCH, **model, "pretrain": {"steps": 2, "batch_sequences": 4}}
        values["train"] |= {"micro_batch_sequences": 4}
        values["drafter"] = {**values["drafter"], "pretrain": {"steps": 0, "batch_sequences": 4}}

    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(planned_config(folder, storage, change).model_dump(mode="json")))
    refused, _ = run(tmp_path, "plan", str(config), "--json", "--memory-gb", "0.001", "--tflops", "1")
    assert refused.returncode == 3
    assert "stage pretrain target needs" in refused.stderr and "Traceback" not in refused.stderr
    planned = json.loads(refused.stdout)["memory"]
    assert not storage.exists()
    done, actual = run(tmp_path, "teach", str(config))
    assert done.returncode == 0, done.stderr
    expected = max(peak["total"] for peak in planned if peak["stage"] in ("pretrain target", "teach"))
    assert expected - planned[0]["base"] > 0.25 * expected  # a test of more than the imports
    assert expected == pytest.approx(actual, rel=0.2)
    manifests = [json.loads(file.read_text()) for file in storage.glob("*/manifest.json")]
    assert max(made["peak_memory_bytes"] for made in manifests) == pytest.approx(actual, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("more", ["stored", "recomputed", "path"])
def test_the_peak_of_training_a_head(tmp_path: Path, more: str) -> None:
    """Measured in a process that trains alone: chains of three proposals behind two views of each prefix."""
    folder, storage = tmp_path / "texts", tmp_path / "runs"
    write_stories(folder)

    def change(values: dict[str, Any]) -> None:
        values["data"] |= {"sequence_tokens": 1024, "max_sequences": 16}
        model = {"layers": 6, "hidden": 256, "intermediate": 768, "max_positions": 1024}
        values["target"] = {**SCRATCH, **model, "pretrain": {"steps": 0}}
        values["drafter"] = {"kind": "head"}
        values["labels"] |= {"features": "recomputed" if more == "recomputed" else "stored"}
        variant = {"name": "multi_view", "budgets": {256: 1}, "num_views": 1}
        variant |= {"path": {"paths": 4, "length": 8}} if more == "path" else {}
        values["train"] |= {"micro_batch_sequences": 4, "window_tokens": 128, "windows": 3}
        values["train"] |= {
            "min_prefix_tokens": 640
        }  # so that windows start as late as the plan takes them to
        values["train"] |= {"steps": 3, "chain_steps": 3, "variants": [variant]}
        values["sweep"] |= {"mode": "replay", "measure": {}}

    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(planned_config(folder, storage, change).model_dump(mode="json")))
    planned, _ = run(tmp_path, "plan", str(config), "--json", "--tflops", "1")
    (peak,) = (peak for peak in json.loads(planned.stdout)["memory"] if peak["stage"] == "train multi_view")
    assert run(tmp_path, "teach", str(config))[0].returncode == 0
    done, actual = run(tmp_path, "train", str(config))
    assert done.returncode == 0, done.stderr
    assert peak["total"] - peak["base"] > 0.25 * peak["total"]  # a test of more than the imports
    assert peak["total"] == pytest.approx(actual, rel=0.2)
