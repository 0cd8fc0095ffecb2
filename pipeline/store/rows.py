"""The typed rows that stages hand to one another, one JSON line each. Words as in the README."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

# replay is exact, estimate the expectation over sampled continuations, measure has been decoded.
Mode = Literal["replay", "estimate", "measure"]
Count = int | float


class Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Prompt(Row):
    """One evaluation prompt of an exact token length (stage prepare)."""

    prompt_id: str
    document_id: str
    dataset: str
    context: str
    split: Literal["validation", "test"]
    tokens: list[int]
    max_new_tokens: int
    answers: list[str] = []
    scoring: Literal["none", "contains"] = "none"


class Continuation(Row):
    """The target's own continuation of a prompt: greedy, or sampled at `temperature` (stage teach).

    `tokens[0]` is what the prefill gives; `gaps[t]` is the target's top-1 minus top-2 logit when it chose
    `tokens[t]`, and of a sampled one `log_probs[t]` its log-probability. It ends with EOS (`eos_at` is its
    index) or after `max_new_tokens`.
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


class Cell(Row):
    """One point of a sweep."""

    drafter: str
    dataset: str
    context: str
    policy: str
    budget: int | Literal["full"]
    control: str | None
    gamma: int
    threshold: float = 0.0
    temperature: float
    seed: int


class PromptRow(Cell):
    """One prompt of one cell. Counts leave out the token that the prefill gives.

    `reached[i]` rounds got as far as draft position i, `kept[i]` of them accepted it. Times are those of
    measured rows only, one per repeat; `ar_decode_s` are the autoregressive runs interleaved with them.
    Where a greedy run is not `exact`, `divergence_gap` is the target's top-2 logit gap at the first token
    that differs, and `logit_noise` how much its logits up to there depend on reading tokens singly or at
    once: in half precision a gap below the noise explains the difference.
    Of such a row the rounds from that token on are left out of all counts; `num_left_out` is their tokens.
    An `estimate` has expected counts, not whole numbers. `num_proposed` is None where replay cannot know it:
    where drafting stops early, what follows a wrong proposal.
    `prompts_together` were decoded at once, those with one `together_with`, the first's id; their time is
    divided evenly among their rows. `compile_s` is what compiling for a cell took, outside its times: 0
    where its shapes were compiled already.
    `prefill_s` has one prefill of the drafter for all measured views; `peak_memory_bytes` is that of the
    device while the cell decodes, with the caches of all measured cells of the prompt in it.
    `hardware` is what a measured row was timed on.
    """

    mode: Mode
    prompt_id: str
    document_id: str
    prompts_together: int = 1
    together_with: str | None = None
    num_tokens: int
    num_left_out: int = 0
    num_rounds: Count
    num_proposed: Count | None
    num_accepted: Count
    reached: list[Count]
    kept: list[Count]
    repetition_rate: float
    looping: bool
    in_trained_range: bool
    drafter_kv_bytes: int
    target_kv_bytes: int | None = None
    exact: bool | None = None
    divergence_gap: float | None = None
    logit_noise: float | None = None
    prefill_s: float | None = None
    ar_prefill_s: float | None = None
    decode_s: list[float] = []
    ar_decode_s: list[float] = []
    compile_s: float | None = None
    ar_num_tokens: int | None = None
    peak_memory_bytes: int | None = None
    hardware: str | None = None
    text: str | None = None


class StepTimes(Row):
    """What decoding's steps take at one context, on prompts of random tokens that are in no data set.

    Seconds, medians over interleaved runs: `draft_s` of one proposal of this source behind this budget,
    `verify_s` by γ of verifying γ + 1 tokens, `round_s` of what a round takes beside both, `ar_s` of one
    autoregressive token, all in. `kind` is "drafter", whichever variant, or the baseline. Prompt lookup looks
    once a round, however many tokens it proposes, and its `draft_s` is of that.
    """

    context: str
    prompt_tokens: int
    kind: str
    policy: str
    budget: int | Literal["full"]
    draft_s: float
    verify_s: dict[int, float]
    round_s: float
    ar_s: float


class PredictedRow(Cell):
    """Decode speed of a cell as predicted from step times and replayed rounds; never measured.

    The interval is over documents, of the rounds alone: the step times have errors of their own.
    """

    num_prompts: int
    num_documents: int
    decode_s: float
    speedup: float
    speedup_low: float
    speedup_high: float


class FailedCell(Cell):
    """A cell (or all cells of one prompt, where gamma is 0) that ended in an error."""

    mode: Mode
    prompt_id: str
    error: str


class CellRow(Cell):
    """One cell over all its prompts: pooled acceptance and, where measured, speed, with 95 % intervals.

    `num_clocked` is how many units the speed's interval resamples: documents, those whose prompts were
    decoded together counting as one. `prompts_together` were decoded at once.
    """

    mode: Mode
    num_prompts: int
    num_documents: int
    num_looping: int
    num_left_out: int = 0
    num_clocked: int | None = None
    prompts_together: int = 1
    acceptance: float | None
    acceptance_low: float | None
    acceptance_high: float | None
    acceptance_not_looping: float | None
    mean_tokens_per_round: float
    conditional_acceptance: list[float]
    in_trained_range: bool
    drafter_kv_bytes: int
    target_kv_bytes: int | None = None
    exact_prompts: int | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    worst_prompt_speedup: float | None = None
    end_to_end_speedup: float | None = None
    end_to_end_low: float | None = None
    end_to_end_high: float | None = None
    tokens_per_s: float | None = None
    ar_tokens_per_s: float | None = None
    peak_memory_bytes: int | None = None


class ModelSize(Row):
    """Bytes of a model's weights, and of the KV of one token."""

    name: str
    weight_bytes: int
    kv_bytes_per_token: int
