"""Labels and continuations against transformers' own forward and `generate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from jobs.stages.teach import label_bytes, label_tasks
from pipeline.config.schema import Config
from pipeline.decode.sampling import Chance
from pipeline.errors import BadData, NotFinite
from pipeline.models.load import ModelRef
from pipeline.store.artifacts import Artifact
from pipeline.store.files import read_rows, write_rows
from pipeline.store.rows import Continuation, Prompt
from pipeline.train.target.teacher import ContinueTask, LabelTask, Teacher, is_on_policy
from tests.helpers.tiny import VOCABULARY, save_model, tiny_config, tiny_tokenizer, write_prepare

CPU = torch.device("cpu")
TOP_K = 5
LABELS: dict[str, Any] = {"labels.top_k": TOP_K, "labels.temperature": 1.7, "labels.batch_sequences": 3}
ROWS = 11


@pytest.fixture(scope="module")
def prepare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prepare(tmp_path_factory.mktemp("prepare"), tiny_config(), sequences=(ROWS, 4))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, target: PreTrainedModel) -> ModelRef:
    return save_model(target, tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def plain(saved: ModelRef) -> PreTrainedModel:
    """The target under transformers' own attention."""
    return AutoModelForCausalLM.from_pretrained(saved.path, attn_implementation="eager").eval()


def make_teacher(prepare: Path, saved: ModelRef, output: Path, config: Config) -> Teacher:
    return Teacher(config, saved, prepare / "tokenizer", output, CPU)


def whole_file(prepare: Path) -> LabelTask:
    return LabelTask(prepare / "sequences" / "train-00000.npy", 0, ROWS, 0, 0)


def sequences(prepare: Path) -> np.ndarray:
    return np.load(prepare / "sequences" / "train-00000.npy")


def shard(output: Path, name: str, number: int = 0) -> np.ndarray:
    return np.load(output / "labels" / f"shard-{number:05d}.{name}.npy")


