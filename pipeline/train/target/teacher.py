"""Stage teach: the frozen target reads every training sequence and writes every evaluation continuation.

Per shard of N sequences of L tokens it stores, for *every* position, `.tokens.npy` and `.argmax.npy` [N, L],
and with `labels.top_k` also `.ids.npy` and `.log_probs.npy` [N, L, K] (float16, normalised over the whole
vocabulary at `labels.temperature`).

To a prompt of the training split it writes its own answers, of at most A tokens. Of a shard of N of them
`.tokens.npy` is [N, L], prompt and answer from the left, and the labels are of the answers alone, [N, A, …];
`.prefix.npy` [N] are the tokens of the prompts, and of `.supervised.npy` [N] first labels each is learned
from: what follows the end of a text has none.

With `labels.server` an engine writes these answers, and the texts of `labels.on_policy_fraction`, and with
`labels.answers.written` a file has the answers; the labels stay the target's. `.agreement.npy` then holds for
every prompt the share of its texts' places at which the writer's arg-max is the target's.

For the policy `target_guided`, `.guide.npy` [N, P, R] ranks the chunks before each of the P places where
windows may start, as many as the largest budget holds; what is left over names a chunk that there is not.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from kernels import dispatch
from pipeline.config.models import Head
from pipeline.config.schema import Config
from pipeline.config.train import Labels
from pipeline.decode.model import decode_model
from pipeline.decode.sampling import GREEDILY, Chance, Sampler, fold
from pipeline.errors import BadData
from pipeline.kv.guides import Ranking
from pipeline.metrics import repetition_rate
from pipeline.models.generation import stop_tokens, warn_of_settings
from pipeline.models.load import ModelRef, load_model, shared_tokens
from pipeline.store.files import read_rows, write_array, write_rows
from pipeline.store.layout import CONTINUATIONS, LABELS, shares_file
from pipeline.store.rows import Continuation, Prompt
from pipeline.train.batches import answer_starts, window_starts
from pipeline.train.target.features import features_file, features_of, half
from pipeline.train.target.labelling import (
    Engine,
    Text,
    agreement,
    behind_prefixes,
    equal_length_batches,
    is_on_policy,
    label_logits,
    label_sequences,
    of_engine,
    refused,
    shares,
    smallest_uint,
    text_shares,
    write_ahead,
    write_on,
)


@dataclass(frozen=True)
class LabelTask:
    """Rows [first, last) of a file, before which there are `offset` rows, → the shard with this number."""

    sequences: Path
    first: int
    last: int
    offset: int
    shard: int

    @property
    def name(self) -> str:
        return f"shard-{self.shard:05d}"


@dataclass(frozen=True)
class AnswerTask:
    """Rows [first, last) of a file of training prompts → the shard of answers with this number."""

    prompts: Path
    first: int
    last: int
    shard: int

    @property
    def name(self) -> str:
        return f"answers-{self.shard:05d}"


@dataclass(frozen=True)
class ContinueTask:
    """One prompts file → one continuations file: greedy ones by the same name, sampled ones beside it."""

    prompts: Path
    chance: Chance = GREEDILY

    @property
    def name(self) -> str:
        return sampled_name(self.prompts.name, self.chance)


@dataclass(frozen=True)
class TeachCounts:
    """What one task wrote; the last three are those of `of_engine`."""

    sequences: int = 0
    on_policy: int = 0
    answers: int = 0
    answer_tokens: int = 0
    continuations: int = 0
    served: int = 0
    refused: int = 0
    missing: int = 0


class Teacher:
    """The target, loaded once per worker; a call does one task. Tasks whose files exist are not redone."""

    def __init__(self, config: Config, target: ModelRef, tokenizer: Path, output: Path, device: torch.device):
        self.config, self.output = config, output
        dispatch.choose(config.run.kernels)
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.target = load_model(target, shared_tokens(self.tokenizer, target), device)
        warn_of_settings(self.target)
        self.writer = decode_model(self.target, config.decode.prefill_chunk)
        if isinstance(config.drafter, Head) and config.labels.features != "recomputed":
            self.writer.feature_layers = features_of(config.drafter, self.target)
        self.ranking: Ranking | None = None
        if config.guide_chunks:
            length = config.data.sequence_tokens
            self.ranking = Ranking(window_starts(config.train, length), config.guide_chunks, length)
        self.engine: Engine | None = None  # who writes texts to learn from; default: the target

    def __call__(self, task: LabelTask | AnswerTask | ContinueTask) -> TeachCounts:
        if isinstance(task, AnswerTask):
            return self.answer_prompts(task)
        return self.label(task) if isinstance(task, LabelTask) else self.continue_prompts(task)

    def label(self, task: LabelTask) -> TeachCounts:
        labels = self.config.labels
        stem = self.output / LABELS / task.name
        rows = np.array(np.load(task.sequences, mmap_mode="r")[task.first : task.last])
        chosen = [
            row
            for row in range(len(rows))
            if is_on_policy(self.config.seed, task.offset + task.first + row, labels.on_policy_fraction)
        ]
        # `.argmax.npy` is written last: a shard with it is complete.
        if not (done := Path(f"{stem}.argmax.npy")).exists():
            self.rewrite(
                task, rows, self.not_served(task, rows, chosen) if self.engine and chosen else chosen
            )
            arrays = label_sequences(self.target, rows, labels, self.writer.feature_layers, self.ranking)
            write_array(Path(f"{stem}.tokens.npy"), rows)
            for name, array in arrays.items():
                write_array(done if name == "argmax" else Path(f"{stem}.{name}.npy"), array)
        return TeachCounts(sequences=len(rows), on_policy=len(chosen), **self.of_engine(stem))

    def rewrite(self, task: LabelTask, rows_NL: np.ndarray, chosen: list[int]) -> None:
        """The target's own text in all windows of the chosen rows."""
        labels, start = self.config.labels, self.first_learned
        # A text that ended would leave the rest of its windows without a meaning.
        never, device = tuple(sorted(stop_tokens(self.target))), self.target.device
        for at in range(0, len(chosen), labels.batch_sequences):
            batch = chosen[at : at + labels.batch_sequences]
            seeds = [fold(self.config.seed, task.shard, row) for row in batch]
            sampler = Sampler.seeded(labels.on_policy_temperature, seeds, device, never)
            prefixes = torch.from_numpy(rows_NL[batch, :start].astype(np.int64)).to(device)
            count = rows_NL.shape[1] - start
            written = write_ahead(self.writer, prefixes, count, frozenset(), sampler)
            rows_NL[batch, start:] = [[noted.token for noted in text] for text in written]

    def not_served(self, task: LabelTask, rows_NL: np.ndarray, chosen: list[int]) -> list[int]:
        """Put the engine's texts into the chosen rows; those whose text is not the target's are returned.

        One more pass of the target over these rows tells, before any of them is labelled.
        """
        assert self.engine
        start, rows = self.first_learned, {f"{task.sequences.stem}/{task.first + row}": row for row in chosen}
        begun = {name: rows_NL[row, :start].tolist() for name, row in rows.items()}
        texts = self.engine.write(begun, rows_NL.shape[1] - start, ends=False)
        names, told = list(texts), []
        for at in range(0, len(names), self.config.labels.batch_sequences):
            batch = names[at : at + self.config.labels.batch_sequences]
            for name in batch:
                if given := texts[name]:
                    rows_NL[rows[name], start:] = given[0].tokens
            made = label_sequences(self.target, rows_NL[[rows[name] for name in batch]], Labels())
            told += [
                agreement(name, texts[name], best_L[None, start - 1 :], stop_tokens(self.target))
                for name, best_L in zip(batch, made["argmax"], strict=True)
            ]
        again = refused(told, self.engine) | (rows.keys() - texts.keys())
        write_array(self.output / LABELS / f"{task.name}.agreement.npy", shares(told))
        return [row for name, row in rows.items() if name in again]

    @property
    def first_learned(self) -> int:
        """The position at which the windows of a sequence begin, where all of them are its end."""
        return self.config.data.sequence_tokens - self.config.train.learned_tokens

    def of_engine(self, stem: Path) -> dict[str, int]:
        file = Path(f"{stem}.agreement.npy")
        return of_engine(self.engine, np.load(file)) if self.engine and file.exists() else {}

    def answer_prompts(self, task: AnswerTask) -> TeachCounts:
        """An answer that ends at once has nothing to learn from, and is left out."""
        stem = self.output / LABELS / task.name
        if not (done := Path(f"{stem}.argmax.npy")).exists():
            prompts = read_rows(task.prompts, Prompt)[task.first : task.last]
            self.must_have_embeddings(prompts)
            arrays = self.served_answers(prompts, stem) if self.engine else self.answered(prompts)
            learned = arrays["supervised"] > 0
            for name in (*sorted(arrays.keys() - {"best", "argmax"}), "argmax"):
                write_array(done if name == "argmax" else Path(f"{stem}.{name}.npy"), arrays[name][learned])
        supervised = np.load(f"{stem}.supervised.npy")
        return TeachCounts(
            answers=len(supervised), answer_tokens=int(supervised.sum()), **self.of_engine(stem)
        )

    def served_answers(self, prompts: list[Prompt], stem: Path) -> dict[str, np.ndarray]:
        """The engine's answers with the target's labels; behind these the target's own, to other prompts."""
        assert self.engine
        begun, copies = {p.prompt_id: p.tokens for p in prompts}, self.config.labels.answers.per_prompt
        texts = self.engine.write(begun, self.config.train.learned_tokens, ends=True, copies=copies)
        again, told, parts = begun.keys() - texts.keys(), [], []
        if there := [prompt for prompt in prompts if prompt.prompt_id in texts]:
            arrays = self.answered(there, texts)
            order = [prompt.prompt_id for batch in self.batches(there) for prompt in batch]
            best_PRA = arrays["best"].reshape(len(order), copies, -1)
            told = [agreement(name, texts[name], best) for name, best in zip(order, best_PRA, strict=True)]
            again |= refused(told, self.engine)
            kept = np.repeat([name not in again for name in order], copies)
            parts.append({name: array[kept] for name, array in arrays.items()})
        if own := [prompt for prompt in prompts if prompt.prompt_id in again]:
            parts.append(self.answered(own))
        write_array(Path(f"{stem}.agreement.npy"), shares(told, left=len(begun) - len(texts)))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def batches(self, prompts: list[Prompt]) -> list[list[Prompt]]:
        """Prompts that are answered together."""
        rows = self.config.labels.batch_sequences // self.config.labels.answers.per_prompt
        return equal_length_batches(prompts, max(1, rows))

    def answered(
        self, prompts: list[Prompt], texts: Mapping[str, list[Text] | None] | None = None
    ) -> dict[str, np.ndarray]:
        """The arrays of `answers`, batch after batch."""
        made, none = [], [Text([], [])] * self.config.labels.answers.per_prompt
        for batch in self.batches(prompts):
            given = None if texts is None else [t.tokens for p in batch for t in texts[p.prompt_id] or none]
            made.append(self.answers(batch, given))
        return {name: np.concatenate([arrays[name] for arrays in made]) for name in made[0]}

    def answers(self, prompts: list[Prompt], given: list[list[int]] | None = None) -> dict[str, np.ndarray]:
        """Answers to prompts of equal length, its own or given, and its labels, from one more pass over them.

        `best` [R, A] is its arg-max at the places of the answers.
        """
        config, device = self.config, self.target.device
        asked, eos, count = config.labels.answers, stop_tokens(self.target), config.train.learned_tokens
        tokens_BS = torch.tensor([prompt.tokens for prompt in prompts], device=device)
        runner, logits_RV, features_RSF, _ = behind_prefixes(self.writer, tokens_BS, count, asked.per_prompt)
        if given is None:
            seeds = [
                fold(config.seed, zlib.crc32(prompt.prompt_id.encode()), copy)
                for prompt in prompts
                for copy in range(asked.per_prompt)
            ]
            sampler = Sampler.seeded(asked.temperature, seeds, device)
            written = write_on(runner, logits_RV, count, eos, sampler)
            given = [[noted.token for noted in text] for text in written]
        written_RA = torch.zeros(len(given), count, dtype=torch.long, device=device)
        for row, text in enumerate(given):
            written_RA[row, : len(text)] = torch.tensor(text)
        prefixes_RS = tokens_BS.repeat_interleave(asked.per_prompt, 0)
        kind, S = smallest_uint(self.writer.num_tokens), tokens_BS.shape[1]
        tokens_RL = np.zeros((len(given), config.data.sequence_tokens), kind)
        tokens_RL[:, : S + count] = torch.cat([prefixes_RS, written_RA], 1).cpu().numpy()
        with torch.no_grad():
            hidden_RAC, features_RAF = self.writer.hidden_and_features(
                written_RA, torch.zeros_like(written_RA[:, 0]), runner.cache
            )
            pieces = [
                label_logits(self.writer.name, self.writer.logits(hidden_1AC), config.labels, kind)
                for hidden_1AC in hidden_RAC.split(1)
            ]
        beside: dict[str, np.ndarray] = {}
        if features_RSF is not None and features_RAF is not None:
            both = torch.cat([features_RSF, features_RAF], 1)
            beside["features"] = half(F.pad(both, (0, 0, 0, tokens_RL.shape[1] - both.shape[1])))
        if self.ranking:
            starts, texts_RL = answer_starts(config.train, S), torch.cat([prefixes_RS, written_RA], 1)
            beside["guide"] = self.ranking.of_texts(self.target, texts_RL, starts)
        labels = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        first_R1 = logits_RV.argmax(-1, keepdim=True).cpu().numpy().astype(kind)
        return {
            **beside,
            "tokens": tokens_RL,
            "prefix": np.full(len(given), S, np.int32),
            "supervised": np.array(
                [len(text) - (text[-1:] != [] and text[-1] in eos) for text in given], np.int32
            ),
            "best": np.concatenate([first_R1, labels["argmax"][:, :-1]], axis=1),
            **labels,
        }

    def continue_prompts(self, task: ContinueTask) -> TeachCounts:
        output = self.output / CONTINUATIONS / task.name
        prompts = read_rows(task.prompts, Prompt)
        self.must_have_embeddings(prompts)
        if not output.exists():
            rows = {
                row.prompt_id: row
                for batch in equal_length_batches(prompts, self.config.labels.batch_sequences)
                for row in self.continuations(batch, task.chance)
            }
            if self.writer.feature_layers and prompts and prompts[0].split == "validation":
                for prompt in prompts:
                    self.keep_features(task, prompt, rows[prompt.prompt_id])
            write_rows(output, [rows[prompt.prompt_id] for prompt in prompts])
        return TeachCounts(continuations=len(prompts))

    def keep_features(self, task: ContinueTask, prompt: Prompt, continuation: Continuation) -> None:
        """Of a prompt with its continuation, for the validation curve of a head."""
        tokens_1S = torch.tensor([prompt.tokens + continuation.tokens[:-1]], device=self.target.device)
        _, _, features_1SF = self.writer.read(tokens_1S, [])
        assert features_1SF is not None
        write_array(features_file(self.output, prompt), half(features_1SF[0]))

    def must_have_embeddings(self, prompts: list[Prompt]) -> None:
        """Raises BadData for a prompt with a token of the tokenizer's that the target does not know."""
        for prompt in prompts:
            if max(prompt.tokens) >= self.target.num_tokens:
                token = self.tokenizer.convert_ids_to_tokens(max(prompt.tokens))
                raise BadData(
                    f"the prompt {prompt.prompt_id} (of {prompt.document_id}) holds {token!r}, which the "
                    "target has no embedding for: take it out of the text"
                )

    def continuations(self, prompts: list[Prompt], chance: Chance = GREEDILY) -> list[Continuation]:
        """Continuations of prompts of equal length and limit."""
        eos = stop_tokens(self.target)
        tokens_BS = torch.tensor([prompt.tokens for prompt in prompts], device=self.target.device)
        sampler = chance.sampler([prompt.prompt_id for prompt in prompts], self.target.device)
        count, guided = prompts[0].max_new_tokens, self.config.is_guided
        runner, logits_BV, _, guide_BC = behind_prefixes(self.writer, tokens_BS, count, guided=guided)
        written = write_on(runner, logits_BV, count, eos, sampler)
        guides = guide_BC.tolist() if guide_BC is not None else [[] for _ in prompts]
        if self.config.sweep.refresh and prompts[0].split == "test" and chance == GREEDILY:
            texts = {p.prompt_id: [n.token for n in text] for p, text in zip(prompts, written, strict=True)}
            for name, shares_QC in text_shares(runner, texts).items():
                write_array(shares_file(self.output, name), shares_QC.cpu().numpy())
        rows = []
        for prompt, chosen, guide in zip(prompts, written, guides, strict=True):
            tokens = [noted.token for noted in chosen]
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            rows.append(
                Continuation(
                    prompt_id=prompt.prompt_id,
                    document_id=prompt.document_id,
                    dataset=prompt.dataset,
                    context=prompt.context,
                    split=prompt.split,
                    prompt_tokens=len(prompt.tokens),
                    tokens=tokens,
                    gaps=[round(noted.gap, 6) for noted in chosen],
                    eos_at=len(tokens) - 1 if tokens[-1] in eos else None,
                    text=text,
                    repetition_rate=repetition_rate(tokens),
                    correct=all(answer in text for answer in prompt.answers)
                    if prompt.scoring == "contains"
                    else None,
                    temperature=chance.temperature,
                    seed=chance.seed,
                    log_probs=[] if sampler.rule.greedy else [noted.log_prob for noted in chosen],
                    guide=guide,
                )
            )
        return rows


def sampled_name(prompts: str, chance: Chance) -> str:
    """The continuations file of a prompts file."""
    if chance.temperature == 0:
        return prompts
    return f"{Path(prompts).stem}-t{chance.temperature:g}-s{chance.seed}.jsonl"
