"""Answers from a file: the same labels as of the target that wrote them, and none of another target."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel

from benchmarks.real_study.answers import collect
from jobs.stages.teach import make_teacher
from pipeline.errors import BadData
from pipeline.models.load import ModelRef
from pipeline.store.files import write_json, write_rows
from pipeline.train.target.teacher import AnswerTask, LabelTask, TeachCounts, is_on_policy
from pipeline.train.target.written import prompt_hash
from tests.helpers.tiny import VOCABULARY, save_model, tiny_config, tiny_prompts, write_prepare

LENGTH, MOST, ROWS, COPIES = 96, 24, 6, 2
LENGTHS = (40, 40, 33, 40, 57, 57)
ASKING = {
    "kind": "text", "name": "code", "files": ["stdlib"], "ask": "What is this?\n\n{text}",
    "training_prompts": {40: len(LENGTHS)},
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "data.sources": [ASKING], "data.sequence_tokens": LENGTH, "labels.top_k": 5, "labels.batch_sequences": 4,
    "labels.answers": {"per_prompt": COPIES, "temperature": 0.7},
    "train.window_tokens": 12, "train.windows": 2, "train.min_prefix_tokens": 16,
    "train.batch_sequences": 2, "train.micro_batch_sequences": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def prepare(storage: Path) -> Path:
    folder = write_prepare(storage / "prepare-toy", tiny_config(CONFIG), sequences=(ROWS,))
    prompts = [
        tiny_prompts("train", 1, length, MOST, seed=at)[0].model_copy(update={"prompt_id": f"p{at}"})
        for at, length in enumerate(LENGTHS)
    ]
    write_rows(folder / "asked" / "train-code-72.jsonl", prompts)
    return folder


@pytest.fixture(scope="module")
def saved(storage: Path, make_model: Any) -> ModelRef:
    """A twelfth of the vocabulary ends a text, so that some answers are short, and some end at once."""
    return ending(make_model(layers=2, seed=3), storage / "target")


def ending(model: PreTrainedModel, folder: Path, first: int = 3) -> ModelRef:
    model.generation_config.eos_token_id = list(range(first, VOCABULARY, 12))
    return save_model(model, folder)


def teach(prepare: Path, saved: ModelRef, output: Path, task: Any = None, **changes: Any) -> TeachCounts:
    teacher = make_teacher(tiny_config(CONFIG | changes), saved, prepare / "tokenizer", output)
    return teacher(task or answers(prepare))


def answers(prepare: Path, first: int = 0, last: int = len(LENGTHS), shard: int = 0) -> AnswerTask:
    return AnswerTask(prepare / "asked" / "train-code-72.jsonl", first, last, shard)


@pytest.fixture(scope="module")
def alone(storage: Path, prepare: Path, saved: ModelRef) -> Path:
    """Answers that the target wrote in two shards, with a manifest as of a finished stage."""
    folder = storage / "teach-toy"
    teach(prepare, saved, folder, answers(prepare, 0, 3, 0))
    teach(prepare, saved, folder, answers(prepare, 3, 6, 1))
    labels = {"answers": CONFIG["labels.answers"]}
    write_json(folder / "manifest.json", {"inputs": {"prepare": "toy", "labels": labels}})
    return folder


@pytest.fixture(scope="module")
def file(storage: Path, alone: Path) -> Path:
    assert collect(alone, storage / "answers.jsonl.xz", "toy") == len(LENGTHS)
    return storage / "answers.jsonl.xz"


def written(file: Path, **more: Any) -> dict[str, Any]:
    return {"labels.answers": {**CONFIG["labels.answers"], "written": str(file), **more}}


def stored(output: Path) -> dict[str, np.ndarray]:
    files = sorted((output / "labels").glob("*.npy"))
    return {path.name: np.load(path) for path in files if ".agreement." not in path.name}


def rewritten(file: Path, output: Path, change: Any) -> Path:
    """The file after `change` of its lines, each of them parsed."""
    lines = [json.loads(line) for line in lzma.decompress(file.read_bytes()).decode().splitlines()]
    changed = "".join(json.dumps(line) + "\n" for line in change(lines))
    output.write_bytes(lzma.compress(changed.encode()))
    return output


def test_the_labels_are_those_of_answers_that_the_target_writes(
    prepare: Path, saved: ModelRef, alone: Path, file: Path, tmp_path: Path
) -> None:
    """To the last log-probability, shard by shard; what is there is not made again."""
    first, second = answers(prepare, 0, 3, 0), answers(prepare, 3, 6, 1)
    counts = [teach(prepare, saved, tmp_path, task, **written(file)) for task in (first, second)]
    ours, theirs = stored(tmp_path), stored(alone)
    assert ours.keys() == theirs.keys() and len(ours) == 12
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], name)
    supervised = np.concatenate([theirs[f"answers-0000{shard}.supervised.npy"] for shard in (0, 1)])
    assert supervised.min() < supervised.max() == MOST and len(supervised) < COPIES * len(LENGTHS)
    assert [(one.served, one.refused, one.missing) for one in counts] == [(3, 0, 0)] * 2
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    assert teach(prepare, saved, tmp_path, first, **written(file)) == counts[0]
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}


def test_what_the_file_lacks_the_target_writes(
    prepare: Path, saved: ModelRef, alone: Path, file: Path, tmp_path: Path
) -> None:
    few = rewritten(file, tmp_path / "few.xz", lambda lines: [lines[0], *lines[3:]])
    counts = teach(prepare, saved, tmp_path / "few", **written(few))
    assert (counts.served, counts.refused, counts.missing) == (4, 0, 2)
    assert teach(prepare, saved, tmp_path / "few", **written(few)) == counts
    empty = rewritten(file, tmp_path / "none.xz", lambda lines: lines[:1])
    assert teach(prepare, saved, tmp_path / "none", **written(empty)).missing == len(LENGTHS)
    whole = [array for name, array in stored(alone).items() if name.endswith("tokens.npy")]
    rows = sorted(map(tuple, np.concatenate(whole).tolist()))
    for folder in ("few", "none"):
        tokens = stored(tmp_path / folder)["answers-00000.tokens.npy"]
        assert sorted(map(tuple, tokens.tolist())) == rows, folder


def test_fewer_and_shorter_answers_are_taken_from_it_and_longer_ones_are_not(
    prepare: Path, saved: ModelRef, file: Path, tmp_path: Path
) -> None:
    one = teach(prepare, saved, tmp_path / "one", **written(file, per_prompt=1))
    assert (one.served, one.missing) == (6, 0) and one.answers <= 6
    shorter = {"train.windows": 1}
    assert teach(prepare, saved, tmp_path / "cut", **written(file), **shorter).served == 6
    own = teach(prepare, saved, tmp_path / "own", **shorter)
    assert own.served == own.missing == 0
    for name, array in stored(tmp_path / "cut").items():
        np.testing.assert_array_equal(array, stored(tmp_path / "own")[name], name)
    longer = {"train.windows": 3}
    assert teach(prepare, saved, tmp_path / "longer", **written(file), **longer).missing > 0


def test_texts_that_do_not_end_are_the_target_s(
    prepare: Path, saved: ModelRef, file: Path, tmp_path: Path
) -> None:
    task = LabelTask(prepare / "sequences" / "train-00000.npy", 0, ROWS, 0, 0)
    policy = {"labels.on_policy_fraction": 0.6, "labels.on_policy_temperature": 0.5}
    assert any(is_on_policy(42, row, 0.6) for row in range(ROWS))
    teach(prepare, saved, tmp_path / "alone", task, **policy)
    counts = teach(prepare, saved, tmp_path / "file", task, **policy, **written(file))
    assert (counts.served, counts.missing) == (0, 0)
    for name, array in stored(tmp_path / "file").items():
        np.testing.assert_array_equal(array, stored(tmp_path / "alone")[name], name)


@pytest.mark.parametrize(
    ("seed", "first", "words"),
    [
        (9, 3, r"of \d+ arg-maxes in .*answers.jsonl.xz, \d"),
        (3, 4, r"in .*answers.jsonl.xz an answer to p\d ends with token \d+, which ends no text"),
    ],
)
def test_another_target_s_answers_end_the_run(
    prepare: Path, make_model: Any, file: Path, tmp_path: Path, seed: int, first: int, words: str
) -> None:
    """Other weights, and the same with other ends."""
    other = ending(make_model(layers=2, seed=seed), tmp_path / "other", first)
    with pytest.raises(BadData, match=f"labels.answers.written: {words}"):
        teach(prepare, other, tmp_path / "out", **written(file))
    assert not list(tmp_path.glob("out/labels/*"))


@pytest.mark.parametrize(
    ("change", "more", "words"),
    [
        ({"tokenizer": "0" * 64}, {}, "answers of toy, whose tokenizer has another vocabulary"),
        ({}, {"temperature": 0.5}, r"drawn at temperature 0.7, and .* asks for 0.5"),
        ({"format": 2}, {}, "is no file of answers"),
        (None, {}, "No such file"),
    ],
)
def test_a_file_that_does_not_fit_is_named(
    prepare: Path, saved: ModelRef, file: Path, tmp_path: Path,
    change: dict[str, Any] | None, more: dict[str, Any], words: str,
) -> None:  # fmt: skip
    other = tmp_path / "other.xz"
    if change is not None:
        rewritten(file, other, lambda lines: [lines[0] | change, *lines[1:]])
    with pytest.raises(BadData, match=f"labels.answers.written: .*{words}"):
        teach(prepare, saved, tmp_path, **written(other, **more))


def test_a_server_and_a_file_are_not_both_asked(file: Path) -> None:
    both = written(file, per_prompt=1, temperature=0) | {"labels.server": {"url": "http://nobody"}}
    with pytest.raises(ValueError, match=r"labels.server and labels.answers.written both"):
        tiny_config(CONFIG | both)


def test_a_prompt_is_known_by_its_tokens_whatever_holds_them() -> None:
    assert prompt_hash([1, 70_000]) == prompt_hash(np.array([1, 70_000], np.uint32))
    assert prompt_hash([1, 2]) != prompt_hash([2, 1]) != prompt_hash([2, 1, 0])
