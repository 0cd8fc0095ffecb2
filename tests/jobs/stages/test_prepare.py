"""Stage prepare: what it writes, reuses and refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig

from jobs.executors.inline import InlineExecutor
from jobs.stages.prepare import prepare
from pipeline.config.schema import Config
from pipeline.data.tokenizer import read_tokenizer, train_bpe
from pipeline.errors import BadData
from pipeline.store.artifacts import Artifact, seal
from pipeline.store.files import read_rows
from pipeline.store.rows import Prompt
from tests.helpers.clock import patience
from tests.helpers.documents import bench, book, narrative, story, write_lines
from tests.helpers.paths import SHARED

SAMPLES = SHARED / "data"
SCRATCH = {
    "kind": "scratch", "layers": 1, "hidden": 16, "heads": 2, "kv_heads": 2, "intermediate": 16,
    "max_positions": 256, "pretrain": {"steps": 1},
}  # fmt: skip


def sequence_files(artifact: Artifact) -> list[Path]:
    return sorted((artifact.path / "sequences").glob("train-*.npy"))


def load_prompts(artifact: Artifact, split: str) -> list[Prompt]:
    files = sorted((artifact.path / "prompts").glob(f"{split}-*.jsonl"))
    return [prompt for file in files for prompt in read_rows(file, Prompt)]


class Backwards(InlineExecutor):
    """Runs and yields the items in reverse, as a cluster may."""

    def map(self, function, items, description):
        return super().map(function, list(items)[::-1], description)


class Interrupted(InlineExecutor):
    """Is interrupted in the tasks of this description, after the first of them."""

    def __init__(self, config: Config, stop: str) -> None:
        super().__init__(config)
        self.stop = stop

    def map(self, function, items, description):
        for k, pair in enumerate(super().map(function, items, description)):
            if description == self.stop and k:
                raise KeyboardInterrupt
            yield pair


def make_config(storage: Path, root: Path, sources: list[dict[str, Any]], **changes: Any) -> Config:
    data: dict[str, Any] = {
        "root": str(root), "sources": sources, "tokenizer": {"kind": "bpe", "vocab_size": 400},
        "sequence_tokens": 64, "contexts": [{"name": "64", "tokens": 64}, {"name": "128", "tokens": 128}],
        "max_new_tokens": 8, "prompts": 4, "validation_prompts": 2, "documents_per_shard": 3,
    }  # fmt: skip
    models = {"target": changes.pop("target", SCRATCH), "drafter": changes.pop("drafter", SCRATCH)}
    return Config.model_validate(
        {
            "name": "t", "storage": str(storage), "data": {**data, **changes}, **models,
            "train": {"variants": [{"name": "a", "sparse_weight": 0}], "steps": 1, "window_tokens": 16},
            "sweep": {"budgets": [16], "gammas": [2], "mode": "replay"},
        }
    )  # fmt: skip


def run(config: Config, kind: type[InlineExecutor] = InlineExecutor):
    return prepare(config, kind(config))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Eight training books, of which one is a re-wrapped test book and one a copy of another."""
    folder = tmp_path / "data"
    contaminated = story(21).upper().replace("\n", "  ")
    training = [book(k) for k in range(6)] + [book(0, text=contaminated), book(3)]
    write_lines(folder / "pg19" / "train.jsonl.gz", training)
    write_lines(folder / "pg19" / "validation.jsonl", [book(k) for k in (10, 11)])
    write_lines(folder / "pg19" / "test.jsonl", [book(k) for k in (20, 21, 22)])
    write_lines(folder / "bench" / "qmsum.jsonl", [bench(30, "Who?"), bench(30, "Why?")])
    write_lines(folder / "nqa" / "train.jsonl", [narrative(40 + k, f"n{k}") for k in range(3)])
    return folder


def sources() -> list[dict[str, Any]]:
    return [
        {"kind": "pg19", "name": "pg19", "path": "pg19"},
        {"kind": "longbench", "name": "qmsum", "task": "qmsum", "path": "bench"},
        {"kind": "lwm", "name": "nqa", "path": "nqa", "rows": [1], "use": ["train", "test"]},
        {"kind": "lwm", "name": "needle", "task": "needle", "path": "./pg19/test.jsonl"},
    ]


def checksums(artifact) -> dict[str, str]:
    return {name: entry["sha256"] for name, entry in artifact.manifest["files"].items()}


