"""Stage teach: the frozen target reads every training sequence and writes every evaluation continuation.

Per shard of N sequences of L tokens it stores, for *every* position, `.tokens.npy` and `.argmax.npy` [N, L],
and with `labels.top_k` also `.ids.npy` and `.log_probs.npy` [N, L, K] (float16, normalised over the whole
vocabulary at `labels.temperature`). Training reads only these; the target is not in memory then.

To a prompt of the training split it writes its own answers, of at most A tokens. Of a shard of N of them
`.tokens.npy` is [N, L], prompt and answer from the left, and the labels are of the answers alone, [N, A, …];
`.prefix.npy` [N] are the tokens of the prompts, and of `.supervised.npy` [N] first labels each is learned
from: what follows the end of a text has none.

Where drafters are trained with `target_guided`, `.guide.npy` [N, P, R] has the target's ranking of the chunks
before each of the P places where windows may start, as many chunks as the largest budget holds; of shorter
prefixes what is left over names a chunk that there is not.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from kernels import dispatch
from kernels.reference import CHUNK
from pipeline.axes import FULL
from pipeline.config.models import Head
from pipeline.config.schema import Config
from pipeline.decode.loop import Noted, autoregressive_noted
from pipeline.decode.model import DecodeModel, decode_model
from pipeline.decode.runner import Runner
from pipeline.decode.sampling import GREEDILY, Chance, Sampler, fold
from pipeline.decode.steps import note
from pipeline.errors import BadData, NotFinite
from pipeline.kv.slot_cache import slots_for
from pipeline.metrics import repetition_rate
from pipeline.models.generation import stop_tokens, warn_of_settings
from pipeline.models.heads.begin import default_layers
from pipeline.models.load import ModelRef, load_model, shared_tokens
from pipeline.store.files import read_rows, write_array, write_rows
from pipeline.store.layout import CONTINUATIONS, LABELS
from pipeline.store.rows import Continuation, Prompt
from pipeline.train.batches import answer_starts, window_starts
from pipeline.train.features import VALIDATION, half
from pipeline.train.labelling import Ranking, label_logits, label_sequences, smallest_uint


@dataclass(frozen=True)
class LabelTask:
    """Rows [first, last) of a sequences file → the label shard with this number.

    `offset` is the number of the file's first row among all sequences.
    """

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
    """What one task wrote."""

    sequences: int = 0
    on_policy: int = 0
    answers: int = 0
    answer_tokens: int = 0
    continuations: int = 0


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
            places = window_starts(config.train, config.data.sequence_tokens)
            self.ranking = Ranking(places, config.guide_chunks, config.data.sequence_tokens // CHUNK)

    def __call__(self, task: LabelTask | AnswerTask | ContinueTask) -> TeachCounts:
        if isinstance(task, AnswerTask):
            return self.answer_prompts(task)
        return self.label(task) if isinstance(task, LabelTask) else self.continue_prompts(task)

    def label(self, task: LabelTask) -> TeachCounts:
        labels, data = self.config.labels, self.config.data
        stem = self.output / LABELS / task.name
        rows = np.array(np.load(task.sequences, mmap_mode="r")[task.first : task.last])
        chosen = [
            row
            for row in range(len(rows))
            if is_on_policy(self.config.seed, task.offset + task.first + row, labels.on_policy_fraction)
        ]
        # `.argmax.npy` is written last: a shard with it is complete.
        if not (done := Path(f"{stem}.argmax.npy")).exists():
            start = data.sequence_tokens - self.config.train.learned_tokens
            for at in range(0, len(chosen), labels.batch_sequences):
                batch = chosen[at : at + labels.batch_sequences]
                seeds = [fold(self.config.seed, task.shard, row) for row in batch]
                # A text that ended would leave the rest of its windows without a meaning.
                never, device = tuple(sorted(stop_tokens(self.target))), self.target.device
                sampler = Sampler.seeded(labels.on_policy_temperature, seeds, device, never)
                prefixes = torch.from_numpy(rows[batch, :start].astype(np.int64)).to(device)
                written = write_ahead(
                    self.writer, prefixes, data.sequence_tokens - start, frozenset(), sampler
                )
                rows[batch, start:] = [[noted.token for noted in text] for text in written]
            arrays = label_sequences(self.target, rows, labels, self.writer.feature_layers, self.ranking)
            write_array(Path(f"{stem}.tokens.npy"), rows)
            for name, array in arrays.items():
                write_array(done if name == "argmax" else Path(f"{stem}.{name}.npy"), array)
        return TeachCounts(sequences=len(rows), on_policy=len(chosen))

    def answer_prompts(self, task: AnswerTask) -> TeachCounts:
        """An answer that ends at once has nothing to learn from, and is left out."""
        stem, copies = self.output / LABELS / task.name, self.config.labels.answers.per_prompt
        if not (done := Path(f"{stem}.argmax.npy")).exists():
            prompts = read_rows(task.prompts, Prompt)[task.first : task.last]
            self.must_have_embeddings(prompts)
            rows = max(1, self.config.labels.batch_sequences // copies)
            batches = [self.answers(batch) for batch in equal_length_batches(prompts, rows)]
            arrays = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
            learned = arrays["supervised"] > 0
            for name, array in arrays.items():  # `argmax` is the last
                write_array(done if name == "argmax" else Path(f"{stem}.{name}.npy"), array[learned])
        supervised = np.load(f"{stem}.supervised.npy")
        return TeachCounts(answers=len(supervised), answer_tokens=int(supervised.sum()))

    def answers(self, prompts: list[Prompt]) -> dict[str, np.ndarray]:
        """The target's answers to prompts of equal length, and its labels, from one more pass over them."""
        config, device = self.config, self.target.device
        asked, eos, count = config.labels.answers, stop_tokens(self.target), config.train.learned_tokens
        tokens_BS = torch.tensor([prompt.tokens for prompt in prompts], device=device)
        seeds = [
            fold(config.seed, zlib.crc32(prompt.prompt_id.encode()), copy)
            for prompt in prompts
            for copy in range(asked.per_prompt)
        ]
        sampler = Sampler.seeded(asked.temperature, seeds, device)
        runner, logits_RV, features_RSF, _ = behind_prefixes(self.writer, tokens_BS, count, asked.per_prompt)
        texts = write_on(runner, logits_RV, count, eos, sampler)
        written_RA = torch.zeros(len(texts), count, dtype=torch.long, device=device)
        for row, text in enumerate(texts):
            written_RA[row, : len(text)] = torch.tensor([noted.token for noted in text])
        prefixes_RS = tokens_BS.repeat_interleave(asked.per_prompt, 0)
        kind, S = smallest_uint(self.writer.num_tokens), tokens_BS.shape[1]
        tokens_RL = np.zeros((len(texts), config.data.sequence_tokens), kind)
        tokens_RL[:, : S + count] = torch.cat([prefixes_RS, written_RA], 1).cpu().numpy()
        with torch.no_grad():
            hidden_RAC, features_RAF = self.writer.hidden_and_features(
                written_RA, torch.zeros_like(written_RA[:, 0]), runner.cache
            )
            pieces = [
                label_logits(self.writer.name, self.writer.logits(hidden_1AC), config.labels, kind)
                for hidden_1AC in hidden_RAC.split(1)
            ]
        features: dict[str, np.ndarray] = {}
        if features_RSF is not None and features_RAF is not None:
            both = torch.cat([features_RSF, features_RAF], 1)
            features["features"] = half(F.pad(both, (0, 0, 0, tokens_RL.shape[1] - both.shape[1])))
        guides: dict[str, np.ndarray] = {}
        if self.ranking:
            texts_RL = torch.cat([prefixes_RS, written_RA], 1)
            guides["guide"] = self.ranking.of_texts(self.target, texts_RL, answer_starts(config.train, S))
        return {
            **features,
            **guides,
            "tokens": tokens_RL,
            "prefix": np.full(len(texts), S, np.int32),
            "supervised": np.array([len(text) - (text[-1].token in eos) for text in texts], np.int32),
            **{name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]},
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


