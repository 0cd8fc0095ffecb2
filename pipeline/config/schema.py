"""The one schema of every config file: typed to the leaf, with unit, range and meaning.

The groups are in the files beside this one that are named after them; here stands what several of them have
to agree on. `files.py` reads YAML, `extends` and overrides, `errors.py` words the errors. Groups are frozen:
a stage is handed its group, never a dict.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from pipeline.axes import CHUNK, family
from pipeline.config.data import Data, TextSource
from pipeline.config.group import Group
from pipeline.config.improve import Improve
from pipeline.config.models import AnyDrafter, AnyModel, FirstLayers, Head, Role, ScratchModel
from pipeline.config.registry import Registry
from pipeline.config.run import Run, Tracking
from pipeline.config.sweep import Decode, Report, Sweep
from pipeline.config.train import READ_TOP_K, Answers, Labels, Train


class Config(Group):
    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", description="name of the pipeline run")
    seed: int = Field(42, ge=0)
    storage: str = Field("runs", description="folder of all artifacts; absolute, and shared, on a cluster")
    data: Data
    target: AnyModel
    drafter: AnyDrafter
    labels: Labels = Labels()
    train: Train
    decode: Decode = Decode()
    sweep: Sweep
    report: Report = Report()
    run: Run = Run()
    tracking: Tracking = Tracking()
    registry: Registry | None = Field(None, description="what a finished run registers; default: nothing")
    improve: Improve | None = Field(
        None,
        exclude_if=lambda improve: improve is None,  # as if it had not been added: records stay
        description="rounds of serve, learn, gate, which `budgetdraft improve` runs",
    )

    @property
    def models(self) -> dict[Role, AnyDrafter]:
        return {"target": self.target, "drafter": self.drafter}

    @property
    def drafter_base(self) -> AnyModel:
        """The model that drafters begin as: the drafter's own, or the target that they are made of."""
        return self.target if isinstance(self.drafter, FirstLayers | Head) else self.drafter

    @property
    def drafter_dtype(self) -> str:
        """The precision that drafters run in at evaluation."""
        return self.drafter.dtype or self.target.dtype

    @property
    def scratch(self) -> dict[Role, ScratchModel]:
        """Those that stage pretrain makes."""
        return {role: spec for role, spec in self.models.items() if isinstance(spec, ScratchModel)}

    def _head_fits(self) -> None:
        """Raises ValueError where fields are for heads alone, or leave a head nothing to learn from."""
        for field, value in (
            ("labels.features", self.labels.features),
            ("train.chain_steps", self.train.chain_steps),
            ("train.chain_decay", self.train.chain_decay),
        ):
            if value is not None and not isinstance(self.drafter, Head):
                raise ValueError(f"{field} is for drafter.kind: head, and it is {self.drafter.kind}")
        if self.sweep.cascade and isinstance(self.drafter, Head):
            raise ValueError(
                "sweep.cascade: a head reads what the target itself has made of the text, so it cannot "
                "draft for a middle model; leave cascade out of sweep.baselines"
            )
        validated = self.train.validation_budgets
        for field, sinks, rolls, budgets in (
            ("sweep.sinks", self.sweep.sinks, "window" in self.sweep.policies, self.sweep.budgets),
            *(
                (f"train.variants.{v.name}.sinks", v.sinks, v.policy == "window", (*v.budgets, *validated))
                for v in self.train.variants
            ),
        ):
            if sinks and not rolls:
                raise ValueError(f"{field} ({sinks}) goes with the policy window")
            if least := [b for b in budgets if rolls and b != "full" and 0 < b <= sinks]:
                raise ValueError(f"{field} ({sinks}) leaves nothing of a window of {least[0]}")
        steps = self.chain_steps
        if isinstance(self.drafter, Head) and self.train.window_tokens <= steps:
            raise ValueError(
                f"train.window_tokens ({self.train.window_tokens}) must be more than train.chain_steps "
                f"({steps}): a chain does not leave its window"
            )
        if isinstance(self.drafter, Head) and any(v.rope_scaling for v in self.train.variants):
            raise ValueError("train.variants.rope_scaling: a head turns positions as its target does")

    def _improve_fits(self, improve: Improve) -> None:
        """Raises ValueError where rounds could not be served, learned from or judged."""
        if isinstance(self.drafter, Head):
            raise ValueError("improve is for drafters of kind lm and first_layers, and drafter.kind is head")
        trained = [drafter.name for drafter in self.train.drafters]
        if improve.drafter is not None and improve.drafter not in trained:
            raise ValueError(f"improve.drafter: {improve.drafter!r} is not among the drafters {trained}")
        if improve.kl_steps and self.labels.top_k == 0:
            raise ValueError("improve.kl_steps above 0 need labels.top_k > 0")
        if self.guide_chunks or self.sweep.refresh:
            raise ValueError(
                "improve serves and judges without what the target says of chunks: it is for variants of "
                "other policies than target_guided, and without sweep.refresh"
            )
        if self.train.learned_tokens < 2:
            raise ValueError("improve serves texts of train.windows × window_tokens: 2 at least")
        least = improve.gate.least_documents
        if self.data.validation_prompts < least:
            raise ValueError(
                f"improve.gate.least_documents ({least}) is more than data.validation_prompts "
                f"({self.data.validation_prompts}), on which rounds are judged: no candidate could pass"
            )

    @property
    def is_guided(self) -> bool:
        """Whether views, of training or of the sweep, are chosen by what the target attends to."""
        swept = (*self.sweep.policies, *([self.sweep.cascade.policy] if self.sweep.cascade else []))
        return "target_guided" in (*swept, *(variant.policy for variant in self.train.variants))

    @property
    def guide_chunks(self) -> int:
        """Chunks that are ranked before each window of training, as many as any budget there holds."""
        guided = [variant for variant in self.train.variants if variant.policy == "target_guided"]
        return max((budget // CHUNK for variant in guided for budget in variant.budgets), default=0)

    @property
    def chain_steps(self) -> int:
        """Depth of the chains that a head is trained on."""
        return self.train.chain_steps or 3

    @model_validator(mode="after")
    def _parts_fit(self) -> Config:
        for variant in self.train.variants:
            served = variant.served_tokens
            if served is not None and served < self.data.sequence_tokens:
                raise ValueError(
                    f"train.variants.{variant.name}.served_tokens ({served}) is less than "
                    f"data.sequence_tokens ({self.data.sequence_tokens}), on which it trains"
                )
            if variant.path is not None and variant.path.length > self.train.window_tokens:
                raise ValueError(
                    f"train.variants.{variant.name}.path.length ({variant.path.length}) is more than "
                    f"train.window_tokens ({self.train.window_tokens}): a path does not leave its window"
                )
        names = {v.name for v in (*self.train.variants, *self.train.drafters)}
        for where, drafters in (
            ("sweep.drafters", self.sweep.drafters),
            ("sweep.measure.drafters", self.sweep.measure.drafters),
        ):
            if set(drafters) - names:
                raise ValueError(
                    f"{where}: {sorted(set(drafters) - names)} are not among train.variants {sorted(names)}"
                )
        trained = [drafter.name for drafter in self.train.drafters]
        if self.sweep.cascade and self.sweep.cascade.drafter not in trained:
            raise ValueError(
                f"sweep.cascade.drafter: {self.sweep.cascade.drafter!r} is not among the drafters {trained}"
            )
        needed = self.train.min_prefix_tokens + self.train.learned_tokens
        if self.data.sequence_tokens < needed:
            raise ValueError(
                f"data.sequence_tokens ({self.data.sequence_tokens}) is less than train.min_prefix_tokens + "
                f"windows × window_tokens ({needed})"
            )
        if self.labels.answers != Answers() and not self.data.asks:
            raise ValueError("labels.answers: no source of data.sources asks anything of its training split")
        if self.labels.server and not self.data.asks and not self.labels.on_policy_fraction:
            raise ValueError(
                "labels.server has nothing to write: no source of data.sources asks anything of its training "
                "split, and labels.on_policy_fraction is 0"
            )
        most = self.data.sequence_tokens - self.train.learned_tokens
        for index, source in enumerate(self.data.sources):
            lengths = source.training_prompts if isinstance(source, TextSource) else {}
            if beyond := [tokens for tokens in lengths if not self.train.min_prefix_tokens <= tokens <= most]:
                raise ValueError(
                    f"data.sources.{index}.training_prompts: {beyond[0]} tokens are not between "
                    f"train.min_prefix_tokens ({self.train.min_prefix_tokens}) and what "
                    f"data.sequence_tokens leaves before the windows ({most})"
                )
        share = self.train.micro_batch_sequences * self.train.num_workers
        for name, model in self.scratch.items():
            if model.pretrain.batch_sequences % share:
                raise ValueError(
                    f"{name}.pretrain.batch_sequences ({model.pretrain.batch_sequences}) must be a multiple "
                    "of "
                    f"train.micro_batch_sequences × train.num_workers ({share})"
                )
            piece = model.pretrain.sequence_tokens
            if piece is not None and piece > self.data.sequence_tokens:
                raise ValueError(
                    f"{name}.pretrain.sequence_tokens ({piece}) is more than data.sequence_tokens "
                    f"({self.data.sequence_tokens})"
                )
        if isinstance(self.drafter, ScratchModel):
            for v in self.train.variants:
                self.drafter.check_rope(f"train.variants.{v.name}.rope_scaling", v.rope_scaling)
        if isinstance(self.drafter, FirstLayers | Head) and isinstance(self.target, ScratchModel):
            field = "layers" if isinstance(self.drafter, FirstLayers) else "feature_layers"
            last = self.target.layers - 1
            layers = list(getattr(self.drafter, field) or ())
            if layers and max(layers) > last:
                raise ValueError(f"drafter.{field}: {layers} goes beyond the target's layers, 0 to {last}")
            if field == "feature_layers" and not layers and last < 4:
                raise ValueError("drafter: a head needs a target of at least 5 layers, or feature_layers")
        self._head_fits()
        if self.improve:
            self._improve_fits(self.improve)
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
            swept = self.sweep.drafters
            evaluated = [name for name in trained if not swept or name in swept or family(name) in swept]
            self.registry.check(evaluated, self.tracking.enabled)
        losses = {loss for v in self.train.variants for loss in (v.full_loss, v.sparse_loss)}
        if losses.intersection(READ_TOP_K) and self.labels.top_k == 0:
            raise ValueError(f"{' and '.join(READ_TOP_K)} losses need labels.top_k > 0")
        size, listed = self.train.draft_vocabulary, self.labels.top_k
        tokens = self.data.tokenizer
        if size is not None and tokens.kind == "bpe" and size >= tokens.vocab_size:
            raise ValueError(
                f"train.draft_vocabulary ({size}) must be less than data.tokenizer.vocab_size "
                f"({tokens.vocab_size})"
            )
        if size is not None and size < 2 * listed:
            raise ValueError(
                f"train.draft_vocabulary ({size}) must be at least twice labels.top_k ({listed})"
            )
        scratch = [model.pretrain for model in (self.target, self.drafter) if model.kind == "scratch"]
        if any(one.patience for one in scratch) and self.data.validation_prompts == 0:
            raise ValueError("pretrain.patience needs data.validation_prompts above 0")
        if any(one.compile for one in scratch) and self.run.executor != "inline":
            raise ValueError("pretrain.compile is for run.executor: inline; workers on Ray do not compile")
        if self.data.tokenizer.kind == "target" and self.target.kind == "scratch":
            raise ValueError("a scratch target has no tokenizer: set data.tokenizer.kind: bpe")
        return self
