"""Evidence against the files that it is read from, and what makes two drafters comparable."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from jobs.stages.pipeline import run_pipeline
from pipeline.errors import BadData
from pipeline.gate.evidence import Evidence, load_evidence, read_evidence, save_evidence
from pipeline.store.layout import MANIFEST
from tests.helpers.toys import PROMPTS, artifact, reseal, toy_config


def report_of(storage: Path) -> Path:
    return artifact(storage, "report")


@pytest.fixture(scope="module")
def evidence(finished: Path) -> Evidence:
    return read_evidence(report_of(finished))


def test_the_rows_are_one_drafters(finished: Path, evidence: Evidence) -> None:
    lines = [
        json.loads(line)
        for file in (artifact(finished, "sweep") / "rows").glob("*.jsonl")
        for line in file.read_text().splitlines()
    ]
    for name in ("multi_view", "full_only"):
        wanted = [line for line in lines if line["cell"]["drafter"] == name]
        found = [row.model_dump(mode="json") for row in read_evidence(report_of(finished), name).rows]
        assert sorted(map(json.dumps, found)) == sorted(map(json.dumps, wanted))
        # Three budgets, each with its control, and no prefix, at two γ; two prompts are measured of one cell.
        assert len(found) == 7 * 2 * PROMPTS + (2 if name == "multi_view" else 0)
    assert {row.cell.control for row in evidence.rows} == {None, "other_prompt", "no_prefix"}


def test_what_it_says_of_the_drafter(finished: Path, evidence: Evidence) -> None:
    other = read_evidence(report_of(finished) / "summary.json", "full_only")
    assert (evidence.drafter, evidence.budgets, evidence.config) == (
        "multi_view",
        [16, 32, "full"],
        "minimal",
    )
    assert (other.drafter, other.budgets) == ("full_only", ["full"])
    assert (evidence.target, evidence.prompts) == (other.target, other.prompts)
    with pytest.raises(BadData, match="no trained drafter 'third'; there are full_only, multi_view"):
        read_evidence(report_of(finished), "third")


def test_hardware_is_what_measured_rows_were_timed_on(finished: Path, evidence: Evidence) -> None:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    assert evidence.hardware.startswith("cpu: ") and evidence.hardware.endswith(" threads")
    assert names[0].partition(": ")[2] in evidence.hardware
    assert read_evidence(report_of(finished), "full_only").hardware == ""  # nothing of it was timed


def test_saved_and_loaded(evidence: Evidence, tmp_path: Path) -> None:
    save_evidence(evidence, tmp_path / "a")
    save_evidence(evidence, tmp_path / "b")
    assert load_evidence(tmp_path / "a") == evidence
    for name in ("evidence.json", "rows.jsonl.gz"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    rows = tmp_path / "a" / "rows.jsonl.gz"
    rows.write_bytes(rows.read_bytes()[:-100])
    with pytest.raises(BadData, match="no whole evidence"):
        load_evidence(tmp_path / "a")
    with pytest.raises(BadData, match="no whole evidence"):
        load_evidence(tmp_path)


def test_a_drafter_trained_otherwise_stays_comparable(
    corpus: Path, storage: Path, evidence: Evidence
) -> None:
    summary = run_pipeline(toy_config(corpus, storage, lambda v: v["train"].update(steps=4)))
    other = read_evidence(summary)
    assert (other.target, other.prompts) == (evidence.target, evidence.prompts)
    assert [row.counts.num_accepted for row in other.rows] != [
        row.counts.num_accepted for row in evidence.rows
    ]


def other_token(storage: Path) -> None:
    (file,) = (artifact(storage, "prepare") / "prompts").glob("test-*.jsonl")
    first, *rest = file.read_text().splitlines()
    prompt = json.loads(first)
    prompt["tokens"][-1] += 1
    file.write_text("\n".join([json.dumps(prompt), *rest]) + "\n")


def other_weight(storage: Path) -> None:
    file = artifact(storage, "pretrain-target") / "model" / "model.safetensors"
    weights = load_file(file)
    next(iter(weights.values())).view(-1)[0] += 1e-3
    save_file(weights, file, metadata={"format": "pt"})


def other_tokenizer(storage: Path) -> None:
    file = artifact(storage, "prepare") / "tokenizer" / "tokenizer.json"
    values = json.loads(file.read_text())
    values["model"]["vocab"] |= {"⁂": len(values["model"]["vocab"])}
    file.write_text(json.dumps(values))


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


def other_rope(storage: Path) -> None:
    model = artifact(storage, "pretrain-target") / "model"
    change_config(model, lambda values: values["rope_parameters"].update(rope_theta=12345.0))


@pytest.mark.parametrize(
    ("change", "stage", "field"),
    [
        (other_token, "prepare", "prompts"),
        (other_weight, "pretrain-target", "target"),
        (other_rope, "pretrain-target", "target"),
        (other_tokenizer, "prepare", "target"),
    ],
)
def test_another_content_is_another_fingerprint(
    storage: Path, evidence: Evidence, change: Callable[[Path], None], stage: str, field: str
) -> None:
    change(storage)
    with pytest.raises(BadData, match="damaged or missing"):  # it is not what was made
        read_evidence(report_of(storage))
    reseal(artifact(storage, stage))
    found = read_evidence(report_of(storage))
    changed = {name for name in ("target", "prompts") if getattr(found, name) != getattr(evidence, name)}
    assert changed == {field}


def test_the_same_target_as_a_folder_of_ones_own(storage: Path, evidence: Evidence, tmp_path: Path) -> None:
    """By content: wherever the weights come from."""
    own = shutil.copytree(artifact(storage, "pretrain-target") / "model", tmp_path / "target")
    saved = {"transformers_version": "4.0", "torch_dtype": "float32", "_name_or_path": "elsewhere"}
    change_config(own, lambda values: values.update(saved))  # as another version of the library saves it
    sweep = artifact(storage, "sweep")
    manifest = json.loads((sweep / MANIFEST).read_text())
    stats = {file.name: file.stat() for file in own.iterdir() if file.suffix == ".safetensors"}
    files = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    model: dict[str, Any] = {"kind": "pretrained", "path": str(own), "dtype": "float32", "rope_scaling": None}
    manifest["inputs"]["target"] = {"model": model, "files": files}
    (sweep / MANIFEST).write_text(json.dumps(manifest))
    assert read_evidence(report_of(storage)).target == evidence.target
    model["rope_scaling"] = {"rope_type": "llama3", "factor": 8}  # which configs could hold once
    (sweep / MANIFEST).write_text(json.dumps(manifest))
    assert read_evidence(report_of(storage)).target != evidence.target
    (own / "model.safetensors").write_bytes(b"another")
    with pytest.raises(BadData, match="not the one that the sweep was made with"):
        read_evidence(report_of(storage))


def test_a_sweep_that_changed_or_is_not_whole_is_refused(storage: Path, tmp_path: Path) -> None:
    rows = next((artifact(storage, "sweep") / "rows").glob("replay-*.jsonl"))
    whole = rows.read_bytes()
    rows.write_bytes(whole[: whole.index(b"\n") + 1])
    with pytest.raises(BadData, match="damaged or missing"):
        read_evidence(report_of(storage))
    reseal(artifact(storage, "sweep"))
    with pytest.raises(BadData, match="has other rows than"):
        read_evidence(report_of(storage))
    (artifact(storage, "sweep") / MANIFEST).unlink()
    with pytest.raises(BadData, match="not complete"):
        read_evidence(report_of(storage))
    with pytest.raises(BadData, match="not a finished report"):
        read_evidence(tmp_path)


def test_the_prepared_data_may_lie_elsewhere(storage: Path, evidence: Evidence, tmp_path: Path) -> None:
    prepared = artifact(storage, "prepare")
    summary = report_of(storage) / "summary.json"
    values = json.loads(summary.read_text())
    assert (report_of(storage) / values["prepared"]).resolve() == prepared.resolve()
    prepared.rename(tmp_path / "elsewhere")
    summary.write_text(json.dumps(values | {"prepared": str(tmp_path / "elsewhere")}))
    assert read_evidence(summary).prompts == evidence.prompts