def features_of(spec: Head, target: PreTrainedModel) -> tuple[int, ...]:
    """The layers whose inputs a head of this config reads."""
    layers = target.config.get_text_config(decoder=True).num_hidden_layers
    return tuple(spec.feature_layers or default_layers(layers))


def features_file(output: Path, prompt: Prompt) -> Path:
    """Of a validation prompt with its continuation."""
    return output / VALIDATION / f"{prompt.prompt_id.replace('/', '-')}.npy"


def sampled_name(prompts: str, chance: Chance) -> str:
    """The continuations file of a prompts file."""
    if chance.temperature == 0:
        return prompts
    return f"{Path(prompts).stem}-t{chance.temperature:g}-s{chance.seed}.jsonl"


def is_on_policy(seed: int, index: int, fraction: float) -> bool:
    """Whether the target rewrites all windows of this sequence; drawn from the seed and its number."""
    return fraction > 0 and np.random.default_rng([seed, 7, index]).random() < fraction


def equal_length_batches(prompts: list[Prompt], size: int) -> list[list[Prompt]]:
    """Batches of prompts with the same length and limit, in a stable order."""
    groups: dict[tuple[int, int], list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault((len(prompt.tokens), prompt.max_new_tokens), []).append(prompt)
    return [group[at : at + size] for group in groups.values() for at in range(0, len(group), size)]


def write_ahead(
    target: DecodeModel, tokens_BS: Tensor, count: int, eos: frozenset[int], sampler: Sampler
) -> list[list[Noted]]:
    """The target's continuation of each of B prefixes of equal length: up to `count` tokens, or to EOS.

    Raises:
        NotFinite: if a logit is NaN or infinite.
    """
    return write_on(*behind_prefixes(target, tokens_BS, count)[:2], count, eos, sampler)


def behind_prefixes(
    target: DecodeModel, tokens_BS: Tensor, room: int, copies: int = 1, guided: bool = False
) -> tuple[Runner, Tensor, Tensor | None, Tensor | None]:
    """The target with so much room behind each prefix, as often as `copies`, and the logits [R, V] there; the
    features [R, S, F] of the prefixes where the target gives some; if `guided` the guide [B, C] of each."""
    B, S = tokens_BS.shape
    (view,), logits_BV, features_BSF = target.read(tokens_BS, [(S, FULL)])
    runner = Runner(target, B * copies, slots_for(S), room, "none")
    for row in range(B * copies):
        runner.cache.load_row(row, view, row // copies)
    if not torch.isfinite(logits_BV).all():
        raise NotFinite(f"{target.name}: logits not finite behind a prefix of {S} tokens")
    repeated = None if features_BSF is None else features_BSF.repeat_interleave(copies, 0)
    guide_BC = view.guiding()[S] if guided else None
    return runner, logits_BV.repeat_interleave(copies, 0), repeated, guide_BC


@torch.no_grad()
def write_on(
    runner: Runner, logits_RV: Tensor, count: int, eos: frozenset[int], sampler: Sampler
) -> list[list[Noted]]:
    """A text behind each row's prefix, whose logits are given."""
    first_R = sampler.choose(logits_RV)
    columns = (first_R, *note(sampler.rule, logits_RV, first_R))
    texts = [[Noted(*chosen)] for chosen in zip(*(values.tolist() for values in columns), strict=True)]
    for step in autoregressive_noted(runner, first_R.tolist(), count, eos, sampler):
        for text, chosen in zip(texts, step, strict=True):
            text += [] if chosen is None else [chosen]
    return texts
