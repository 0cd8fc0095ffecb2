"""Labels, variants and training in the config."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator, model_validator

from pipeline.axes import Baseline, Positions, check_budget
from pipeline.config.group import Group
from pipeline.config.rope import RopeScaling
from pipeline.config.sweep import Policy

LossKind = Literal["cross_entropy", "kl", "total_variation", "nla", "lk_hybrid"]
READ_TOP_K = ("kl", "total_variation", "nla", "lk_hybrid")  # losses that need stored log-probabilities

RESERVED = (*get_args(Baseline), "target")


class Answers(Group):
    """The target's own answers to the training prompts of sources that ask."""

    per_prompt: int = Field(1, ge=1, description="answers to each prompt")
    temperature: float = Field(0.0, ge=0, description="temperature at which they are written")
    written: str | None = Field(
        None,
        exclude_if=lambda written: written is None,
        description="file of answers that the target wrote before, as workers reach it, such as "
        "docs/results/smollm2/answers.jsonl.xz; what is not in it the target answers",
    )

    @model_validator(mode="after")
    def _differ(self) -> Answers:
        if self.per_prompt > 1 and self.temperature == 0:
            raise ValueError("per_prompt above 1 needs a temperature above 0: greedy answers are all alike")
        return self


class TextServer(Group):
    """An OpenAI-compatible server of the target, which writes greedy texts in its place."""

    url: str = Field(
        pattern=r"^https?://[^\s@/]+[^\s@]*$",
        description="its address, with or without /v1, as workers reach it; without user and password",
    )
    model: str | None = Field(
        None, description="what it calls the target; default: the only one that it serves"
    )
    requests_at_once: int = Field(32, ge=1, description="prompts that each copy of the target has on the way")
    timeout_s: float = Field(600.0, gt=0, description="seconds that a text may take")
    least_agreement: float = Field(
        0.98,
        gt=0,
        le=1,
        description="share of a text's tokens that must be the target's own arg-max; of a text with less the "
        "target writes one itself, and texts of a task that have less together end the run",
    )


class Labels(Group):
    top_k: int = Field(0, ge=0, description="target log-probabilities stored per position; 0: arg-max only")
    temperature: float = Field(1.0, gt=0, description="temperature of the stored log-probabilities")
    on_policy_fraction: float = Field(
        0.0, ge=0, le=1, description="share of sequences whose continuation the target writes itself"
    )
    on_policy_temperature: float = Field(1.0, ge=0, description="temperature at which it writes them")
    features: Literal["stored", "recomputed"] | None = Field(
        None,
        exclude_if=lambda features: features is None,
        description="of a head: hidden states of the target that stage teach stores (fp16), or that training "
        "has the target give anew; default: stored",
    )
    answers: Answers = Field(
        Answers(), exclude_if=lambda answers: answers == Answers(), description="of sources that ask"
    )
    server: TextServer | None = Field(
        None,
        exclude_if=lambda server: server is None,
        description="an engine that writes answers and on-policy texts, greedily; default: the target does",
    )
    batch_sequences: int = Field(8, ge=1, description="sequences per forward pass of the target")
    max_sequences: int = Field(1_000_000_000, ge=1, description="most training sequences that are labelled")
    sequences_per_shard: int = Field(256, ge=1, description="sequences that one task labels")
    num_workers: int = Field(1, ge=1, description="copies of the target that label at once")

    @model_validator(mode="after")
    def _server_writes_greedily(self) -> Labels:
        if self.server is not None and self.answers.written is not None:
            raise ValueError("labels.server and labels.answers.written both give the answers: keep one")
        for field, asked, temperature in (
            ("answers.temperature", True, self.answers.temperature),
            ("on_policy_temperature", self.on_policy_fraction > 0, self.on_policy_temperature),
        ):
            if self.server is not None and asked and temperature > 0:
                raise ValueError(
                    f"{field} ({temperature:g}) must be 0 with labels.server: only of greedy text it can be "
                    "told token by token whether it is the target's; without a server the target samples"
                )
        return self


