"""The fields of `sweep`, `decode` and `report`: what is evaluated, by which engine, and what is said."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.axes import AcceptanceRule, Baseline, View, check_budget
from pipeline.config.group import Group

Policy = Literal["chunk_topk", "chunk_topk_paper", "streaming", "snapkv", "window", "target_guided"]
Control = Literal["other_prompt", "no_prefix"]
SWEPT = (
    "drafters", "baselines", "policies", "budgets", "gammas", "thresholds", "temperatures", "seeds",
    "controls", "rules",
)  # fmt: skip


class Plane(Group):
    """One full budget × γ plane that is measured, to score predicted times on cells that nobody picked."""

    drafter: str = Field(description="a drafter, by variant or with its seed")
    dataset: str = Field(description="name of a source")
    context: str = Field(description="name of a context")


class Measure(Group):
    """Cells whose wall clock is measured; an empty list means every value of the sweep."""

    drafters: tuple[str, ...] = ()
    budgets: tuple[int | Literal["full"], ...] = ()
    gammas: tuple[int, ...] = ()
    temperatures: tuple[float, ...] = ()
    prompts: int = Field(
        8,
        ge=1,
        description="prompts per data set and context; of fewer documents than "
        "report.least_documents nothing is recommended",
    )
    prompts_together: int = Field(
        1, ge=1, le=256, description="prompts decoded at once, each with its own acceptance"
    )
    repeats: int = Field(3, ge=1, description="interleaved repeats of every cell and of AR")
    predict: bool = Field(
        True,
        description="mode both: time single steps, predict every cell's speed from them, measure the best "
        "and the extremes of each data set and context too, and of these the fastest twice more, greedily "
        "and with four times the repeats",
    )
    plane: Plane | None = Field(
        None,
        description="budget × γ plane that scores the predictions, by single steps timed between its prompts",
    )


class Cascade(Group):
    """The small drafter of the baseline cascade, its view, and how much it drafts for the middle."""

    drafter: str = Field(
        description="one of train's drafters: a variant, or NAME~SEED of one with several seeds"
    )
    policy: Policy = Field("streaming", description="the rule of the drafter's own view")
    budget: int | Literal["full"] = Field(description="budget of the drafter's own view")
    gamma: int = Field(ge=1, le=128, description="proposals of the drafter in an inner round")

    @field_validator("budget")
    @classmethod
    def _valid_budget(cls, budget: int | str) -> int | str:
        return check_budget(budget)

    @property
    def view(self) -> View:
        return View(self.policy, self.budget).kept


class Decode(Group):
    """The engine that decodes, for the target alone as for both models."""

    compile: Literal["none", "inductor", "cudagraphs"] = Field(
        "none", description="inductor compiles the steps; cudagraphs also captures them, on a GPU"
    )
    draft_length: Literal["fixed", "adaptive"] = Field(
        "fixed", description="γ proposals a round, or fewer by sweep.thresholds"
    )
    prefill_chunk: int = Field(
        2048, ge=16, description="tokens of a prefix that are computed at once; bounds its activations"
    )


class DropMatchRule(Group):
    """The lossy rule `dropmatch`: a proposal stands that the arg-max behind any of the masks gives."""

    masks: int = Field(5, ge=1, le=64, description="dropout masks on the target's last hidden state")
    dropout: float = Field(0.3, gt=0, lt=1, description="share of its channels that a mask drops")


class Sweep(Group):
    mode: Literal["replay", "measure", "both"] = "both"
    drafters: tuple[str, ...] = Field((), description="variants to evaluate; empty: all")
    baselines: tuple[Baseline, ...] = Field(
        (),
        description="draft sources without training: the target behind a sparse view of itself (streaming "
        "and snapkv), that with a small drafter drafting for it (cascade), and n-gram lookup in prompt and "
        "text",
    )
    cascade: Cascade | None = Field(
        None,
        exclude_if=lambda cascade: cascade is None,
        description="what drafts within the baseline cascade (TriForce); default: none",
    )
    policies: tuple[Policy, ...] = ("chunk_topk",)
    sinks: int = Field(
        0,
        ge=0,
        le=64,
        exclude_if=lambda sinks: sinks == 0,
        description="first entries that the policy window always sees; 0 is an engine's sliding window",
    )
    refresh: int | None = Field(
        None,
        ge=1,
        exclude_if=lambda refresh: refresh is None,
        description="rounds after which the policy target_guided chooses a drafter's entries again; all of "
        "its prefix KV are then held aside. Default: never",
    )
    budgets: tuple[int | Literal["full"], ...] = Field(min_length=1)
    gammas: tuple[Annotated[int, Field(ge=1, le=128)], ...] = Field(
        min_length=1, description="num_draft_tokens"
    )
    max_gammas: dict[str, int] = Field(
        default={}, description="context → largest γ there; default: all gammas at every context"
    )
    thresholds: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = Field(
        (0.0,),
        min_length=1,
        description="with decode.draft_length adaptive: a round stops behind a proposal of which the drafter "
        "is less sure; 0 always drafts γ",
    )
    temperatures: tuple[Annotated[float, Field(ge=0)], ...] = Field((0.0,), min_length=1)
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="sampling seeds; greedy uses the first")
    controls: tuple[Control, ...] = ("other_prompt", "no_prefix")
    rules: tuple[AcceptanceRule, ...] = Field(
        ("exact",),
        exclude_if=lambda rules: rules == ("exact",),
        description="how proposals are accepted; dropmatch is lossy: the cells that measure names are "
        "decoded by it too, and their text is not the target's. It has no replay, and is recommended only "
        "where it is asked for",
    )
    dropmatch: DropMatchRule = Field(
        DropMatchRule(), exclude_if=lambda rule: rule == DropMatchRule(), description="of the rule dropmatch"
    )
    measure: Measure = Measure()
    num_evaluators: int = Field(1, ge=1, description="actors that replay at once; measuring uses one")
    looping_rate: float = Field(
        0.5, gt=0, le=1, description="repetition rate above which a continuation counts as looping"
    )

    @field_validator("budgets")
    @classmethod
    def _valid_budgets(cls, budgets: tuple[int | str, ...]) -> tuple[int | str, ...]:
        return tuple(check_budget(budget) for budget in budgets)

    @property
    def predicts(self) -> bool:
        return self.mode == "both" and self.measure.predict

    def gammas_of(self, context: str) -> tuple[int, ...]:
        """The γ that are swept at a context."""
        return tuple(g for g in self.gammas if g <= self.max_gammas.get(context, g))

    @model_validator(mode="after")
    def _axes_fit(self) -> Sweep:
        for context in self.max_gammas:
            if not self.gammas_of(context):
                raise ValueError(f"max_gammas.{context} is below every one of gammas")
        self._rules_fit()
        self._refresh_fits()
        if self.predicts and (0.0 not in self.temperatures or 0.0 not in self.thresholds):
            raise ValueError(
                "measure.predict is for greedy cells that always draft γ: add 0.0 to temperatures and "
                "thresholds, or set measure.predict: false"
            )
        if self.measure.plane and not self.predicts:
            raise ValueError("measure.plane scores predictions: it needs mode both and measure.predict")
        if self.predicts and self.measure.prompts_together > 1:
            raise ValueError(
                "measure.predict times prompts that are decoded alone: set measure.prompts_together: 1 or "
                "measure.predict: false"
            )
        if ("cascade" in self.baselines) != (self.cascade is not None):
            raise ValueError(
                "cascade among sweep.baselines goes with sweep.cascade, which says what drafts within it "
                "({drafter: NAME, budget: 256, gamma: 2}): set both or neither"
            )
        for field in SWEPT:
            values = getattr(self, field)
            twice = [value for value in values if values.count(value) > 1]
            if twice:
                raise ValueError(f"{field} lists {twice[0]} twice")
        for field in ("budgets", "gammas", "temperatures"):
            swept = getattr(self, field)
            extra = [str(value) for value in getattr(self.measure, field) if value not in swept]
            if extra:
                raise ValueError(
                    f"measure.{field} names {', '.join(extra)}, which {field} lacks: it has "
                    f"{', '.join(map(str, swept))}"
                )
        return self

    def _refresh_fits(self) -> None:
        """Raises ValueError where nothing is chosen again, or replay or prediction could not follow it."""
        if self.refresh is None:
            return
        if "target_guided" not in self.policies:
            raise ValueError(
                f"refresh ({self.refresh}) goes with the policy target_guided: add it to policies"
            )
        if any(self.temperatures) or any(self.thresholds):
            raise ValueError(
                f"refresh ({self.refresh}) is for greedy cells that always draft γ: sweep temperatures and "
                "thresholds above 0 apart"
            )
        if self.predicts:
            raise ValueError(
                "measure.predict predicts from single steps, which choose nothing again: with refresh set "
                "measure.predict: false"
            )

    def _rules_fit(self) -> None:
        """Raises ValueError where a lossy rule cannot be measured, or has nothing to stand beside."""
        if "exact" not in self.rules:
            raise ValueError("rules lacks exact: what a lossy rule gives is measured beside it")
        if "dropmatch" not in self.rules:
            if self.dropmatch != DropMatchRule():
                raise ValueError("dropmatch goes with the rule dropmatch: add it to rules")
            return
        if self.mode == "replay":
            raise ValueError(
                "rules: dropmatch has no replay, since its text is not the target's own: set mode: measure "
                "or both, or leave it out"
            )
        if any(self.temperatures):
            raise ValueError(
                f"rules: dropmatch is for greedy decoding, and temperatures has {max(self.temperatures):g}: "
                "sweep it apart, at 0.0 alone"
            )


class Report(Group):
    least_documents: int = Field(5, ge=2, description="documents below which nothing is ranked")
    bootstrap_samples: int = Field(2000, ge=100, description="resamples of every interval")
    samples: int = Field(3, ge=0, description="texts shown per data set")
