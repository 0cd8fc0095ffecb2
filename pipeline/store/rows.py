"""The typed rows that stages hand to one another, one JSON line each. Words as in docs/words.md."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from pipeline.axes import Budget, Cell, View
from pipeline.intervals import Interval
from pipeline.metrics import Counts, Departure
from pipeline.store import old_rows

# replay is exact, estimate the expectation over sampled continuations, measure has been decoded.
Mode = Literal["replay", "estimate", "measure"]


class Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class OfCell(Row):
    """A row about one cell. Rows of earlier formats are read as well."""

    cell: Cell

    @model_validator(mode="before")
    @classmethod
    def _as_today(cls, data: Any) -> Any:
        return old_rows.as_today(data)


class Prompt(Row):
    """One prompt (stage prepare); those of the training split are for the target to answer."""

    prompt_id: str
    document_id: str
    dataset: str
    context: str
    split: Literal["train", "validation", "test"]
    tokens: list[int]
    max_new_tokens: int
    answers: list[str] = []
    scoring: Literal["none", "contains"] = "none"


class Continuation(Row):
    """The target's own continuation of a prompt: greedy, or sampled at `temperature` (stage teach).

    `tokens[0]` is what the prefill gives; `gaps[t]` is the target's top-1 minus top-2 logit when it chose
    `tokens[t]`, and of a sampled one `log_probs[t]` its log-probability. It ends with EOS (`eos_at` is its
    index) or after `max_new_tokens`. Where views are chosen by it, `guide` is the target's ranking of
    the prompt's chunks.
    """

    prompt_id: str
    document_id: str
    dataset: str
    context: str
    split: Literal["validation", "test"]
    prompt_tokens: int
    tokens: list[int]
    gaps: list[float]
    eos_at: int | None
    text: str
    repetition_rate: float
    correct: bool | None = None
    temperature: float = 0.0
    seed: int = 0
    log_probs: list[float] = []
    guide: list[int] = []


class LoggedRound(Row):
    """One round of decoding: its prefix is the prompt and the first `begins_at` tokens of the text.

    `proposals` are those that count as proposed; the first `accepted` of them became tokens of the text.
    """

    begins_at: int
    proposals: list[int]
    accepted: int


class ServedText(Row):
    """A training prompt as it was served: what was proposed, and how much of it was accepted.

    `tokens[0]` is what the prefill gives. What the target thought behind each of its tokens but the last
    stands in the same row of the shard's labels.
    """

    prompt_id: str
    document_id: str
    prompt_tokens: int
    view: View
    gamma: int
    tokens: list[int]
    rounds: list[LoggedRound]


class ImprovedRound(Row):
    """One round of serve, learn, gate; drafters by the names of their artifact folders.

    `proposed` and `accepted` are those of the rounds that `current` served. `stands` is the drafter that the
    next round goes on from: the candidate where the verdict is pass, else the current one.
    """

    number: int
    current: str
    texts: int
    decoding_rounds: int
    proposed: int
    accepted: int
    candidate: str
    verdict: str
    stands: str


class Timing(Row):
    """What was timed of one prompt of a measured cell, one time per repeat.

    `ar_decode_s` are the autoregressive runs that were interleaved with `decode_s`. `prefill_s` is the
    target's prefill and one of the drafter for all measured views; no other time includes it or
    `ar_prefill_s`.
    `prompts_together` were decoded at once, and `together_with` is the id of their first; their time is
    divided evenly among their rows. `compile_s` is what compiling for a cell took, outside its times: 0
    where its shapes were compiled already. `peak_memory_bytes` is that of the device while the cell decodes,
    with the caches of all measured cells of the prompt in it. `hardware` is what it was timed on.

    A greedy run is `exact` where it has the tokens of autoregressive decoding, a sampled one is None. Where
    it is not, `divergence_gap` is the target's top-2 logit gap at the first token that differs, and
    `logit_noise` how much its logits up to there depend on reading tokens singly or at once: in half
    precision a gap below the noise explains the difference.
    """

    decode_s: list[float]
    ar_decode_s: list[float]
    ar_num_tokens: int
    prefill_s: float | None = None
    ar_prefill_s: float | None = None
    compile_s: float = 0.0
    prompts_together: int = 1
    together_with: str | None = None
    target_kv_bytes: int | None = None
    peak_memory_bytes: int | None = None
    exact: bool | None = None
    divergence_gap: float | None = None
    logit_noise: float | None = None
    hardware: str | None = None
    text: str | None = None


class PromptRow(OfCell):
    """One prompt of one cell; measured ones have a `timing`.

    An `estimate` has expected counts. Where a greedy row is not exact, the rounds from the first token that
    differs are left out of all counts; `num_left_out` is the number of their tokens. A row of a lossy rule is
    neither exact nor not: all its rounds count, and `departure` says how far its text is from the target's.
    """

    mode: Mode
    prompt_id: str
    document_id: str
    counts: Counts
    num_left_out: int = 0
    repetition_rate: float
    looping: bool
    in_trained_range: bool
    drafter_kv_bytes: int
    timing: Timing | None = None
    departure: Departure | None = None

    @property
    def batch(self) -> str:
        """The first of the prompts that this one was decoded together with: they share one clock."""
        return (self.timing and self.timing.together_with) or self.prompt_id


class StepTimes(Row):
    """How long the steps of decoding take at one context, on random tokens that are in no data set.

    Seconds, medians over interleaved runs: `draft_s` of one proposal of this source behind this budget,
    `verify_s` by γ of verifying γ + 1 tokens, `round_s` of the rest of a round, `ar_s` of one autoregressive
    token with all that it takes. `kind` is "drafter" for every variant, or the baseline. Prompt lookup looks
    once a round, however many tokens it proposes, and its `draft_s` is the time of that.
    """

    context: str
    prompt_tokens: int
    kind: str
    policy: str
    budget: Budget
    draft_s: float
    verify_s: dict[int, float]
    round_s: float
    ar_s: float


class PredictedRow(OfCell):
    """Decode speed of a cell as predicted from step times and replayed rounds; never measured.

    The interval is over documents, of the rounds alone: the step times have errors of their own.
    """

    num_prompts: int
    num_documents: int
    decode_s: float
    speedup: Interval


class PickedCell(OfCell):
    """A cell that predictions point at, to be measured."""


class FailedCell(OfCell):
    """A cell (or all cells of one prompt, where γ is 0) that ended in an error."""

    mode: Mode
    prompt_id: str
    error: str


class Speed(Row):
    """Decode speed of a measured cell against autoregressive decoding of the same prompts.

    `num_clocked` is how many units the intervals resample: documents, those whose prompts were decoded
    together counting as one. `end_to_end` includes the prefills; None where a prefill was not timed.
    """

    speedup: Interval
    worst_prompt_speedup: float
    end_to_end: Interval | None
    tokens_per_s: float
    ar_tokens_per_s: float
    num_clocked: int


class CellRow(OfCell):
    """One cell over all its prompts: pooled acceptance and, where measured, speed, with 95 % intervals.

    `prompts_together` were decoded at once. `departure` is that of a lossy rule's texts, over all prompts.
    """

    mode: Mode
    num_prompts: int
    num_documents: int
    num_looping: int
    num_left_out: int = 0
    prompts_together: int = 1
    acceptance: Interval | None
    acceptance_not_looping: float | None
    mean_tokens_per_round: float
    conditional_acceptance: list[float]
    in_trained_range: bool
    drafter_kv_bytes: int
    target_kv_bytes: int | None = None
    exact_prompts: int | None = None
    peak_memory_bytes: int | None = None
    speed: Speed | None = None
    departure: Departure | None = None


class ModelSize(Row):
    """Bytes of a model's weights, and of the KV of one token."""

    name: str
    weight_bytes: int
    kv_bytes_per_token: int
