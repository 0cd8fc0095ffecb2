"""The target's own answers: written as plain generation writes them, learned from where they have labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from jobs.stages.teach import answer_tasks, label_bytes
from pipeline.errors import BadData
from pipeline.models.draft_vocabulary import restrict
from pipeline.models.load import ModelRef
from pipeline.store.artifacts import Artifact
from pipeline.store.files import write_rows
from pipeline.store.rows import Prompt
from pipeline.train.batches import LabelledSequences, draw
from pipeline.train.objectives import MultiView
from pipeline.train.target.teacher import AnswerTask, Teacher
from tests.helpers.tiny import VOCABULARY, save_model, tiny_config, tiny_prompts, tiny_tokenizer
from tests.helpers.training import CPU

LENGTH, WINDOW, WINDOWS = 96, 12, 2
LENGTHS = (40, 40, 33, 40, 57)
ASKING = {
    "kind": "text",
    "name": "code",
    "files": ["stdlib"],
    "ask": "What is this?\n\n{text}",
    "training_prompts": {40: len(LENGTHS)},
}
CONFIG = {
    "data.sources": [ASKING],
    "data.sequence_tokens": LENGTH,
    "labels.top_k": 5,
    "labels.batch_sequences": 4,
    "train.window_tokens": WINDOW,
    "train.windows": WINDOWS,
    "train.min_prefix_tokens": 16,
    "train.batch_sequences": 2,
    "train.micro_batch_sequences": 2,
}
MOST = WINDOW * WINDOWS


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepare folder with training prompts of several lengths."""
    folder: Path = tmp_path_factory.mktemp("asked")
    prompts = [
        tiny_prompts("train", 1, length, MOST, seed=number)[0].model_copy(update={"prompt_id": f"p{number}"})
        for number, length in enumerate(LENGTHS)
    ]
    write_rows(folder / "asked" / "train-code-72.jsonl", prompts)
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, make_model: Any) -> ModelRef:
    """A target that ends some of its texts early."""
    model = make_model(layers=2, seed=3)
    model.generation_config.eos_token_id = list(range(3, 12))
    return save_model(model, tmp_path_factory.mktemp("target"))


def teacher(asked: Path, saved: ModelRef, output: Path, **changes: Any) -> Teacher:
    return Teacher(tiny_config(CONFIG | changes), saved, asked / "tokenizer", output, CPU)


def task(asked: Path, first: int = 0, last: int = len(LENGTHS)) -> AnswerTask:
    return AnswerTask(asked / "asked" / "train-code-72.jsonl", first, last, 0)


def arrays(output: Path) -> dict[str, np.ndarray]:
    return {
        file.name.split(".")[1]: np.load(file) for file in (output / "labels").glob("answers-00000.*.npy")
    }


@torch.no_grad()
def test_answers_are_plain_greedy_generation_and_end_where_it_ends(
    asked: Path, saved: ModelRef, tmp_path: Path
) -> None:
    counts = teacher(asked, saved, tmp_path)(task(asked))
    plain = AutoModelForCausalLM.from_pretrained(saved.path, attn_implementation="eager").eval()
    stored, ends = arrays(tmp_path), set(plain.generation_config.eos_token_id)
    prompts = [Prompt.model_validate_json(line) for line in task(asked).prompts.read_text().splitlines()]
    expected = {}
    for prompt in prompts:
        tokens = torch.tensor([prompt.tokens])
        text = plain.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=MOST,
            do_sample=False,
            pad_token_id=0,
        )[0].tolist()
        learned = len(text) - len(prompt.tokens) - (text[-1] in ends)
        if learned:
            expected[len(prompt.tokens), learned, *text] = text
    assert len(expected) >= 3 and counts.answers == len(expected)
    assert len({key[1] for key in expected}) > 1, "all answers are of one length: nothing ends early"
    for row, prefix, supervised in zip(
        stored["tokens"].tolist(), stored["prefix"], stored["supervised"], strict=True
    ):
        length = next(len(text) for key, text in expected.items() if list(key[2:]) == row[: len(text)])
        assert not any(row[length:])
        assert (prefix, supervised) in {key[:2] for key in expected}
    assert counts.answer_tokens == sum(key[1] for key in expected)