def test_everything_comes_out_and_is_counted(tmp_path, root):
    artifact = run(make_config(tmp_path / "runs", root, sources(), contexts=[{"name": "300", "tokens": 300}]))
    counts = artifact.manifest["counts"]
    assert counts["documents"]["pg19"] == {"train": 8, "validation": 2, "test": 3}
    assert counts["documents"]["nqa"] == {"train": 3, "test": 1}
    # The re-wrapped test book, and the story that nqa asks about; the second copy of book 3.
    assert (counts["contaminated"], counts["copies"]) == (2, 1)
    tokenizer = read_tokenizer(artifact.path / "tokenizer")
    sequences = np.concatenate([np.load(file) for file in sequence_files(artifact)])
    assert sequences.shape == (counts["sequences"], 64) and (sequences[:, 0] == tokenizer.bos_token_id).all()
    training = [story(k) for k in (0, 1, 2, 3, 4, 5, 40, 42)]
    assert all(any(tokenizer.decode(row[1:]) in text for text in training) for row in sequences[::7])
    test = load_prompts(artifact, "test")
    assert {p.dataset for p in test} == {"pg19", "qmsum", "nqa", "needle"}
    assert {len(p.tokens) for p in test} == {300} and len({p.prompt_id for p in test}) == len(test)
    assert [p.document_id for p in test if p.dataset == "qmsum"] == ["qmsum/id30", "qmsum/id30"]
    assert {p.dataset for p in load_prompts(artifact, "validation")} == {"pg19"}
    assert counts["sources"]["pg19"]["files"][0]["path"].endswith("train.jsonl.gz")
    assert counts["sources"]["qmsum"]["longbench_templates"] == "built-in"


def test_task_order_and_a_resumed_run_change_nothing(tmp_path, root, monkeypatch):
    config = make_config(tmp_path / "a", root, sources(), max_sequences=50)
    first = run(config)
    assert sum(len(np.load(file)) for file in sequence_files(first)) == 50
    assert run(config) == first
    backwards = run(make_config(tmp_path / "b", root, sources(), max_sequences=50), Backwards)
    assert checksums(backwards) == checksums(first)

    config = make_config(tmp_path / "c", root, sources(), max_sequences=50)
    for description in ("read documents", "encode", "make prompts"):
        with pytest.raises(KeyboardInterrupt):
            prepare(config, Interrupted(config, description))
    assert checksums(run(config)) == checksums(first)


def test_too_many_bad_rows_fail_with_their_names(tmp_path, root):
    write_lines(root / "pg19" / "train.jsonl.gz", [book(k) for k in range(9)] + [{"text": 5}])
    with pytest.raises(BadData, match=r"1 of 15 rows are bad \(1 wrong type\)(?s:.*)train\.jsonl\.gz:10"):
        run(make_config(tmp_path / "runs", root, sources()))
    artifact = run(make_config(tmp_path / "runs", root, sources(), max_bad_fraction=0.1))
    rows = artifact.manifest["counts"]["rows"]["pg19"]
    assert rows["bad"] == {"wrong type": 1} and "train.jsonl.gz:10" in rows["offenders"][0]


def test_the_same_files_are_known_again_from_another_working_folder(tmp_path, root):
    """As two submitted jobs see them: each runs in a copy of its own."""
    given = [{"kind": "pg19", "name": "pg19", "path": str(root / "pg19")}]
    first = run(make_config(tmp_path / "runs", tmp_path / "job-1", given))
    again = run(make_config(tmp_path / "runs", tmp_path / "job-2", given))
    assert again.fingerprint == first.fingerprint
    relative = [{"kind": "pg19", "name": "pg19", "path": "pg19"}]
    other = tmp_path / "other"
    for split, count in (("train", 5), ("validation", 2), ("test", 2)):
        write_lines(other / "pg19" / f"{split}.jsonl", [book(70 + k) for k in range(count)])
    here, there = (run(make_config(tmp_path / "runs", folder, relative)) for folder in (root, other))
    assert here.fingerprint != there.fingerprint


def test_changed_data_is_prepared_anew(tmp_path, root):
    first = run(make_config(tmp_path / "runs", root, sources()))
    write_lines(root / "pg19" / "train.jsonl.gz", [book(k) for k in range(60, 65)])
    assert run(make_config(tmp_path / "runs", root, sources())).fingerprint != first.fingerprint


def test_the_targets_tokenizer_is_used_and_the_drafters_compared(tmp_path, root):
    train_bpe([story(1)], 350).save_pretrained(tmp_path / "target")
    train_bpe([story(9).upper()], 350).save_pretrained(tmp_path / "other")
    target = {"kind": "pretrained", "path": str(tmp_path / "target")}
    same = make_config(
        tmp_path / "runs", root, sources(), tokenizer={"kind": "target"}, target=target, drafter=target
    )
    assert len(read_tokenizer(run(same).path / "tokenizer")) == 350
    other = {"kind": "pretrained", "path": str(tmp_path / "other")}
    with pytest.raises(BadData, match="must share its target's vocabulary"):
        run(
            make_config(
                tmp_path / "r", root, sources(), tokenizer={"kind": "target"}, target=target, drafter=other
            )
        )
    with pytest.raises(BadData, match=r"drafter.*is pretrained and has its own"):
        run(make_config(tmp_path / "r", root, sources(), drafter=other))


