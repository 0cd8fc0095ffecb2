"""The paper's whole grid by replay, against measuring every cell of it.

The grid is that of `conf/paper/table-1.yaml`, with its three drafters; the models are tiny and random, the
prompts random tokens. Both sides use the same prefills, one for each model and prompt. Measuring is timed on
a random sample of cells × prompts, one run each, and extrapolated; only its decoding counts.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.rows import Row, row
from pipeline.axes import Cell, Place, View
from pipeline.config.files import load_config
from pipeline.config.models import Pretrain, ScratchModel
from pipeline.config.schema import Config
from pipeline.decode.bench import Bench
from pipeline.decode.model import DecodeModel
from pipeline.decode.sampling import GREEDILY
from pipeline.intervals import bootstrap_interval
from pipeline.kv.guides import UNGUIDED, Guides
from pipeline.models.build import build_scratch
from pipeline.models.export import export_model
from pipeline.models.load import ModelRef
from pipeline.results.pool import accepted_of_proposed
from pipeline.store.files import read_all, write_rows
from pipeline.store.layout import CONTINUATIONS, PROMPTS, ROWS, TOKENIZER
from pipeline.store.rows import Prompt, PromptRow
from pipeline.sweep.evaluator import Evaluator, ReplayTask
from pipeline.sweep.grid import Drafter, cells_behind, views_of
from pipeline.sweep.measurer import Views
from pipeline.sweep.step_times import NEVER, Watched
from pipeline.train.target.teacher import ContinueTask, Teacher

CONFIG = Path(__file__).resolve().parent.parent / "conf" / "paper" / "table-1.yaml"
# The paper's table has neither a control nor the full cache.
OVERRIDES = (
    "sweep.controls=[]", "sweep.budgets=[256, 512, 1024, 2048]", "labels.batch_sequences=10",
    "run.executor=inline", "run.device=cpu", "run.gpus_per_task=0",
)  # fmt: skip
VOCABULARY = 512
SHAPE = ScratchModel(
    kind="scratch", layers=1, hidden=32, heads=1, kv_heads=1, intermediate=64, max_positions=32_768,
    pretrain=Pretrain(steps=0),
)  # fmt: skip
# One layer: decoding a cell then takes longer than reading its prompt, as it does with models of real size.
# The target's random weights are scaled by SHARPNESS. A drafter's weights are the target's plus noise of
# NOISE standard deviations of each tensor, so that half of the proposals are accepted at γ = 5; in the
# paper's Table 3 it is 62 %.
SHARPNESS = 4.0
NOISE = 0.05
SAMPLED = 500  # cells × prompts that are decoded
CPU = torch.device("cpu")


class SampledCell(NamedTuple):
    """One cell on one prompt."""

    prompt: Prompt
    drafter: int
    cell: Cell


@dataclass(frozen=True)
class Replayed:
    """The whole grid by replay: its rows, and its seconds, of which prefills took `prefill_s`.

    `target_prefills` is the number of prompts that the target has read.
    """

    rows: list[PromptRow]
    seconds: float
    prefill_s: float
    target_prefills: int


class Prefills:
    """A decoding model that counts and times the prompts that it reads."""

    def __init__(self, model: DecodeModel) -> None:
        self.model, self.prompts, self.seconds = model, 0, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def read(self, tokens_BS: Tensor, cuts: Sequence[tuple[int, View]], guides: Guides = UNGUIDED) -> Any:
        began = time.perf_counter()
        done = self.model.read(tokens_BS, cuts, guides)
        self.prompts += len(tokens_BS)
        self.seconds += time.perf_counter() - began
        return done

    def prefill(self, tokens_BS: Tensor, cuts: Sequence[tuple[int, View]], guides: Guides = UNGUIDED) -> Any:
        return self.read(tokens_BS, cuts, guides)[:2]


class Grid:
    """Models, tokenizer and prompts of a config's sweep, on disk."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.tokenizer = word_tokenizer()
        self.tokenizer.save_pretrained(folder / TOKENIZER)
        target = random_model(self.tokenizer)
        self.target = self.save(target, "target")
        names = [variant.name for variant in config.train.drafters]
        refs = [self.save(noisy(target, seed), name) for seed, name in enumerate(names)]
        self.drafters = [
            Drafter(name, ref, SHAPE.max_positions) for name, ref in zip(names, refs, strict=True)
        ]
        self.prompts = self.random_prompts()
        for file, prompts in self.prompts.items():
            write_rows(file, prompts)

    def save(self, model: PreTrainedModel, name: str) -> ModelRef:
        export_model(model, self.tokenizer, self.folder / name)
        return ModelRef(str(self.folder / name))

    def random_prompts(self) -> dict[Path, list[Prompt]]:
        """Prompts of each data set and context, by the file that they are to be in."""
        data, draw, files = self.config.data, random.Random(0), {}
        for source, context in product(data.sources, data.contexts):
            name = f"{source.name}-{context.name}"
            files[self.folder / PROMPTS / f"test-{name}.jsonl"] = [
                Prompt(
                    prompt_id=f"{name}-{number}",
                    document_id=f"{name}-{number}",
                    dataset=source.name,
                    context=context.name,
                    split="test",
                    tokens=draw.choices(range(VOCABULARY), k=context.tokens),
                    max_new_tokens=data.max_new_tokens,
                )
                for number in range(data.prompts)
            ]
        return files

    def evaluator(self) -> Evaluator:
        return Evaluator(self.config, self.target, self.drafters, self.folder / TOKENIZER, CPU)

    def work(self) -> list[SampledCell]:
        """Every cell on every prompt."""
        sweep = self.config.sweep
        return [
            SampledCell(prompt, number, cell)
            for prompts in self.prompts.values()
            for prompt in prompts
            for number, drafter in enumerate(self.drafters)
            for view in views_of(sweep, drafter)
            for cell in cells_behind(sweep, drafter, Place(prompt.dataset, prompt.context), view)
        ]

    def replay(self) -> Replayed:
        """The stages teach (without labels) and sweep, from files to files."""
        began = time.perf_counter()
        teacher = Teacher(self.config, self.target, self.folder / TOKENIZER, self.folder, CPU)
        read: Any = Prefills(teacher.writer)
        teacher.writer = read
        evaluator = self.evaluator()
        drafters = []
        for contender in evaluator.contenders:
            watched: Any = Watched(contender.fast, "prefill", CPU)
            contender.fast = watched
            drafters.append(watched)
        for file, prompts in self.prompts.items():
            teacher(ContinueTask(file))
            text = self.folder / CONTINUATIONS / file.name
            evaluator(ReplayTask(file, (text,), 0, len(prompts), self.folder / ROWS / file.name))
        seconds = time.perf_counter() - began
        assert "target" not in vars(evaluator), "replay loaded the target"
        rows = read_all(self.folder / ROWS, PromptRow)
        prefill_s = read.seconds + sum(sum(drafter.seconds) for drafter in drafters)
        return Replayed(rows, seconds, prefill_s, read.prompts)

    def measure(self, sample: Sequence[SampledCell]) -> tuple[list[float], list[int]]:
        """Decode seconds and accepted proposals of each sampled cell; prefills do not count."""
        evaluator = self.evaluator()
        seconds, accepted = [], []
        for work in [sample[0], *sample]:  # the first run is slow, and thrown away
            contender = evaluator.contenders[work.drafter]
            bench = Bench(
                evaluator.runners, evaluator.target[1], [work.prompt], max(self.config.sweep.gammas)
            )
            source = Views(bench, contender.drafter, contender.fast, [work.cell.view]).source(work.cell.view)
            run = bench.speculative(source, work.cell.gamma, GREEDILY, NEVER)
            seconds.append(run.seconds)
            accepted.append(sum(round_.accepted for round_ in run.rounds[0]))
        return seconds[1:], accepted[1:]