@torch.no_grad()
def test_labels_are_the_plain_forwards_where_answers_are_learned_from(
    asked: Path, saved: ModelRef, tmp_path: Path
) -> None:
    teacher(asked, saved, tmp_path)(task(asked))
    plain = AutoModelForCausalLM.from_pretrained(saved.path, attn_implementation="eager").eval()
    stored = arrays(tmp_path)
    assert stored["argmax"].shape[1] == MOST and stored["ids"].shape[1:] == (MOST, 5)
    for number, (prefix, learned) in enumerate(zip(stored["prefix"], stored["supervised"], strict=True)):
        logits = plain(torch.from_numpy(stored["tokens"][number : number + 1].astype(np.int64))).logits[0]
        answer = logits[prefix : prefix + learned]
        np.testing.assert_array_equal(stored["argmax"][number, :learned], answer.argmax(-1))
        ids = torch.from_numpy(stored["ids"][number, :learned].astype(np.int64))
        log_p = answer.log_softmax(-1).gather(-1, ids)
        np.testing.assert_allclose(stored["log_probs"][number, :learned], log_p, rtol=2e-3, atol=2e-3)


def test_several_answers_to_a_prompt_differ_and_depend_on_the_seed_alone(
    asked: Path, saved: ModelRef, tmp_path: Path
) -> None:
    three = {"labels.answers": {"per_prompt": 3, "temperature": 1.5}}
    for name, batch in (("a", 4), ("b", 9), ("other", 4)):
        changes = three | {"labels.batch_sequences": batch, "seed": 5 if name == "other" else 42}
        teacher(asked, saved, tmp_path / name, **changes)(task(asked))
    one, two, other = (
        sorted(map(tuple, arrays(tmp_path / name)["tokens"].tolist())) for name in ("a", "b", "other")
    )
    assert one == two != other
    assert len(set(one)) == len(one) > len(LENGTHS)


def test_the_bytes_of_answers_are_predicted_where_none_ends_at_once(
    asked: Path, saved: ModelRef, tmp_path: Path
) -> None:
    never = tiny_config(CONFIG)
    one = Teacher(never, saved, asked / "tokenizer", tmp_path, CPU)
    one.target.generation_config.eos_token_id = None
    assert one(task(asked)).answers == len(LENGTHS)
    written = sum(array.nbytes for array in arrays(tmp_path).values())
    assert label_bytes(never, 0, len(LENGTHS), VOCABULARY) == written


def test_tasks_cover_every_prompt_in_whole_prompts(asked: Path) -> None:
    changes = CONFIG | {
        "labels.sequences_per_shard": 5,
        "labels.answers": {"per_prompt": 2, "temperature": 1.0},
    }
    tasks = answer_tasks(tiny_config(changes), Artifact(asked, "prepare", "x"))
    assert [(t.first, t.last, t.shard) for t in tasks] == [(0, 2, 0), (2, 4, 1), (4, 5, 2)]


def test_a_prompt_with_a_token_that_the_target_does_not_know_is_named(
    saved: ModelRef, asked: Path, tmp_path: Path
) -> None:
    (prompt,) = tiny_prompts("train", 1, 20, MOST)
    write_rows(tmp_path / "p.jsonl", [prompt.model_copy(update={"tokens": [*prompt.tokens, VOCABULARY]})])
    with pytest.raises(BadData, match="train-0"):
        teacher(asked, saved, tmp_path)(AnswerTask(tmp_path / "p.jsonl", 0, 1, 0))


# ── learning from them ────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def data(asked: Path, saved: ModelRef, tmp_path_factory: pytest.TempPathFactory) -> LabelledSequences:
    """Answers, and a shard of plain text beside them."""
    output: Path = tmp_path_factory.mktemp("labels")
    teacher(asked, saved, output)(task(asked))
    rng = np.random.default_rng(4)
    tokens = rng.integers(3, VOCABULARY, (3, LENGTH)).astype(np.uint16)
    ids = np.argsort(rng.random((3, LENGTH, VOCABULARY)))[..., :5].astype(np.uint16)
    log_probs = np.sort(-rng.random((3, LENGTH, 5)) - 2).astype(np.float16)
    for name, array in (("tokens", tokens), ("ids", ids), ("log_probs", log_probs), ("argmax", ids[..., 0])):
        np.save(output / "labels" / f"shard-00000.{name}.npy", array)
    return LabelledSequences(output / "labels", 1.0)


