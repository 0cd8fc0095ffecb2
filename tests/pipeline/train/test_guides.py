"""The target's guides as stage teach stores them, and views of training that are chosen by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from jobs.stages.teach import guides_identity, label_bytes
from pipeline.axes import FULL
from pipeline.decode.model import decode_model
from pipeline.kv.view_cache import read_prefix
from pipeline.kv.views import view_of
from pipeline.models.load import ModelRef
from pipeline.store.files import read_rows, write_rows
from pipeline.store.rows import Continuation, Prompt
from pipeline.train.batches import LabelledSequences, Windows, draw, window_guides, window_starts
from pipeline.train.objectives import MultiView
from pipeline.train.target.teacher import AnswerTask, ContinueTask, LabelTask, Teacher
from tests.helpers.tiny import VOCABULARY, save_model, tiny_config, tiny_prompts, write_prepare
from tests.helpers.training import CPU

ROWS, LENGTH, WINDOW, WINDOWS = 3, 96, 12, 2
GUIDED = {"name": "v", "policy": "target_guided", "budgets": {16: 1, 24: 1}}
ASKING = {"kind": "text", "name": "code", "files": ["stdlib"], "ask": "{text}", "training_prompts": {40: 2}}
CONFIG: dict[str, Any] = {
    "train.variants": [GUIDED], "train.window_tokens": WINDOW, "train.windows": WINDOWS,
    "labels.batch_sequences": 2, "data.sources": [ASKING],
}  # fmt: skip
ANSWERED = (40, 21)  # tokens of the prompts that are answered


@pytest.fixture(scope="module")
def prepare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_prepare(tmp_path_factory.mktemp("prepare"), tiny_config(CONFIG), sequences=(ROWS,))
    asked = [tiny_prompts("train", 1, length, WINDOW * WINDOWS, seed=length)[0] for length in ANSWERED]
    named = [prompt.model_copy(update={"prompt_id": f"p{at}"}) for at, prompt in enumerate(asked)]
    write_rows(folder / "asked" / "a.jsonl", named)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, target: PreTrainedModel) -> ModelRef:
    return save_model(target, tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def taught(prepare: Path, saved: ModelRef, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output: Path = tmp_path_factory.mktemp("teach")
    teacher = Teacher(tiny_config(CONFIG), saved, prepare / "tokenizer", output, CPU)
    teacher(LabelTask(prepare / "sequences" / "train-00000.npy", 0, ROWS, 0, 0))
    teacher(AnswerTask(prepare / "asked" / "a.jsonl", 0, 2, 0))
    for file in sorted((prepare / "prompts").glob("*.jsonl")):
        teacher(ContinueTask(file))
    return output


def guide_at(target: PreTrainedModel, tokens_1S: Tensor) -> list[int]:
    """The guide that a prefill of exactly this prefix gives."""
    S = tokens_1S.shape[1]
    (whole,), _ = decode_model(target).prefill(tokens_1S, [(S, FULL)])
    return whole.guiding()[S][0].tolist()


def test_windows_start_where_guides_are() -> None:
    config = tiny_config(CONFIG)
    known = set(window_starts(config.train, LENGTH))
    drawn = {
        start
        for step in range(300)
        for written in (False, True)
        for start in draw(config.train.variants[0], config.train, LENGTH, 0, step, 0, written).starts
    }
    assert drawn == known and min(known) == config.train.min_prefix_tokens


def test_the_stored_guide_is_that_of_a_prefill_cut_there(taught: Path, target: PreTrainedModel) -> None:
    stored, tokens = (np.load(taught / "labels" / f"shard-00000.{name}.npy") for name in ("guide", "tokens"))
    starts = window_starts(tiny_config(CONFIG).train, LENGTH)
    assert stored.dtype == np.uint16 and stored.shape == (ROWS, len(starts), 3)
    for row, text in zip(stored, tokens.astype(np.int64), strict=True):
        for found, start in zip(row.tolist(), starts, strict=True):
            guide = guide_at(target, torch.from_numpy(text[None, :start]))
            assert found == [*guide, *[LENGTH // 8] * 3][:3], "what is left over is no chunk"


def test_of_answers_there_is_a_guide_for_each_window(taught: Path, target: PreTrainedModel) -> None:
    names = ("guide", "tokens", "prefix")
    guides, tokens, prefixes = (np.load(taught / "labels" / f"answers-00000.{name}.npy") for name in names)
    assert sorted(prefixes.tolist()) == sorted(ANSWERED) and guides.shape == (2, WINDOWS, 3)
    for found, text, prefix in zip(guides.tolist(), tokens.astype(np.int64), prefixes, strict=True):
        for at in range(WINDOWS):
            start = int(prefix) + at * WINDOW
            guide = guide_at(target, torch.from_numpy(text[None, :start]))
            assert found[at] == [*guide, LENGTH // 8][:3]


def test_continuations_have_the_whole_guide_of_their_prompt(
    prepare: Path, taught: Path, target: PreTrainedModel
) -> None:
    for split in ("validation", "test"):
        (file,) = (prepare / "prompts").glob(f"{split}-*.jsonl")
        rows = read_rows(taught / "continuations" / file.name, Continuation)
        for prompt, row in zip(read_rows(file, Prompt), rows, strict=True):
            assert row.guide == guide_at(target, torch.tensor([prompt.tokens]))
            assert sorted(row.guide) == list(range(len(prompt.tokens) // 8))


def test_training_sees_the_view_of_a_prefill_cut_there(
    taught: Path, target: PreTrainedModel, drafter: PreTrainedModel
) -> None:
    """Of texts and of answers, in whatever rows they are read."""
    config, view = tiny_config(CONFIG), view_of("target_guided", 24)
    data = LabelledSequences(taught / "labels", 1.0)
    answers = [row for row in range(len(data)) if data.prefix[row] >= 0]
    texts = [row for row in range(len(data)) if data.prefix[row] < 0]
    starts = window_starts(config.train, LENGTH)
    groups = [Windows(texts, tuple(starts[-9::4])), Windows(texts[1:2], tuple(starts[:3]))]
    groups += [
        Windows([row], (int(data.prefix[row]), int(data.prefix[row]) + WINDOW)) for row in answers
    ]  # fmt: skip
    for windows in groups:
        guides, tokens = window_guides(data, windows, config.train, CPU), data.tokens.rows(windows.rows)
        cuts = [(start, view) for start in windows.starts]
        kept, _ = read_prefix(drafter, tokens[:, : max(windows.starts)], cuts, guides=guides)
        for ours, start in zip(kept, windows.starts, strict=True):
            (whole,), _ = read_prefix(target, tokens[:, :start], [(start, FULL)])
            (alone,), _ = read_prefix(drafter, tokens[:, :start], [(start, view)], guides=whole.guiding())
            for layers in zip(ours.layers, alone.layers, strict=True):
                torch.testing.assert_close(*layers)


def test_a_loss_reads_the_guides_and_another_choice_gives_another(
    taught: Path, drafter: PreTrainedModel
) -> None:
    config, data = tiny_config(CONFIG), LabelledSequences(taught / "labels", 1.0)
    prepared = MultiView(config, config.train.variants[0], data, [], CPU)
    _, told = prepared.loss(drafter, 0, 0)
    assert data.guides is not None
    data.guides.arrays = [np.array(array) for array in data.guides.arrays]
    for array in data.guides.arrays:
        array[..., 1] = 1  # the chunk behind the first, whatever the target looks at
    _, others = prepared.loss(drafter, 0, 0)
    assert told["full"].item() == others["full"].item() and told["sparse"].item() != others["sparse"].item()
    data.guides = None
    with pytest.raises(ValueError, match="target_guided needs a guide"):
        prepared.loss(drafter, 0, 0)


def test_bytes_are_predicted(taught: Path) -> None:
    config = tiny_config(CONFIG)
    written = sum(np.load(file).nbytes for file in (taught / "labels").iterdir())
    assert label_bytes(config, ROWS, len(ANSWERED), VOCABULARY) == written


def test_only_configs_with_guided_views_depend_on_them() -> None:
    assert not tiny_config().is_guided and tiny_config().guide_chunks == 0
    swept = tiny_config({"sweep.policies": ["target_guided"]})
    assert swept.is_guided and guides_identity(swept) == []
    assert guides_identity(tiny_config(CONFIG)) == [3, WINDOW, WINDOWS, 16]


def test_rows_of_before_are_read(taught: Path) -> None:
    row = read_rows(next((taught / "continuations").glob("test-*.jsonl")), Continuation)[0]
    before = row.model_dump(exclude={"guide"})
    assert Continuation.model_validate(before) == row.model_copy(update={"guide": []})


@pytest.mark.parametrize(
    "changes", [{"train.variants": [GUIDED]}, {"sweep.policies": ["target_guided"], "sweep.refresh": 2}]
)
def test_improving_has_no_guides(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="improve serves and judges without what the target says"):
        tiny_config({**changes, "improve": {"kl_steps": 0}})
