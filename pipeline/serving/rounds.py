"""Serving with a log: training prompts, decoded by a pair behind sampled views, as texts to learn from.

Per shard of N texts of at most A tokens it stores what stage teach stores of answers, by the same names:
`.tokens.npy` [N, L], `.prefix.npy` and `.supervised.npy` [N], and of every position of the texts the target's
`.argmax.npy` [N, A] with its best K tokens `.ids.npy` and their log-probabilities `.log_probs.npy` [N, A, K];
what these leave is the mass of all others. So a text takes L·t + A·(t + K·(t + 2)) + 8 bytes, where t is 2,
or 4 for vocabularies above 65,536. Beside them `.rounds.jsonl` has one row a text with its tokens and every
proposal, some 7 bytes each.

Labels are of the text that was emitted. What the target thought behind a rejected proposal is not kept: it
belongs to a text that nobody writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kernels import dispatch
from pipeline.axes import FULL, View
from pipeline.config.schema import Config
from pipeline.config.train import Variant
from pipeline.decode.bench import Bench
from pipeline.decode.loop import speculate
from pipeline.decode.sampling import GREEDILY
from pipeline.decode.sources import Logged
from pipeline.errors import BadData
from pipeline.models.load import ModelRef
from pipeline.serving.pair import load_pair
from pipeline.store.files import read_rows, write_array, write_rows
from pipeline.store.layout import ASKED, LABELS, SEQUENCES, SERVED_ROUNDS
from pipeline.store.rows import LoggedRound, Prompt, ServedText
from pipeline.train.batches import batch_indices
from pipeline.train.objectives import view_in
from pipeline.train.target.teacher import label_logits, smallest_uint

DATASET = "served"


@dataclass(frozen=True)
class Asked:
    """A prompt to serve: a row of a file of training prompts or of packed sequences, and the view of it."""

    file: Path
    row: int
    view: View


@dataclass(frozen=True)
class ServeTask:
    """Prompts → the shard with this number."""

    asked: tuple[Asked, ...]
    shard: int

    @property
    def name(self) -> str:
        return f"answers-{self.shard:05d}"


@dataclass(frozen=True)
class ServeCounts:
    """What was served; texts that ended with their first token had nothing to propose, and are left out."""

    texts: int = 0
    rounds: int = 0
    proposed: int = 0
    accepted: int = 0

    @staticmethod
    def of(rows: Sequence[ServedText]) -> ServeCounts:
        rounds = [one for row in rows for one in row.rounds]
        proposed = sum(len(one.proposals) for one in rounds)
        return ServeCounts(len(rows), len(rounds), proposed, sum(one.accepted for one in rounds))


def asked_prompts(config: Config, variant: Variant, prepare: Path, number: int, count: int) -> list[Asked]:
    """The prompts of a round, each with a view: consecutive ones of an endless, reshuffled pass, at most all.

    Raises:
        BadData: if the training split has none.
    """
    counts = {
        **{file: len(read_rows(file, Prompt)) for file in sorted((prepare / ASKED).glob("*.jsonl"))},
        **{file: len(np.load(file, "r")) for file in sorted((prepare / SEQUENCES).glob("*.npy"))},
    }
    there = [(file, row) for file, rows in counts.items() for row in range(rows)]
    if not there:
        raise BadData("improve: the training split has neither sequences nor prompts to serve")
    chosen = batch_indices(len(there), min(count, len(there)), config.seed, number)
    views = sampled_views(variant, len(chosen), np.random.default_rng([config.seed, number]))
    return [Asked(*there[index], view) for index, view in zip(chosen, views, strict=True)]


def sampled_views(variant: Variant, count: int, rng: np.random.Generator) -> list[View]:
    """By the weights of the variant's budgets; the full cache where it has no sparse branch."""
    if not variant.budgets or not variant.sparse_weight:
        return [FULL] * count
    budgets, weights = zip(*sorted(variant.budgets.items()), strict=True)
    drawn = rng.choice(budgets, size=count, p=np.array(weights) / sum(weights))
    return [view_in(variant, int(budget)) for budget in drawn]