def test_a_token_without_a_logit_is_told_before_any_work(tmp_path, root):
    """A pad token that was added alone is none: prompts and sequences are made, and hold no such token."""
    tokenizer = train_bpe([story(1)], 350)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "target")
    LlamaConfig(vocab_size=350).save_pretrained(tmp_path / "target")
    target = {"kind": "pretrained", "path": str(tmp_path / "target")}
    given = {"tokenizer": {"kind": "target"}, "target": target, "drafter": target}
    artifact = run(make_config(tmp_path / "runs", root, sources(), **given))
    assert max(np.load(file).max() for file in sequence_files(artifact)) < 350
    assert max(max(prompt.tokens) for prompt in load_prompts(artifact, "test")) < 350

    tokenizer.add_tokens(["<image>"])
    tokenizer.save_pretrained(tmp_path / "target")
    with pytest.raises(BadData, match=r"the target .* has 350 logits, and none for .*<image>"):
        run(make_config(tmp_path / "other", root, sources(), **given))
    assert not (tmp_path / "other").exists()


def test_prepared_data_of_an_earlier_program_is_prepared_anew(tmp_path, root):
    """Of the sources that are read otherwise now; the others' is taken as it is."""
    for names, known in (({"pg19", "nqa"}, {}), ({"pg19", "qmsum"}, {"qmsum": 2})):
        chosen = [source for source in sources() if source["name"] in names]
        made = run(make_config(tmp_path / "runs", root, chosen))
        assert made.manifest["inputs"].get("readers", {}) == known
        there = make_config(tmp_path / "runs", tmp_path / "nowhere", chosen, prepared=str(made.path))
        assert run(there).fingerprint == made.fingerprint
    manifest = made.manifest
    del manifest["inputs"]["readers"]
    seal(made.path, manifest)
    with pytest.raises(
        BadData, match="earlier version of this program, which read the sources qmsum otherwise"
    ):
        run(there)


def test_nothing_to_train_on_or_to_evaluate_is_an_error(tmp_path, root):
    with pytest.raises(BadData, match="no training document gives a sequence"):
        run(make_config(tmp_path / "runs", root, sources(), sequence_tokens=100_000))
    with pytest.raises(BadData, match=r"no validation prompt could be made .*shorter than the context"):
        run(make_config(tmp_path / "runs", root, sources()[:1], contexts=[{"name": "x", "tokens": 9999}]))


def test_missing_data_fails_before_any_work(tmp_path, root):
    (root / "pg19" / "validation.jsonl").unlink()
    with pytest.raises(BadData, match=r"has no validation\.jsonl .*emozilla/pg19"):
        run(make_config(tmp_path / "runs", root, sources()))
    assert not (tmp_path / "runs").exists()


def test_the_stage_imports_without_ray_and_torch():
    heavy = {"ray", "torch", "transformers", "datasets"}
    code = f"import sys, jobs.stages.prepare; sys.exit(bool({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": "."}, timeout=patience(60)
    )
    assert done.returncode == 0


@pytest.mark.skipif(not SAMPLES.exists(), reason=f"the sample data is not at {SAMPLES}")
def test_the_sample_data_is_read(tmp_path):
    from pipeline.data.reading import Table, table_rows
    from pipeline.data.sources.registry import make_readers

    config = make_config(
        tmp_path, SAMPLES,
        [{"kind": "longbench", "name": "qmsum", "task": "qmsum", "path": "longbench"},
         {"kind": "lwm", "name": "needle", "task": "needle", "path": "narrativeqa",
          "prompt_split": "validation"}],
        tokenizer={"kind": "target"}, validation_prompts=0,
        target={"kind": "pretrained", "path": "./none"},
    )  # fmt: skip
    read = {
        name: [row for shard in reader.shards() for row in reader.documents(shard)]
        for name, reader in make_readers(config.data, 0).items()
    }
    assert {name: len(rows) for name, rows in read.items()} == {"qmsum": 40, "needle": 3}
    assert all(row.split == "test" for rows in read.values() for row in rows)
    books = list(table_rows(Table(str(SAMPLES / "pg19" / "test.jsonl.gz")), None, ""))
    assert len(books) == 8