@torch.no_grad()
def test_labels_are_the_plain_forwards_at_every_position(
    prepare: Path, saved: ModelRef, plain: PreTrainedModel, tmp_path: Path
) -> None:
    counts = make_teacher(prepare, saved, tmp_path, tiny_config(LABELS))(whole_file(prepare))
    assert (counts.sequences, counts.on_policy, counts.continuations) == (ROWS, 0, 0)
    rows = sequences(prepare)
    np.testing.assert_array_equal(shard(tmp_path, "tokens"), rows)
    logits = plain(input_ids=torch.from_numpy(rows.astype(np.int64))).logits
    np.testing.assert_array_equal(shard(tmp_path, "argmax"), logits.argmax(-1))
    log_p = (logits / 1.7).log_softmax(-1)
    ids = torch.from_numpy(shard(tmp_path, "ids").astype(np.int64))
    assert ids.shape == (ROWS, 96, TOP_K) and shard(tmp_path, "log_probs").dtype == np.float16
    stored = shard(tmp_path, "log_probs").astype(np.float32)
    np.testing.assert_allclose(stored, log_p.gather(-1, ids), rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(stored, log_p.topk(TOP_K, dim=-1).values, rtol=2e-3, atol=2e-3)


def test_arg_max_alone_is_stored_unless_more_is_asked_for(
    prepare: Path, saved: ModelRef, tmp_path: Path
) -> None:
    make_teacher(prepare, saved, tmp_path, tiny_config())(whole_file(prepare))
    names = {file.name for file in (tmp_path / "labels").iterdir()}
    assert names == {"shard-00000.tokens.npy", "shard-00000.argmax.npy"}


@pytest.mark.parametrize("top_k", [0, TOP_K])
def test_label_bytes_are_predicted(prepare: Path, saved: ModelRef, tmp_path: Path, top_k: int) -> None:
    config = tiny_config({"labels.top_k": top_k})
    make_teacher(prepare, saved, tmp_path, config)(whole_file(prepare))
    written = sum(np.load(file).nbytes for file in (tmp_path / "labels").iterdir())
    assert label_bytes(config, ROWS, 0, VOCABULARY) == written


def test_a_part_of_a_file_gives_those_rows(prepare: Path, saved: ModelRef, tmp_path: Path) -> None:
    teacher = make_teacher(prepare, saved, tmp_path, tiny_config())
    teacher(whole_file(prepare))
    teacher(LabelTask(prepare / "sequences" / "train-00000.npy", 4, 9, 0, 3))
    for name in ("tokens", "argmax"):
        np.testing.assert_array_equal(shard(tmp_path, name, 3), shard(tmp_path, name)[4:9])


def test_tasks_cover_every_sequence_or_a_share_of_every_file(prepare: Path) -> None:
    artifact = Artifact(prepare, "prepare", "x")

    def taken(changes: dict[str, Any]) -> list[tuple[str, int, int, int, int]]:
        tasks = label_tasks(tiny_config(changes), artifact)
        return [(t.sequences.stem[-1], t.first, t.last, t.offset, t.shard) for t in tasks]

    assert taken({"labels.sequences_per_shard": 4}) == [
        ("0", 0, 4, 0, 0), ("0", 4, 8, 0, 1), ("0", 8, 11, 0, 2), ("1", 0, 4, 11, 3),
    ]  # fmt: skip
    fewer = taken({"labels.max_sequences": 8})
    assert {name for name, *_ in fewer} == {"0", "1"}
    assert 7 <= sum(last - first for _, first, last, *_ in fewer) <= 8


# ── on-policy continuations ───────────────────────────────────────────────────────────────────────


def generate(plain: PreTrainedModel, tokens: Tensor, count: int, eos: int | None = None) -> Tensor:
    plain.generation_config.eos_token_id = eos
    written = plain.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return written[:, tokens.shape[1] :]


@torch.no_grad()
def test_on_policy_sequences_end_in_the_targets_own_text(
    prepare: Path, saved: ModelRef, plain: PreTrainedModel, tmp_path: Path
) -> None:
    """Greedy, so it is what `generate` writes; the prefix and the other sequences stay, labels follow."""
    config = tiny_config(
        {"labels.on_policy_fraction": 0.5, "labels.on_policy_temperature": 0, "labels.batch_sequences": 3}
    )
    counts = make_teacher(prepare, saved, tmp_path, config)(whole_file(prepare))
    rows, written = sequences(prepare), shard(tmp_path, "tokens")
    chosen = [row for row in range(ROWS) if is_on_policy(config.seed, row, 0.5)]
    others = [row for row in range(ROWS) if row not in chosen]
    assert counts.on_policy == len(chosen) and chosen and others
    np.testing.assert_array_equal(written[others], rows[others])
    start = 96 - config.train.window_tokens
    np.testing.assert_array_equal(written[:, :start], rows[:, :start])
    prefixes = torch.from_numpy(rows[chosen, :start].astype(np.int64))
    np.testing.assert_array_equal(written[chosen, start:], generate(plain, prefixes, 96 - start))
    assert (written[chosen, start:] != rows[chosen, start:]).any()
    logits = plain(input_ids=torch.from_numpy(written.astype(np.int64))).logits
    np.testing.assert_array_equal(shard(tmp_path, "argmax"), logits.argmax(-1))
    # What the target wrote greedily is its own arg-max.
    np.testing.assert_array_equal(shard(tmp_path, "argmax")[chosen, start - 1 : -1], written[chosen, start:])


def test_sampled_on_policy_text_depends_on_the_seed_alone(
    prepare: Path, saved: ModelRef, tmp_path: Path
) -> None:
    texts = {}
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        config = tiny_config(
            {"labels.on_policy_fraction": 1, "labels.on_policy_temperature": 2, "seed": seed}
        )
        make_teacher(prepare, saved, tmp_path / name, config)(whole_file(prepare))
        texts[name] = shard(tmp_path / name, "tokens")
    np.testing.assert_array_equal(texts["one"], texts["again"])
    assert (texts["one"] != texts["two"]).any()


# ── continuations ─────────────────────────────────────────────────────────────────────────────────


def continued(prepare: Path, saved: ModelRef, output: Path) -> list[tuple[Prompt, Continuation]]:
    (file,) = (prepare / "prompts").glob("test-*.jsonl")
    counts = make_teacher(prepare, saved, output, tiny_config(LABELS))(ContinueTask(file))
    prompts = read_rows(file, Prompt)
    rows = read_rows(output / "continuations" / file.name, Continuation)
    assert counts.continuations == len(prompts)
    assert [row.prompt_id for row in rows] == [prompt.prompt_id for prompt in prompts]
    return list(zip(prompts, rows, strict=True))


@torch.no_grad()
def test_continuations_are_greedy_generation_with_its_gaps(
    prepare: Path, saved: ModelRef, plain: PreTrainedModel, tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer()
    for prompt, row in continued(prepare, saved, tmp_path):
        tokens = torch.tensor([prompt.tokens])
        assert row.tokens == generate(plain, tokens, 16)[0].tolist()
        assert row.eos_at is None and row.prompt_tokens == 64 and row.correct is None
        logits = plain(input_ids=torch.tensor([prompt.tokens + row.tokens])).logits[0, 63:-1]
        best = logits.sort(dim=-1, descending=True).values
        np.testing.assert_allclose(row.gaps, best[:, 0] - best[:, 1], atol=1e-3)
        assert row.text == tokenizer.decode(row.tokens)
        assert (row.document_id, row.dataset, row.context, row.split) == (
            prompt.document_id, prompt.dataset, prompt.context, prompt.split,
        )  # fmt: skip


def test_sampled_continuations_carry_the_targets_log_probabilities(
    prepare: Path, saved: ModelRef, plain: PreTrainedModel, tmp_path: Path
) -> None:
    """Beside the greedy ones, by temperature and seed; repeated, they are the same."""
    (file,) = (prepare / "prompts").glob("test-*.jsonl")
    chances = [Chance(0.7, 3), Chance(0.7, 4), Chance(0.0, 0)]
    texts = {}
    for folder in ("one", "two"):
        teacher = make_teacher(prepare, saved, tmp_path / folder, tiny_config())
        for chance in chances:
            teacher(ContinueTask(file, chance))
    for chance, name in zip(chances, ("-t0.7-s3", "-t0.7-s4", ""), strict=True):
        files = [tmp_path / f / "continuations" / f"{file.stem}{name}.jsonl" for f in ("one", "two")]
        first, again = (read_rows(one, Continuation) for one in files)
        assert first == again
        texts[chance] = [tuple(row.tokens) for row in first]
        for prompt, row in zip(read_rows(file, Prompt), first, strict=True):
            assert (row.temperature, row.seed) == (chance.temperature, chance.seed)
            if chance.temperature == 0:
                assert row.log_probs == []
                continue
            with torch.no_grad():
                logits = plain(input_ids=torch.tensor([prompt.tokens + row.tokens])).logits[0]
            own = (logits[len(prompt.tokens) - 1 : -1] / chance.temperature).log_softmax(-1)
            expected = own.gather(1, torch.tensor(row.tokens).unsqueeze(1)).squeeze(1)
            torch.testing.assert_close(torch.tensor(row.log_probs), expected, atol=2e-3, rtol=1e-3)
    assert texts[chances[0]] != texts[chances[1]] != texts[chances[2]]


def test_continuations_end_with_eos(
    prepare: Path, saved: ModelRef, plain: PreTrainedModel, target: PreTrainedModel, tmp_path: Path
) -> None:
    """A token that one continuation has inside is made EOS: that one is cut after it, as `generate` does."""
    pairs = continued(prepare, saved, tmp_path / "without")
    eos = pairs[0][1].tokens[6]
    target.generation_config.eos_token_id = eos
    try:
        stopping = save_model(target, tmp_path / "stopping")
    finally:
        target.generation_config.eos_token_id = None
    ends = 0
    for (prompt, row), (_, longer) in zip(
        continued(prepare, stopping, tmp_path / "with"), pairs, strict=True
    ):
        assert row.tokens == generate(plain, torch.tensor([prompt.tokens]), 16, eos)[0].tolist()
        assert len(row.gaps) == len(row.tokens) and row.gaps == longer.gaps[: len(row.gaps)]
        assert row.eos_at == (row.tokens.index(eos) if eos in longer.tokens else None)
        ends += row.eos_at is not None
    assert ends >= 1 and pairs[0][1].tokens.index(eos) <= 6


def test_scored_prompts_are_scored(prepare: Path, saved: ModelRef, tmp_path: Path) -> None:
    (file,) = (prepare / "prompts").glob("test-*.jsonl")
    prompts = read_rows(file, Prompt)
    (_, row), *_ = continued(prepare, saved, tmp_path)
    right, wrong = row.text.split()[3], "nowhere"
    teacher = make_teacher(prepare, saved, tmp_path, tiny_config())
    scored = [
        prompts[0].model_copy(update={"answers": answers, "scoring": "contains"})
        for answers in ([right], [right, wrong])
    ]
    assert [row.correct for row in teacher.continuations(scored)] == [True, False]


# ── what is there, and what is wrong ──────────────────────────────────────────────────────────────


def test_what_is_there_is_not_redone(
    prepare: Path, saved: ModelRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = make_teacher(prepare, saved, tmp_path, tiny_config(LABELS | {"labels.on_policy_fraction": 0.5}))
    (file,) = (prepare / "prompts").glob("test-*.jsonl")
    tasks = [whole_file(prepare), ContinueTask(file)]
    counts = [teacher(task) for task in tasks]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the target was asked")

    with monkeypatch.context() as patch:
        patch.setattr(teacher.target, "forward", refuse)
        patch.setattr(teacher.writer, "prefill", refuse)
        assert [teacher(task) for task in tasks] == counts
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    # Without the file that is written last, the shard is made again, and is the same.
    last = tmp_path / "labels" / "shard-00000.argmax.npy"
    content = {path: path.read_bytes() for path in last.parent.iterdir()}
    last.unlink()
    teacher(tasks[0])
    assert {path: path.read_bytes() for path in last.parent.iterdir()} == content


def test_a_prompt_with_a_token_that_the_target_does_not_know_is_named(
    prepare: Path, saved: ModelRef, tmp_path: Path
) -> None:
    """As where a pad token was added to the tokenizer alone, and stands in a text."""
    (file,) = (prepare / "prompts").glob("test-*.jsonl")
    first, *others = read_rows(file, Prompt)
    first.tokens[3] = VOCABULARY
    write_rows(tmp_path / file.name, [first, *others])
    teacher = make_teacher(prepare, saved, tmp_path, tiny_config())
    with pytest.raises(
        BadData, match=f"the prompt {first.prompt_id} .*which the target has no embedding for"
    ):
        teacher(ContinueTask(tmp_path / file.name))
    assert not list(tmp_path.glob("continuations/*"))


def test_a_target_that_is_not_finite_stops(
    prepare: Path, target: PreTrainedModel, make_model: Any, tmp_path: Path
) -> None:
    broken = make_model(seed=1)
    broken.model.norm.weight.data.fill_(float("nan"))
    teacher = make_teacher(prepare, save_model(broken, tmp_path / "broken"), tmp_path, tiny_config())
    (file,) = (prepare / "prompts").glob("test-*.jsonl")
    for task in (whole_file(prepare), ContinueTask(file)):
        with pytest.raises(NotFinite, match="broken: logits not finite"):
            teacher(task)
    assert not list(tmp_path.glob("labels/*")) and not list(tmp_path.glob("continuations/*"))


def test_settings_of_the_target_that_are_not_heeded_are_told_once(
    prepare: Path, target: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ref = save_model(target, tmp_path / "target")
    settings = {"eos_token_id": [2, VOCABULARY + 3], "do_sample": True, "temperature": 0.6}
    (tmp_path / "target" / "generation_config.json").write_text(json.dumps(settings))
    teacher = make_teacher(prepare, ref, tmp_path / "out", tiny_config())
    for file in sorted((prepare / "prompts").glob("*.jsonl")):
        teacher(ContinueTask(file))
    assert [record.message for record in caplog.records if record.name.startswith("pipeline.models")] == [
        f"{ref.path}: its generation_config asks for temperature 0.6, which is not done: texts are greedy, "
        "or drawn from the model's own probabilities at the config's temperatures",
        f"{ref.path}: eos_token_id [{VOCABULARY + 3}] has no logit and ends no text",
    ]
