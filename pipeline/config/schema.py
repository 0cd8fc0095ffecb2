"""The one schema of every config file: typed to the leaf, with unit, range and meaning.

Here stand models, labels, training and how it runs; `config_data.py` and `config_sweep.py` have the fields of
`data` and of the sweep. Reading YAML, `extends` and overrides live in `config_files.py`, error texts in
`config_errors.py`. Groups are frozen: a stage is handed its group, never a dict.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, field_validator, model_validator

from pipeline.config.data import Data
from pipeline.config.group import Group
from pipeline.config.registry import Registry
from pipeline.config.sweep import Decode, Policy, Report, Sweep, check_budget, family

LossKind = Literal["cross_entropy", "kl", "total_variation"]
RESERVED = ("self_speculation", "prompt_lookup", "target")
Dtype = Literal["float32", "bfloat16", "float16"]
# Kinds of Ray workers: data tasks, the labelling target, training workers, drafters that replay, and the
# target with its drafters, timed.
Work = Literal["prepare", "teach", "train", "replay", "measure"]
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


def check_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Names its rule as transformers does now: under the older name, `type`, it would be ignored silently."""
    if parameters.get("rope_type") not in ROPE_TYPES:
        raise ValueError(f"rope_type must be one of {', '.join(ROPE_TYPES)}")
    return parameters


RopeScaling = Annotated[dict[str, Any], AfterValidator(check_rope)]


# ── models ────────────────────────────────────────────────────────────────────────────────────────


