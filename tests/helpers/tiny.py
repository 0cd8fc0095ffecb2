"""Finished `prepare` and `teach` folders over random tokens, and configs, models and jobs that fit them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from jobs.executors.inline import InlineExecutor
from pipeline.config.schema import Config
from pipeline.models.export import export_model
from pipeline.models.load import ModelRef
from pipeline.observe.training import read_metrics
from pipeline.store.files import write_array, write_rows
from pipeline.store.rows import Prompt
from pipeline.train.job import TrainJob, run_job
from pipeline.train.target.teacher import ContinueTask, LabelTask, Teacher
from tests.helpers.configs import MINIMAL

VOCABULARY = 97
SPECIALS = {"<pad>": 0, "<s>": 1, "</s>": 2}


def tiny_tokenizer(size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """One word a token: `w3 w4 …`, after pad, BOS and EOS."""
    words = SPECIALS | {f"w{number}": number for number in range(len(SPECIALS), size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def tiny_config(changes: dict[str, Any] | None = None) -> Config:
    """The small valid config with some dotted paths changed: `{"train.steps": 3}`."""
    values = copy.deepcopy(MINIMAL)
    for path, value in (changes or {}).items():
        *groups, last = path.split(".")
        group = values
        for name in groups:
            group = group.setdefault(name, {})
        group[last] = value
    return Config.model_validate(values)


def numbers(rows: int, length: int, seed: int = 0) -> np.ndarray:
    """Random tokens [rows, length], none of them special."""
    rng = np.random.default_rng(seed)
    return rng.integers(len(SPECIALS), VOCABULARY, (rows, length)).astype(np.uint16)


def tiny_prompts(
    split: str, count: int, length: int, max_new_tokens: int, seed: int = 0, documents: int = 1_000
) -> list[Prompt]:
    """Random prompts; number i comes from document i modulo `documents`."""
    return [
        Prompt(
            prompt_id=f"{split}-{number}",
            document_id=f"{split}-document-{number % documents}",
            dataset="code",
            context=str(length),
            split=split,  # type: ignore[arg-type]
            tokens=tokens.tolist(),
            max_new_tokens=max_new_tokens,
        )
        for number, tokens in enumerate(numbers(count, length, seed))
    ]


def write_prepare(
    folder: Path, config: Config, sequences: Sequence[int] = (16,), test_prompts: int = 4
) -> Path:
    """A `prepare` folder: `sequences[i]` training sequences in file i, validation and test prompts."""
    data = config.data
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    for number, rows in enumerate(sequences):
        array = numbers(rows, data.sequence_tokens, seed=10 + number)
        write_array(folder / "sequences" / f"train-{number:05d}.npy", array)
    length = data.contexts[0].tokens
    for split, count in (("validation", data.validation_prompts), ("test", test_prompts)):
        prompts = tiny_prompts(split, count, length, data.max_new_tokens, seed=len(split))
        write_rows(folder / "prompts" / f"{split}-code-{length}.jsonl", prompts)
    return folder


def save_model(model: PreTrainedModel, folder: Path) -> ModelRef:
    """The model as a Hugging Face folder with the tiny tokenizer."""
    export_model(model, tiny_tokenizer(), folder)
    return ModelRef(str(folder))


TRAIN: dict[str, Any] = {
    "train.steps": 12,
    "train.checkpoint_every": 5,
    "train.validate_every": 4,
    "train.validation_budgets": [16, "full"],
    "train.learning_rate": 3e-3,
    "train.warmup_steps": 3,
}


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def losses(folder: Path) -> list[dict[str, float]]:
    """The rows of a metrics file without what the clock says."""
    return [
        {key: value for key, value in row.items() if key != "train/tokens_per_s"}
        for row in read_metrics(folder / "metrics.jsonl")
    ]


def assert_same_run(folder: Path, expected: Path) -> None:
    """The same rows of losses and validation, and the same export, within fp32's rounding."""
    ours, theirs = losses(folder), losses(expected)
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for row, other in zip(ours, theirs, strict=True):
        assert row == pytest.approx(other, rel=1e-4), (folder, row["step"])
    exported, reference = weights(folder), weights(expected)
    assert exported.keys() == reference.keys()
    for name, value in reference.items():
        torch.testing.assert_close(exported[name], value, atol=1e-4, rtol=1e-4, msg=f"{folder}: {name}")


class Workshop:
    """A prepare and a teach folder of tiny models, and jobs over them."""

    def __init__(self, folder: Path, target: PreTrainedModel, start: PreTrainedModel) -> None:
        self.folder, self.config = folder, tiny_config(TRAIN)
        self.prepare = write_prepare(folder / "prepare", self.config)
        self.target, self.drafter = save_model(target, folder / "target"), save_model(start, folder / "start")
        self.teach = folder / "teach"
        teacher = Teacher(
            self.config, self.target, self.prepare / "tokenizer", self.teach, torch.device("cpu")
        )
        teacher(LabelTask(self.prepare / "sequences" / "train-00000.npy", 0, 16, 0, 0))
        for file in sorted((self.prepare / "prompts").glob("*.jsonl")):
            teacher(ContinueTask(file))

    def job(self, name: str, changes: dict[str, Any] | None = None) -> TrainJob:
        """Train every variant, or `multi_view` alone where the changes name none, into `name/variant`."""
        config = tiny_config(TRAIN | (changes or {}))
        names = (
            [v.name for v in config.train.variants] if "train.variants" in (changes or {}) else ["multi_view"]
        )
        outputs = {variant: self.folder / name / variant for variant in names}
        return TrainJob(config, outputs, self.prepare, self.teach, self.drafter, self.target)

    def train(self, name: str, changes: dict[str, Any] | None = None) -> Path:
        """Train in this process; the folder of the last variant."""
        job = self.job(name, changes)
        InlineExecutor(job.config).train(run_job, job)
        return list(job.outputs.values())[-1]