def grid_rows(sampled: int = SAMPLED, overrides: Sequence[str] = ()) -> list[Row]:
    """Seconds of the replayed grid, how much longer measuring takes, and the target's prefills.

    Args:
        sampled: cells × prompts that are decoded, for the extrapolation.
        overrides: of the config, after those of this file.
    """
    config = load_config(CONFIG, [*OVERRIDES, *overrides])
    with tempfile.TemporaryDirectory() as folder:
        grid = Grid(config, Path(folder))
        replayed, work = grid.replay(), grid.work()
        prompts = sum(len(here) for here in grid.prompts.values())
        assert len(replayed.rows) == len(work), "replay left cells out"
        assert replayed.target_prefills == prompts, "replay did not prefill every prompt exactly once"
        sample = random.Random(0).sample(work, sampled)
        sample.sort(key=lambda item: len(item.prompt.tokens))  # equal shapes side by side
        seconds, accepted = grid.measure(sample)
    known = {(r.prompt_id, r.cell): r.counts.num_accepted for r in replayed.rows}
    pairs = zip(sample, accepted, strict=True)
    equal = sum(count == known[item.prompt.prompt_id, item.cell] for item, count in pairs)
    kept, proposed = map(sum, accepted_of_proposed(replayed.rows))  # over every γ
    mean = bootstrap_interval(seconds, [1] * sampled, samples=2000, seed=0)
    ratio, low, high = (
        (replayed.prefill_s + run_s * len(work)) / replayed.seconds
        for run_s in (mean.mean, mean.low, mean.high)
    )
    size = f"{len(work) // config.data.prompts} cells, {len(work)} cells × prompts"
    basis = f"extrapolated from {sampled} random cells × prompts, {mean.mean:.2f} s each"
    check = f"{equal} of them accept what replay says"
    measuring = row(
        "measuring every cell, prefills shared ÷ replay",
        [ratio],
        100,
        note=f"{basis}; {check}; {kept / proposed:.0%} of all proposals are accepted",
    )
    return [
        row(
            f"the paper's grid × {len(grid.drafters)} drafters × {config.data.prompts} prompts by replay",
            [replayed.seconds],
            600,
            at_most=True,
            unit=" s",
            note=f"tiny models; {size}; {replayed.prefill_s:.0f} s are prefills",
        ),
        replace(measuring, low=low, high=high),
        row(
            "target prefills of the replayed grid ÷ prompts",
            [replayed.target_prefills / prompts],
            1,
            at_most=True,
            unit="",
            note=f"asserted; {prompts} prompts",
        ),
    ]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One word a token, and no token that ends a text: every continuation has its full length."""
    words = {f"w{number}": number for number in range(VOCABULARY)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))


def random_model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    model = build_scratch(SHAPE, tokenizer, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(SHARPNESS)
    return model


def noisy(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A drafter that agrees with the target often, not always."""
    drafter = type(model)(model.config)
    drafter.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in drafter.parameters():
            if parameter.dim() > 1:
                parameter.add_(NOISE * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return drafter