class Pretrain(Group):
    """Next-token training of a scratch model on the training split."""

    steps: int = Field(ge=0, description="optimizer steps")
    batch_sequences: int = Field(8, ge=1, description="sequences per step")
    sequence_tokens: int | None = Field(
        None, ge=32, description="tokens of one sequence, a piece of a packed one; default: the whole"
    )
    learning_rate: float = Field(1e-3, gt=0, description="peak, AdamW")
    warmup_steps: int = Field(50, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    compile: bool = Field(False, description="compile forward pass and loss; for run.executor: inline")
    patience: int | None = Field(
        None,
        ge=1,
        description="points of the validation curve (every train.validate_every steps) without a lower loss "
        "after which training ends; the best point's weights are kept. Default: all steps, the last weights",
    )


class ScratchModel(Group):
    """A Llama that the pipeline builds and pretrains itself."""

    kind: Literal["scratch"]
    layers: int = Field(ge=1)
    hidden: int = Field(ge=16, description="model width")
    heads: int = Field(ge=1, description="query heads")
    kv_heads: int = Field(ge=1, description="key/value heads; divides heads")
    intermediate: int = Field(ge=16, description="MLP width")
    max_positions: int = Field(ge=32, description="positions that it is built for")
    rope_theta: float = Field(10_000.0, gt=0)
    rope_scaling: RopeScaling | None = Field(None, description="transformers' rope parameters, e.g. YaRN")
    pretrain: Pretrain
    dtype: Dtype = Field("float32", description="precision it runs in at evaluation")

    @model_validator(mode="after")
    def _heads_divide(self) -> ScratchModel:
        if self.hidden % self.heads or self.heads % self.kv_heads:
            raise ValueError("heads must divide hidden, and kv_heads must divide heads")
        if (self.hidden // self.heads) % 2:
            raise ValueError("hidden / heads must be even: rotary embeddings turn pairs")
        return self


class PretrainedModel(Group):
    kind: Literal["pretrained"]
    path: str = Field(description="hub id or local folder with safetensors")
    revision: str | None = Field(None, description="hub revision; a commit hash makes a run repeatable")
    dtype: Dtype = Field("float32", description="precision it runs in")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    rope_scaling: RopeScaling | None = Field(None, description="replaces the model's rope parameters")
    trained_positions: int | None = Field(
        None, ge=1, description="positions it was trained on, where its config does not say so"
    )

    @property
    def may_be_on_hub(self) -> bool:
        """Whether `path`, where it is no folder, may be owner/name of the hub."""
        return self.path.count("/") == 1 and not self.path.startswith((".", "~", "/"))


AnyModel = Annotated[ScratchModel | PretrainedModel, Field(discriminator="kind")]


# ── labels, training ──────────────────────────────────────────────────────────────────────────────


class Labels(Group):
    top_k: int = Field(0, ge=0, description="target log-probabilities stored per position; 0: arg-max only")
    temperature: float = Field(1.0, gt=0, description="temperature of the stored log-probabilities")
    on_policy_fraction: float = Field(
        0.0, ge=0, le=1, description="share of sequences whose continuation the target writes itself"
    )
    on_policy_temperature: float = Field(1.0, ge=0, description="temperature at which it writes them")
    batch_sequences: int = Field(8, ge=1, description="sequences per forward pass of the target")
    max_sequences: int = Field(1_000_000_000, ge=1, description="most training sequences that are labelled")
    sequences_per_shard: int = Field(256, ge=1, description="sequences that one task labels")
    num_workers: int = Field(1, ge=1, description="copies of the target that label at once")


class Variant(Group):
    """One drafter to train: the weights of the two branches and the views of the sparse one."""

    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")
    steps: int | None = Field(None, ge=0, description="default: train.steps; 0 exports the drafter untrained")
    full_weight: float = Field(1.0, ge=0, description="weight of the full-cache branch L_A")
    sparse_weight: float = Field(0.5, ge=0, description="λ, the weight of the sparse-cache branch L_C")
    full_loss: LossKind = "cross_entropy"
    sparse_loss: LossKind = "cross_entropy"
    policy: Policy = "chunk_topk"
    budgets: dict[int, float] = Field(default={}, description="budget → sampling weight")
    num_views: int = Field(2, ge=1, description="budgets drawn per micro-batch, with replacement")
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
    def drafters(self) -> tuple[Variant, ...]:
        """Every drafter that is trained: the variants, one for each of their seeds."""
        return tuple(drafter for variant in self.variants for drafter in variant.drafters)

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


# ── how it runs ───────────────────────────────────────────────────────────────────────────────────


class Resources(Group):
    """What one Ray worker of a kind of work asks for; what is not given is as for all work."""

    cpus: float | None = Field(None, ge=0, description="CPUs, and its torch threads; default: cpus_per_task")
    gpus: float | None = Field(
        None, ge=0, description="GPUs; a part of one is shared with others; default: gpus_per_task"
    )
    memory_gb: float | None = Field(None, gt=0, description="GB (10^9) of memory; default: not reserved")

    @model_validator(mode="after")
    def _whole_gpus(self) -> Resources:
        if self.gpus and self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"gpus is {self.gpus:g}: more than one GPU is a whole number of them")
        return self


class Run(Group):
    """Where and on what it runs. Of this only device and kernels matter to a result: a sweep's wall clock."""

    executor: Literal["ray", "inline"] = "ray"
    ray_address: str | None = Field(
        None, description='cluster to join; "local" or empty starts one, unless inside a Ray job'
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cpus_per_task: float = Field(1, ge=0, description="CPUs a Ray task or actor asks for; its torch threads")
    kernels: Literal["auto", "triton", "torch"] = Field(
        "auto", description="auto: Triton's on a GPU, torch elsewhere"
    )
    gpus_per_task: float = Field(
        0,
        ge=0,
        description="GPUs a Ray actor or training worker asks for; tasks that prepare data ask for none",
    )
    resources: dict[Work, Resources] = Field(
        default={}, description="by kind of work, where it asks for something else than that"
    )

    def needs(self, work: Work) -> Resources:
        """What one worker asks for, every default filled in but that of the memory."""
        given = self.resources.get(work, Resources())
        gpus = 0.0 if work == "prepare" else self.gpus_per_task
        return Resources(
            cpus=self.cpus_per_task if given.cpus is None else given.cpus,
            gpus=gpus if given.gpus is None else given.gpus,
            memory_gb=given.memory_gb,
        )

    @model_validator(mode="after")
    def _device_fits(self) -> Run:
        if self.kernels == "triton" and self.device == "cpu":
            raise ValueError("kernels is triton, which needs a GPU, but device is cpu")
        for work in get_args(Work):
            field = (
                "gpus_per_task"
                if self.resources.get(work, Resources()).gpus is None
                else (f"resources.{work}.gpus")
            )
            gpus = self.needs(work).gpus or 0.0
            if gpus and self.device == "cpu":
                raise ValueError(f"{field} asks for GPUs, but device is cpu")
            if work == "prepare" or self.executor == "inline":
                continue
            if self.device == "cuda" and not gpus:
                raise ValueError(f"device is cuda, but {field} is 0: Ray workers would share GPUs unasked")
            if work == "train" and gpus != int(gpus):
                raise ValueError(f"{field} is {gpus:g}: a training worker needs a whole GPU, or none")
        return self


class Tracking(Group):
    uri: str | None = Field(None, description="MLflow tracking URI; default: sqlite in the storage folder")
    experiment: str = Field("budgetdraft", min_length=1)
    enabled: bool = True
    wait_s: float = Field(
        300, ge=0, description="seconds that the end of a run waits for a store that takes nothing"
    )


class Config(Group):
    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", description="name of the pipeline run")
    seed: int = Field(42, ge=0)
    storage: str = Field("runs", description="folder of all artifacts; absolute, and shared, on a cluster")
    data: Data
    target: AnyModel
    drafter: AnyModel
    labels: Labels = Labels()
    train: Train
    decode: Decode = Decode()
    sweep: Sweep
    report: Report = Report()
    run: Run = Run()
    tracking: Tracking = Tracking()
    registry: Registry | None = Field(None, description="what a finished run registers; default: nothing")

    @model_validator(mode="after")
    def _parts_fit(self) -> Config:
        names = {v.name for v in (*self.train.variants, *self.train.drafters)}
        for where, drafters in (
            ("sweep.drafters", self.sweep.drafters),
            ("sweep.measure.drafters", self.sweep.measure.drafters),
        ):
            if set(drafters) - names:
                raise ValueError(
                    f"{where}: {sorted(set(drafters) - names)} are not among train.variants {sorted(names)}"
                )
        needed = self.train.min_prefix_tokens + self.train.windows * self.train.window_tokens
        if self.data.sequence_tokens < needed:
            raise ValueError(
                f"data.sequence_tokens ({self.data.sequence_tokens}) is less than train.min_prefix_tokens + "
                f"windows × window_tokens ({needed})"
            )
        share = self.train.micro_batch_sequences * self.train.num_workers
        for name, model in (("target", self.target), ("drafter", self.drafter)):
            if isinstance(model, ScratchModel) and model.pretrain.batch_sequences % share:
                raise ValueError(
                    f"{name}.pretrain.batch_sequences ({model.pretrain.batch_sequences}) must be a multiple "
                    "of "
                    f"train.micro_batch_sequences × train.num_workers ({share})"
                )
            if isinstance(model, ScratchModel):
                piece = model.pretrain.sequence_tokens
                if piece is not None and piece > self.data.sequence_tokens:
                    raise ValueError(
                        f"{name}.pretrain.sequence_tokens ({piece}) is more than data.sequence_tokens "
                        f"({self.data.sequence_tokens})"
                    )
        contexts = {context.name for context in self.data.contexts}
        tested = {source.name for source in self.data.sources if "test" in source.use}
        if set(self.sweep.max_gammas) - contexts:
            raise ValueError(
                f"sweep.max_gammas: {sorted(set(self.sweep.max_gammas) - contexts)} are not among "
                f"data.contexts {sorted(contexts)}"
            )
        plane, swept = self.sweep.measure.plane, self.sweep.drafters
        if plane and swept and plane.drafter not in swept and family(plane.drafter) not in swept:
            raise ValueError(
                f"sweep.measure.plane: {plane.drafter!r} is not among sweep.drafters {list(swept)}"
            )
        if plane and (
            plane.drafter not in names or plane.dataset not in tested or plane.context not in contexts
        ):
            raise ValueError(
                f"sweep.measure.plane needs a drafter of {sorted(names)}, a dataset of {sorted(tested)} and "
                f"a context of {sorted(contexts)}; it has {plane.drafter!r}, {plane.dataset!r} and "
                f"{plane.context!r}"
            )
        adaptive = self.decode.draft_length == "adaptive"
        if adaptive != any(self.sweep.thresholds):
            raise ValueError(
                "decode.draft_length: adaptive goes with sweep.thresholds above 0, and fixed with [0.0]; now "
                f"it is {self.decode.draft_length} with {list(self.sweep.thresholds)}"
            )
        if self.decode.compile == "cudagraphs" and self.run.device == "cpu":
            raise ValueError("decode.compile is cudagraphs, which needs a GPU, but run.device is cpu")
        if self.registry:
            swept, trained = self.sweep.drafters, [drafter.name for drafter in self.train.drafters]
            evaluated = [name for name in trained if not swept or name in swept or family(name) in swept]
            self.registry.check(evaluated, self.tracking.enabled)
        losses = {loss for v in self.train.variants for loss in (v.full_loss, v.sparse_loss)}
        if losses - {"cross_entropy"} and self.labels.top_k == 0:
            raise ValueError("kl and total_variation losses need labels.top_k > 0")
        scratch = [model.pretrain for model in (self.target, self.drafter) if model.kind == "scratch"]
        if any(one.patience for one in scratch) and self.data.validation_prompts == 0:
            raise ValueError("pretrain.patience needs data.validation_prompts above 0")
        if any(one.compile for one in scratch) and self.run.executor != "inline":
            raise ValueError("pretrain.compile is for run.executor: inline; workers on Ray do not compile")
        if self.data.tokenizer.kind == "target" and self.target.kind == "scratch":
            raise ValueError("a scratch target has no tokenizer: set data.tokenizer.kind: bpe")
        return self