class Paths(Group):
    """A term over texts that the drafter itself samples (variational speculative decoding)."""

    every: int = Field(4, ge=1, description="R: the term is in every R-th step, from the first")
    paths: int = Field(4, ge=2, description="S, paths that are sampled from each window's start")
    length: int = Field(4, ge=2, le=64, description="γ, tokens of a path")
    weight: float = Field(1.0, gt=0, description="of the term, beside those of the branches")
    kl_weight: float = Field(1.0, ge=0, description="of KL(p ‖ q) along the paths, within the term")
    temperature: float = Field(1.0, gt=0, description="of drafter and target in the term")


class Variant(Group):
    """One drafter to train: the weights of the two branches and the views of the sparse one."""

    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")
    steps: int | None = Field(None, ge=0, description="default: train.steps; 0 exports the drafter untrained")
    full_weight: float = Field(1.0, ge=0, description="weight of the full-cache branch L_A")
    sparse_weight: float = Field(0.5, ge=0, description="λ, the weight of the sparse-cache branch L_C")
    full_loss: LossKind = "cross_entropy"
    sparse_loss: LossKind = "cross_entropy"
    policy: Policy = "chunk_topk"
    sinks: int = Field(
        0,
        ge=0,
        le=64,
        exclude_if=lambda sinks: sinks == 0,
        description="first entries that the policy window always sees",
    )
    positions: Positions = Field(
        "true",
        exclude_if=lambda positions: positions == "true",
        description="of kept entries: true; rebased, moved together before what follows them, in training "
        "and after; anchor_offset, where training moves the sinks back by as much as longer texts would",
    )
    served_tokens: int | None = Field(
        None,
        ge=1,
        exclude_if=lambda tokens: tokens is None,
        description="of anchor_offset: the longest text that the drafter is to serve",
    )
    budgets: dict[int, float] = Field(default={}, description="budget → sampling weight")
    num_views: int = Field(2, ge=1, description="budgets drawn per micro-batch, with replacement")
    path: Paths | None = Field(
        None,
        exclude_if=lambda path: path is None,
        description="likelihood of sampled paths, each weighted by how much of it the target would accept; "
        "the target is then in every training worker. Default: no such term",
    )
    rope_scaling: RopeScaling | None = Field(
        None, description="the drafter's rope parameters from here on; default: as it comes"
    )
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (), description="training seeds; several train a drafter each, NAME~SEED; default: the config's"
    )

    @property
    def drafters(self) -> tuple[Variant, ...]:
        """The drafters to train, one a seed."""
        if len(self.seeds) < 2:
            return (self,)
        return tuple(
            self.model_copy(update={"name": f"{self.name}~{seed}", "seeds": (seed,)}) for seed in self.seeds
        )

    @field_validator("budgets")
    @classmethod
    def _valid_budgets(cls, budgets: dict[int, float]) -> dict[int, float]:
        for budget, weight in budgets.items():
            check_budget(budget)
            if weight <= 0:
                raise ValueError(f"the weight of budget {budget} must be positive, not {weight}")
        return budgets

    @model_validator(mode="after")
    def _has_terms(self) -> Variant:
        if self.sparse_weight > 0 and not self.budgets and self.steps != 0:
            raise ValueError("sparse_weight > 0 needs budgets; for L_A alone set sparse_weight: 0")
        if self.full_weight == 0 and self.sparse_weight == 0:
            raise ValueError("full_weight and sparse_weight are both 0: there is nothing to train on")
        if (self.positions == "anchor_offset") != (self.served_tokens is not None):
            raise ValueError("served_tokens goes with positions: anchor_offset, which needs it")
        if self.positions == "rebased" and self.policy == "window":
            raise ValueError("positions: rebased is for views that keep their entries, and a window rolls")
        if self.positions == "anchor_offset" and self.policy == "window" and not self.sinks:
            raise ValueError("positions: anchor_offset moves sinks, and this window has none: set sinks")
        if self.name in RESERVED:
            raise ValueError(f"{self.name!r} is what results call something else: choose another name")
        twice = [seed for seed in self.seeds if self.seeds.count(seed) > 1]
        if twice:
            raise ValueError(f"seeds lists {twice[0]} twice")
        return self


