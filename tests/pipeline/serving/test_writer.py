"""A server that writes in a target's place: its texts are the target's, or refused, or the run ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import GenerationConfig

from jobs.stages.teach import make_teacher
from pipeline.errors import BadData, Incomplete
from pipeline.models.load import ModelRef
from pipeline.serving.client import Reply
from pipeline.serving.writer import ServedTexts
from pipeline.store.files import read_rows, write_rows
from pipeline.store.rows import Prompt
from pipeline.train.target.teacher import AnswerTask, LabelTask, TeachCounts, is_on_policy
from tests.helpers.fake_server import Fake, greedy_texts, serving
from tests.helpers.tiny import (
    VOCABULARY,
    save_model,
    tiny_config,
    tiny_prompts,
    tiny_tokenizer,
    write_prepare,
)

LENGTH, MOST, ROWS = 96, 24, 11
LENGTHS = (40, 40, 33, 40, 57, 57)
ASKING = {
    "kind": "text", "name": "code", "files": ["stdlib"], "ask": "What is this?\n\n{text}",
    "training_prompts": {40: len(LENGTHS)},
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "data.sources": [ASKING], "data.sequence_tokens": LENGTH, "labels.top_k": 5, "labels.batch_sequences": 4,
    "train.window_tokens": 12, "train.windows": 2, "train.min_prefix_tokens": 16,
    "train.batch_sequences": 2, "train.micro_batch_sequences": 2,
}  # fmt: skip
ON_POLICY = {"labels.on_policy_fraction": 0.6, "labels.on_policy_temperature": 0}
Text = Callable[[Sequence[int]], list[int]]


@pytest.fixture(scope="module")
def prepare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_prepare(tmp_path_factory.mktemp("prepare"), tiny_config(CONFIG), sequences=(ROWS,))
    write_rows(
        folder / "asked" / "train-code-72.jsonl",
        [
            tiny_prompts("train", 1, length, MOST, seed=at)[0].model_copy(update={"prompt_id": f"p{at}"})
            for at, length in enumerate(LENGTHS)
        ],
    )
    return folder


@pytest.fixture(scope="module")
def prompts(prepare: Path) -> list[Prompt]:
    return read_rows(prepare / "asked" / "train-code-72.jsonl", Prompt)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, make_model: Any, prompts: list[Prompt]) -> ModelRef:
    """A target with one EOS, a token that a text of its own has inside."""
    model, folder = make_model(layers=2, seed=3), tmp_path_factory.mktemp("target")
    free = greedy_texts(Path(save_model(model, folder / "free").path), MOST)(prompts[0].tokens)
    model.generation_config.eos_token_id = free[MOST // 2]
    return save_model(model, folder / "ending")


@pytest.fixture(scope="module")
def text(saved: ModelRef) -> Text:
    return greedy_texts(Path(saved.path), MOST)


@contextmanager
def serve(saved: ModelRef, text: Text, **changes: Any) -> Iterator[Fake]:
    eos = GenerationConfig.from_pretrained(saved.path).eos_token_id
    with serving(Fake(text, eos=frozenset([eos]), spell=tiny_tokenizer().decode, **changes)) as server:
        yield server


def teach(
    task: AnswerTask | LabelTask, prepare: Path, saved: ModelRef, output: Path, **changes: Any
) -> TeachCounts:
    teacher = make_teacher(tiny_config(CONFIG | changes), saved, prepare / "tokenizer", output)
    return teacher(task)


def served_by(server: Fake, **changes: Any) -> dict[str, Any]:
    return {"labels.server": {"url": server.url, **changes}}


def answers(prepare: Path, first: int = 0, last: int = len(LENGTHS), shard: int = 0) -> AnswerTask:
    return AnswerTask(prepare / "asked" / "train-code-72.jsonl", first, last, shard)


def sequences(prepare: Path) -> LabelTask:
    return LabelTask(prepare / "sequences" / "train-00000.npy", 0, ROWS, 0, 0)


def stored(output: Path) -> dict[str, np.ndarray]:
    """Every file but the agreement, by its name."""
    files = sorted((output / "labels").glob("*.npy"))
    return {file.name: np.load(file) for file in files if ".agreement." not in file.name}


def assert_same(one: Path, two: Path) -> None:
    ours, theirs = stored(one), stored(two)
    assert ours.keys() == theirs.keys() and ours
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], name)


@pytest.mark.parametrize("fault", ["", "no_ids"])
def test_answers_of_the_same_target_are_as_if_it_had_written_them(
    prepare: Path, saved: ModelRef, prompts: list[Prompt], text: Text, tmp_path: Path, fault: str
) -> None:
    """With token ids and from text alone, to the last log-probability."""
    alone = teach(answers(prepare), prepare, saved, tmp_path / "alone")
    with serve(saved, text, fault=fault) as server:
        counts = teach(answers(prepare), prepare, saved, tmp_path / "served", **served_by(server))
    assert len({len(text(prompt.tokens)) for prompt in prompts}) > 1, "no text ends early"
    assert_same(tmp_path / "served", tmp_path / "alone")
    assert (counts.answers, counts.answer_tokens) == (alone.answers, alone.answer_tokens)
    assert (counts.served, counts.refused, alone.served) == (len(LENGTHS), 0, 0)
    assert sorted(asked["prompt"] for asked in server.asked) == sorted(prompt.tokens for prompt in prompts)
    assert {(asked["max_tokens"], asked["temperature"]) for asked in server.asked} == {(MOST, 0)}
    assert np.load(tmp_path / "served" / "labels" / "answers-00000.agreement.npy").tolist() == [1.0] * 6


def test_on_policy_texts_of_the_same_target_are_as_if_it_had_written_them(
    prepare: Path, saved: ModelRef, tmp_path: Path
) -> None:
    alone = teach(sequences(prepare), prepare, saved, tmp_path / "alone", **ON_POLICY)
    with serve(saved, greedy_texts(Path(saved.path), MOST, ends=False)) as server:
        changes = ON_POLICY | served_by(server)
        counts = teach(sequences(prepare), prepare, saved, tmp_path / "served", **changes)
    assert_same(tmp_path / "served", tmp_path / "alone")
    written = sum(is_on_policy(42, row, 0.6) for row in range(ROWS))
    assert (counts.served, counts.refused, counts.on_policy) == (written, 0, alone.on_policy)
    assert 2 < written < ROWS and len(server.asked) == written
    assert {asked["min_tokens"] for asked in server.asked} == {MOST}


def off_by_one(text: Text, prompt: Prompt) -> Text:
    """Another last token of one text."""

    def other(tokens: Sequence[int]) -> list[int]:
        *begun, last = text(tokens)
        return [*begun, 3 + (last - 2) % (VOCABULARY - 3) if list(tokens) == prompt.tokens else last]

    return other


def full_length(text: Text, prompts: list[Prompt]) -> Prompt:
    return next(prompt for prompt in prompts if len(text(prompt.tokens)) == MOST)


def rows_of(output: Path) -> list[tuple[int, ...]]:
    return sorted(map(tuple, stored(output)["answers-00000.tokens.npy"].tolist()))


def test_a_text_that_parts_from_the_target_is_refused_and_the_target_writes_it(
    prepare: Path, saved: ModelRef, prompts: list[Prompt], text: Text, tmp_path: Path
) -> None:
    teach(answers(prepare), prepare, saved, tmp_path / "alone")
    other = full_length(text, prompts)
    with serve(saved, off_by_one(text, other)) as server:
        counts = teach(answers(prepare), prepare, saved, tmp_path / "served", **served_by(server))
        again = teach(answers(prepare), prepare, saved, tmp_path / "served", **served_by(server))
        taken = teach(
            answers(prepare), prepare, saved, tmp_path / "lenient", **served_by(server, least_agreement=0.95)
        )
    assert (counts.served, counts.refused) == (len(LENGTHS), 1) and again == counts
    shares = np.load(tmp_path / "served" / "labels" / "answers-00000.agreement.npy")
    assert sorted(shares)[:2] == [(MOST - 1) / MOST, 1.0]
    assert rows_of(tmp_path / "served") == rows_of(tmp_path / "alone")
    assert taken.refused == 0 and rows_of(tmp_path / "lenient") != rows_of(tmp_path / "alone")
    # Rows are in another order, so labels are compared by the text that they belong to.
    for folder in ("served", "alone"):
        files = stored(tmp_path / folder)
        order = np.lexsort(files["answers-00000.tokens.npy"].T)
        for name, array in files.items():
            np.save(tmp_path / folder / "labels" / name, array[order])
    assert_same(tmp_path / "served", tmp_path / "alone")


def test_an_on_policy_text_that_parts_is_refused_too(prepare: Path, saved: ModelRef, tmp_path: Path) -> None:
    teach(sequences(prepare), prepare, saved, tmp_path / "alone", **ON_POLICY)
    own = greedy_texts(Path(saved.path), MOST, ends=False)
    begun = np.load(sequences(prepare).sequences)[:, : LENGTH - MOST].tolist()
    (first,) = tiny_prompts("train", 1, 4, MOST)
    row = next(row for row in range(ROWS) if is_on_policy(42, row, 0.6))
    with serve(saved, off_by_one(own, first.model_copy(update={"tokens": begun[row]}))) as server:
        changes = ON_POLICY | served_by(server)
        counts = teach(sequences(prepare), prepare, saved, tmp_path / "served", **changes)
    assert counts.refused == 1
    assert_same(tmp_path / "served", tmp_path / "alone")


def test_a_text_that_its_tokens_do_not_spell_is_refused(
    prepare: Path, saved: ModelRef, prompts: list[Prompt], text: Text, tmp_path: Path
) -> None:
    """As where a cut text ends within a character."""
    teach(answers(prepare), prepare, saved, tmp_path / "alone")
    cut = tiny_tokenizer().decode(text(full_length(text, prompts).tokens))

    def spell(tokens: Sequence[int]) -> str:
        spelled = tiny_tokenizer().decode(tokens)
        return f"{spelled}\ufffd" if spelled == cut else spelled

    fake = Fake(text, fault="no_ids", spell=spell)
    fake.eos = frozenset([GenerationConfig.from_pretrained(saved.path).eos_token_id])
    with serving(fake) as server:
        counts = teach(answers(prepare), prepare, saved, tmp_path / "served", **served_by(server))
    assert counts.refused == 1 and rows_of(tmp_path / "served") == rows_of(tmp_path / "alone")


@pytest.mark.parametrize("asked", ["answers", "on_policy"])
def test_another_model_ends_the_run(
    prepare: Path, saved: ModelRef, make_model: Any, tmp_path: Path, asked: str
) -> None:
    other = save_model(make_model(layers=2, seed=9), tmp_path / "other")
    task = answers(prepare) if asked == "answers" else sequences(prepare)
    more = {} if asked == "answers" else ON_POLICY
    words = r"of \d+ tokens that http.*wrote, \d+\.\d+% are the target's arg-max, and 98.00% have to be"
    with serve(saved, greedy_texts(Path(other.path), MOST)) as server, pytest.raises(BadData, match=words):
        teach(task, prepare, saved, tmp_path, **more, **served_by(server))
    assert not list(tmp_path.glob("labels/*"))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"fault": "refuse"}, BadData, "prompt p3: .* answers 400: .*longer than the model can take"),
        ({"fault": "error"}, BadData, "prompt p3: .*out of memory"),
        ({"fault": "other_tokenizer"}, BadData, r"prompt p3: .* read \d+ tokens of a prompt of \d+"),
        ({"fault": "cut"}, Incomplete, "prompt p3: .*the same command goes on"),
        ({"fault": "hang"}, Incomplete, "prompt p3: .*the same command goes on"),
        ({"models": ("a", "b")}, BadData, "serves a, b: name one with .*labels.server.model"),
    ],
)
def test_a_server_that_misbehaves_ends_the_run_and_leaves_nothing_half_done(
    prepare: Path,
    saved: ModelRef,
    text: Text,
    tmp_path: Path,
    changes: dict[str, Any],
    error: Any,
    words: str,
) -> None:
    with serve(saved, text, only=3, **changes) as server, pytest.raises(error, match=words):
        one_by_one = served_by(server, requests_at_once=1, timeout_s=2)
        teach(answers(prepare), prepare, saved, tmp_path, **one_by_one)
    assert not list(tmp_path.glob("labels/*"))


def test_what_is_written_is_not_asked_for_again(
    prepare: Path, saved: ModelRef, text: Text, tmp_path: Path
) -> None:
    """A server goes down before the second task; a run that goes on asks for the rest alone."""
    first, second = answers(prepare, 0, 3, 0), answers(prepare, 3, 6, 1)
    with serve(saved, text) as server:
        counts = teach(first, prepare, saved, tmp_path, **served_by(server))
    down = served_by(server)
    with pytest.raises(Incomplete, match=r"does not answer .*is the server up"):
        teach(second, prepare, saved, tmp_path, **down)
    assert teach(first, prepare, saved, tmp_path, **down) == counts
    assert {name.split(".")[0] for name in stored(tmp_path)} == {"answers-00000"}
    with serve(saved, text) as server:
        teach(second, prepare, saved, tmp_path, **served_by(server))
    assert len(server.asked) == 3


def test_many_are_on_the_way_at_once(prepare: Path, saved: ModelRef, text: Text, tmp_path: Path) -> None:
    """Each waits until as many as are allowed have come."""
    together = threading.Barrier(3, timeout=60)

    def waits(prompt: Sequence[int]) -> list[int]:
        together.wait()
        return text(prompt)

    with serve(saved, waits) as server:
        more = served_by(server, requests_at_once=3)
        assert teach(answers(prepare), prepare, saved, tmp_path, **more).refused == 0


@pytest.mark.parametrize(
    ("tokens", "ended", "ends", "expected"),
    [
        ([5, 6, 7, 8], False, True, [5, 6, 7, 8]),
        ([5, 2], True, True, [5, 2]),
        ([5, 6], True, True, [5, 6, 2]),  # an EOS that is not given
        ([5, 2, 6, 7], False, True, [5, 2]),
        ([5, 6], False, True, None),  # ends before its limit, and not by itself
        ([5, 6, 7, 8], False, False, [5, 6, 7, 8]),
        ([5, 6, 2, 8], False, False, None),
        ([5, 6], True, False, None),
    ],
)
def test_where_texts_end(tokens: list[int], ended: bool, ends: bool, expected: list[int] | None) -> None:
    asked = tiny_config(CONFIG | {"labels.server": {"url": "http://nobody"}}).labels.server
    assert asked
    writer = ServedTexts(asked, tiny_tokenizer(), frozenset([2]), VOCABULARY)
    assert writer.tokens_of(Reply(tokens=tokens, ended=ended), 4, ends) == expected
    with pytest.raises(BadData, match="is it another model"):
        writer.tokens_of(Reply(tokens=[VOCABULARY]), 4, ends)
    several = ServedTexts(asked, tiny_tokenizer(), frozenset([2, 9]), VOCABULARY)
    assert several.tokens_of(Reply(tokens=[5, 6], ended=True), 4, True) is None
