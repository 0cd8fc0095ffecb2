"""The typed rows that stages hand to one another, one JSON line each. Words as in the README."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


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
    """The target's own greedy continuation of a prompt (stage teach).

    `tokens[0]` is what the prefill gives; `gaps[t]` is the target's top-1 minus top-2 logit when it chose
    `tokens[t]`. It ends with EOS (`eos_at` is its index) or after `max_new_tokens`.
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
    `prompts_together` were decoded at once, those with one `together_with`, the first's id; their time is
    divided evenly among their rows. `compile_s` is what compiling for a cell took, outside its times: 0
    where its shapes were compiled already.
    `prefill_s` has one prefill of the drafter for all measured views; `peak_memory_bytes` is that of the
    device while the cell decodes, with the caches of all measured cells of the prompt in it.
    """

    mode: Literal["replay", "measure"]
    prompt_id: str
    document_id: str
    prompts_together: int = 1
    together_with: str | None = None
    num_tokens: int
    num_rounds: int
    num_proposed: int
    num_accepted: int
    reached: list[int]
    kept: list[int]
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
    text: str | None = None


class FailedCell(Cell):
    """A cell (or all cells of one prompt, where gamma is 0) that ended in an error."""

    mode: Literal["replay", "measure"]
    prompt_id: str
    error: str


class CellRow(Cell):
    """One cell over all its prompts: pooled acceptance and, where measured, speed, with 95 % intervals."""

    mode: Literal["replay", "measure"]
    num_prompts: int
    num_documents: int
    num_looping: int
    acceptance: float
    acceptance_low: float
    acceptance_high: float
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
    tokens_per_s: float | None = None
    ar_tokens_per_s: float | None = None
    peak_memory_bytes: int | None = None