class Train(Group):
    variants: tuple[Variant, ...] = Field(min_length=1)
    steps: int = Field(ge=0, description="optimizer steps of each variant")
    batch_sequences: int = Field(8, ge=1, description="sequences per optimizer step, over all workers")
    micro_batch_sequences: int = Field(4, ge=1, description="sequences per forward pass of one worker")
    window_tokens: int = Field(256, ge=1, description="C, tokens of one continuation window")
    windows: int = Field(1, ge=1, description="windows per sequence and step")
    min_prefix_tokens: int = Field(16, ge=1, description="shortest prefix before a window")
    learning_rate: float = Field(1e-5, gt=0, description="peak, AdamW")
    weight_decay: float = Field(0.01, ge=0)
    warmup_steps: int = Field(0, ge=0, description="linear warm-up, then cosine to 0")
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    draft_vocabulary: int | None = Field(
        None,
        ge=16,
        exclude_if=lambda size: size is None,  # as if it had not been added: fingerprints stay
        description="tokens that drafters can propose: the most frequent labels of the training split, and "
        "those that end texts. Default: all",
    )
    chain_steps: int | None = Field(
        None,
        ge=1,
        le=16,
        exclude_if=lambda steps: steps is None,
        description="of a head: proposals of the chains that it is trained on, each fed what the one before "
        "gave; default: 3",
    )
    chain_decay: float | None = Field(
        None,
        gt=0,
        le=1,
        exclude_if=lambda decay: decay is None,
        description="of a head: weight of a chain's proposal to that of the one before it; default: 0.8",
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="bfloat16: autocast, fp32 weights")
    max_logits_mib: int = Field(
        256,
        ge=0,
        description="MiB of fp32 logits that a micro-batch may make; beyond, losses come from hidden states "
        "without logits (not under ZeRO-3)",
    )
    num_workers: int = Field(1, ge=1, description="data-parallel processes")
    deepspeed: str = Field("conf/deepspeed/zero1.json", description="DeepSpeed settings of the Ray workers")
    checkpoint_every: int = Field(200, ge=1, description="steps between resumable checkpoints")
    validate_every: int = Field(100, ge=1, description="steps between points of the validation curve")
    validation_gamma: int = Field(4, ge=1, description="γ of the validation curve")
    validation_budgets: tuple[int | Literal["full"], ...] = Field(
        ("full",), description="budgets of the validation curve"
    )

    @property
    def learned_tokens(self) -> int:
        """Tokens of all windows of one sequence: of an answer no more are learned from."""
        return self.windows * self.window_tokens

    def steps_of(self, variant: Variant) -> int:
        """Optimizer steps of a variant or of one of its drafters."""
        return self.steps if variant.steps is None else variant.steps

    @property
    def drafters(self) -> tuple[Variant, ...]:
        """Every drafter that is trained: the variants, one for each of their seeds."""
        return tuple(drafter for variant in self.variants for drafter in variant.drafters)

    def drafter_named(self, name: str) -> Variant:
        """What a drafter is trained as."""
        return next(drafter for drafter in self.drafters if drafter.name == name)

    @field_validator("validation_budgets")
    @classmethod
    def _valid_budgets(cls, budgets: tuple[int | str, ...]) -> tuple[int | str, ...]:
        return tuple(check_budget(budget) for budget in budgets)

    @model_validator(mode="after")
    def _batch_divides(self) -> Train:
        share = self.micro_batch_sequences * self.num_workers
        if self.batch_sequences % share:
            raise ValueError(
                f"batch_sequences ({self.batch_sequences}) must be a multiple of micro_batch_sequences × "
                f"num_workers ({self.micro_batch_sequences} × {self.num_workers} = {share})"
            )
        names = [v.name for v in self.variants]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"variants: the name {sorted(twice)[0]!r} is used twice")
        return self