@torch.no_grad()
@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
@pytest.mark.parametrize("budgets", [{}, {80: 1.0}])
def test_a_loss_is_the_mean_over_what_is_learned_from(
    data: LabelledSequences, make_model: Any, loss: str, budgets: dict[int, float]
) -> None:
    """Against plain forwards of whole sequences: the budget keeps every prefix whole."""
    variant = {"name": "v", "budgets": budgets, "sparse_weight": 0.5 if budgets else 0, "num_views": 1}
    variant |= {"full_loss": loss, "sparse_loss": loss}
    config = tiny_config(CONFIG | {"train.variants": [variant]})
    model = make_model(layers=2, seed=8).double().eval()
    objective = MultiView(config, config.train.variants[0], data, [], CPU)
    kinds = set()
    for step in range(4):
        total, told = objective.loss(model, step, 0)
        rows = objective.rows(step, 0)
        kinds |= {bool(data.prefix[row] < 0) for row in rows}
        losses = [own_losses(objective, model, data, row, step, loss) for row in rows]
        assert float(told["full"]) == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
        expected = float(torch.cat(losses).mean()) * (1.5 if budgets else 1.0)
        assert float(total) == pytest.approx(expected, rel=1e-5)
    assert kinds == {True, False}


def own_losses(
    objective: MultiView, model: PreTrainedModel, data: LabelledSequences, row: int, step: int, loss: str
) -> torch.Tensor:
    """The losses of a row's learned positions, from one forward pass over the whole row."""
    config, prefix, learned = objective.config, int(data.prefix[row]), int(data.supervised[row])
    tokens = data.tokens.rows([row])
    log_q = model(input_ids=tokens, use_cache=False).logits[0].log_softmax(-1)
    if prefix >= 0:
        places, first = list(range(prefix, prefix + learned)), prefix
    else:
        drawn = draw(objective.variant, config.train, LENGTH, objective.seed, step, 0)
        places, first = [start + i for start in drawn.starts for i in range(WINDOW)], 0
    values = []
    for place in places:
        at = place - first
        if loss == "cross_entropy":
            values.append(-log_q[place, data.argmax.rows([row])[0, at]])
            continue
        assert data.ids and data.log_probs
        ids, log_p = data.ids.rows([row])[0, at], data.log_probs.rows([row])[0, at].double()
        inside = (log_p.exp() * (log_p - log_q[place, ids])).sum()
        rest_p, rest_q = 1 - log_p.exp().sum(), 1 - log_q[place, ids].exp().sum()
        values.append(inside + rest_p * (rest_p.log() - rest_q.log()))
    return torch.stack(values)


def test_the_draft_vocabulary_counts_what_is_learned_from(data: LabelledSequences) -> None:
    expected = np.zeros(VOCABULARY, int)
    for row in range(len(data)):
        labels, learned = data.argmax.rows([row])[0], int(data.supervised[row])
        for token in labels if learned < 0 else labels[:learned]:
            expected[token] += 1
    np.testing.assert_array_equal(data.counts(VOCABULARY), expected)


def test_positions_outside_a_draft_vocabulary_are_counted_where_they_are_learned_from(
    data: LabelledSequences, make_model: Any
) -> None:
    config = tiny_config(CONFIG | {"train.variants": [{"name": "v", "sparse_weight": 0}]})
    model = restrict(make_model(layers=1, seed=8).eval(), torch.arange(40))
    objective = MultiView(config, config.train.variants[0], data, [], CPU)
    row = next(row for row in range(len(data)) if data.prefix[row] >= 0)
    objective.rows = lambda step, micro: [row]  # type: ignore[method-assign]
    _, told = objective.loss(model, 0, 0)
    labels = data.argmax.rows([row])[0, : int(data.supervised[row])]
    assert float(told["outside"]) == pytest.approx(float((labels >= 40).double().mean()))