class Server:
    """A target and a drafter, loaded once per worker; a call does one task, unless its files are there."""

    def __init__(
        self,
        config: Config,
        gamma: int,
        target: ModelRef,
        drafter: ModelRef,
        tokenizer: Path,
        output: Path,
    ) -> None:
        self.config, self.gamma, self.output = config, gamma, output
        dispatch.choose(config.run.kernels)
        self.asked: dict[Path, list[Prompt]] = {}
        decode, run = config.decode, config.run
        self.pair = load_pair(target, drafter, tokenizer, run.device, decode.compile, decode.prefill_chunk)

    def __call__(self, task: ServeTask) -> ServeCounts:
        stem = self.output / LABELS / task.name
        done, log = Path(f"{stem}.argmax.npy"), Path(f"{stem}.{SERVED_ROUNDS}")
        if not (done.exists() and log.exists()):
            rows, arrays = self.shard(task)
            write_rows(log, rows)
            for name, array in arrays.items():  # `argmax` is the last
                write_array(done if name == "argmax" else Path(f"{stem}.{name}.npy"), array)
        return ServeCounts.of(read_rows(log, ServedText))

    def shard(self, task: ServeTask) -> tuple[list[ServedText], dict[str, np.ndarray]]:
        """The texts of a task in its order, and their arrays; those without a round are left out."""
        behind: dict[View, list[int]] = {}  # prompts behind one view are decoded together
        for place, asked in enumerate(task.asked):
            behind.setdefault(asked.view, []).append(place)
        size = self.config.labels.batch_sequences
        order: list[int] = []
        rows: list[ServedText] = []
        pieces: list[dict[str, np.ndarray]] = []
        for view, places in behind.items():
            for at in range(0, len(places), size):
                batch = places[at : at + size]
                texts, arrays = self.serve([self.prompt(task.asked[place]) for place in batch], view)
                order, rows = order + batch, rows + texts
                pieces.append(arrays)
        kept = np.array([at for at in np.argsort(order) if rows[at].rounds], dtype=int)
        arrays = {name: np.concatenate([piece[name] for piece in pieces])[kept] for name in pieces[0]}
        return [rows[at] for at in kept], arrays

    def prompt(self, asked: Asked) -> Prompt:
        """A prompt of the training split; of a packed sequence, what comes before its last windows."""
        if asked.file.suffix == ".jsonl":
            if asked.file not in self.asked:
                self.asked[asked.file] = read_rows(asked.file, Prompt)
            return self.asked[asked.file][asked.row]
        limit, name = self.config.train.learned_tokens, f"{asked.file.stem}-{asked.row}"
        tokens_L = np.load(asked.file, mmap_mode="r")[asked.row]
        return Prompt(
            prompt_id=name,
            document_id=name,
            dataset=DATASET,
            context=DATASET,
            split="train",
            tokens=tokens_L[: len(tokens_L) - limit].tolist(),
            max_new_tokens=limit,
        )

    def serve(self, prompts: Sequence[Prompt], view: View) -> tuple[list[ServedText], dict[str, np.ndarray]]:
        """Decode prompts together: their rounds, and the arrays of the shard."""
        reading = self.pair.read_tokens(prompts, view, self.gamma)
        bench, source = reading.bench, Logged(reading.source)
        firsts, sampler = bench.start(GREEDILY)
        rows = [
            ServedText(
                prompt_id=prompt.prompt_id,
                document_id=prompt.document_id,
                prompt_tokens=len(prompt.tokens),
                view=view,
                gamma=self.gamma,
                tokens=[first],
                rounds=[],
            )
            for prompt, first in zip(prompts, firsts, strict=True)
        ]
        steps = speculate(bench.target, source, firsts, self.gamma, bench.limit, reading.eos, sampler)
        for number, rounds in enumerate(steps):
            proposed = source.proposed[number].tolist()
            for row, one, proposals in zip(rows, rounds, proposed, strict=True):
                if one is not None:
                    counted = proposals[: one.proposed]
                    row.rounds.append(
                        LoggedRound(begins_at=len(row.tokens), proposals=counted, accepted=one.accepted)
                    )
                    row.tokens.extend(one.tokens)
        return rows, self.arrays(prompts, rows, bench)

    @torch.no_grad()
    def arrays(
        self, prompts: Sequence[Prompt], rows: Sequence[ServedText], bench: Bench
    ) -> dict[str, np.ndarray]:
        """Texts, and the target's labels from one more pass over them, which overwrites the bench's cache."""
        target, count = self.pair.target, self.config.train.learned_tokens
        kind = smallest_uint(target.num_tokens)
        tokens_BL = np.zeros((len(rows), self.config.data.sequence_tokens), kind)
        written_BA = np.zeros((len(rows), count), np.int64)
        for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            tokens_BL[number, : len(prompt.tokens) + len(row.tokens)] = [*prompt.tokens, *row.tokens]
            written_BA[number, : len(row.tokens)] = row.tokens
        begin_B = torch.zeros_like(bench.target.cache.kept_B)
        read_BA = torch.from_numpy(written_BA).to(bench.device)
        hidden_BAC = target.hidden(read_BA, begin_B, bench.target.cache)
        pieces = [
            label_logits(target.name, target.logits(hidden_1AC), self.config.labels, kind)
            for hidden_1AC in hidden_BAC.split(1)
        ]
        return {
            "tokens": tokens_BL,
            "prefix": np.array([row.prompt_tokens for row in rows], np.int32),
            "supervised": np.array([len(row.tokens) - 1 for row in rows], np.int32),
            **{name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]},
        }
