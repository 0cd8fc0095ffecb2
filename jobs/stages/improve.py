"""Stage improve: a trained drafter gets better in rounds of serve, learn, gate.

Each step of a round is an artifact of its own, whose fingerprint covers the drafter that it began with:

    served-<drafter>    training prompts that the current drafter has served, and the log of its rounds
    improved-<drafter>  the candidate: the current drafter, after learning from them
    evidence-<drafter>  a drafter's replayed rows of the validation prompts
    gate-<drafter>      the verdict on candidate against current, gate.json

The candidate becomes the current drafter where the verdict is pass; else the next round goes on without it.
So a run that is stopped goes on at its step, and more rounds go on from the last one. `improve-…` names what
came of every round.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from jobs.executors.base import Executor
from jobs.registry.decision import Decision, Side
from jobs.registry.gate import JSON, write
from jobs.stages.sweep import positions, ref
from jobs.stages.sweep_phases import Phases
from jobs.stages.train import Watch, model_identity, run_missing, target_ref
from pipeline.config.improve import Improve
from pipeline.config.schema import Config
from pipeline.errors import BadData, Incomplete
from pipeline.gate.evidence import Evidence, prompts_fingerprint, trained_budgets
from pipeline.gate.verdict import compare
from pipeline.serving.rounds import ServeCounts, Server, ServeTask, asked_prompts
from pipeline.store.artifacts import Artifact, open_artifact
from pipeline.store.files import fingerprint, read_all, write_rows
from pipeline.store.layout import FAILED, IMPROVE, LABELS, ROWS, SERVED_ROUNDS, TOKENIZER
from pipeline.store.rows import ImprovedRound, PromptRow
from pipeline.sweep.grid import draft_sources
from pipeline.train.job import TrainJob

log = logging.getLogger(__name__)


def improve(
    config: Config,
    executor: Executor,
    prepare: Artifact,
    teach: Artifact,
    scratch: dict[str, Artifact],
    trained: dict[str, Artifact],
    watch: Watch,
) -> Path:
    """Run all rounds; returns the folder of the drafter that stands after the last one."""
    assert config.improve is not None
    spec = config.improve
    name = spec.drafter or config.train.drafters[-1].name
    steps = Steps(config, spec, name, executor, prepare, teach, scratch, watch)
    current = trained[name]
    told: list[ImprovedRound] = []
    gates: list[str] = []
    for number in range(spec.rounds):
        served = steps.serve(current, number)
        candidate = steps.learn(current, served)
        gate, decision = steps.gate(candidate, current)
        stands = candidate if decision.verdict == "pass" else current
        counts = ServeCounts(**{key: served.manifest["counts"][key] for key in asdict(ServeCounts())})
        told.append(
            ImprovedRound(
                number=number,
                current=current.path.name,
                texts=counts.texts,
                decoding_rounds=counts.rounds,
                proposed=counts.proposed,
                accepted=counts.accepted,
                candidate=candidate.path.name,
                verdict=decision.verdict,
                stands=stands.path.name,
            )
        )
        log.info(
            "improve: round %d of %d: %.1f %% of %d proposals accepted; %s: %s stands",
            number + 1,
            spec.rounds,
            100 * counts.accepted / counts.proposed,
            counts.proposed,
            decision.verdict.replace("_", " "),
            stands.path.name,
        )
        gates.append(gate.fingerprint)
        current = stands

    def tell(artifact: Artifact) -> dict[str, Any]:
        write_rows(artifact.path / SERVED_ROUNDS, told)
        return {"rounds": len(told)}

    summary = made(config, IMPROVE, {"drafter": name, "gates": gates}, tell)
    log.info("improve: what came of every round is in %s", summary.path / SERVED_ROUNDS)
    return current.path


def made(
    config: Config,
    stage: str,
    inputs: dict[str, Any],
    make: Callable[[Artifact], dict[str, Any]],
) -> Artifact:
    """The artifact of these inputs, made where it is missing by `make`, which gives its counts."""
    artifact = open_artifact(Path(config.storage), stage, inputs)
    with artifact.claim() as unfinished:
        if unfinished:
            began = time.perf_counter()
            counts = make(artifact)
            artifact.finish(inputs, counts, time.perf_counter() - began)
    return artifact


@dataclass(frozen=True)
class Steps:
    """The steps of a round, each inputs → artifact, for the drafter of this name."""

    config: Config
    spec: Improve
    name: str
    executor: Executor
    prepare: Artifact
    teach: Artifact
    scratch: dict[str, Artifact]
    watch: Watch

    @property
    def target(self) -> Any:
        """How fingerprints identify it."""
        return model_identity(self.config.target, self.scratch.get("target"))

    @property
    def learning(self) -> Config:
        """The config that a candidate is trained by."""
        train, spec = self.config.train, self.spec
        changes = {
            # Sampled paths are no served rounds: the term is for training alone.
            "variants": tuple(
                variant.model_copy(update={"steps": None, "path": None}) for variant in train.variants
            ),
            "steps": spec.steps,
            "learning_rate": spec.learning_rate or train.learning_rate,
            "warmup_steps": spec.warmup_steps,
        }
        return self.config.model_copy(update={"train": train.model_copy(update=changes)})

    @property
    def judging(self) -> Config:
        """The config that drafters are replayed by: greedily, at the γ of the gate."""
        changes = {
            "mode": "replay", "drafters": (), "baselines": (), "rules": ("exact",), "temperatures": (0.0,),
            "thresholds": (0.0,), "gammas": self.spec.gate.gammas, "max_gammas": {},
        }  # fmt: skip
        return self.config.model_copy(update={"sweep": self.config.sweep.model_copy(update=changes)})

    def serve(self, current: Artifact, number: int) -> Artifact:
        """Training prompts, decoded by target and drafter, with the log of every round."""
        config, spec = self.config, self.spec
        variant = config.train.drafter_named(self.name)
        inputs = {
            "prepare": self.prepare.fingerprint,
            "target": self.target,
            "drafter": current.fingerprint,
            "drafter_dtype": config.drafter_dtype,
            "labels": config.labels.model_dump(mode="json", include={"top_k", "temperature"}),
            "views": variant.model_dump(mode="json", include={"policy", "sinks", "budgets", "sparse_weight"}),
            "tokens": config.train.learned_tokens,
            "prompts": spec.prompts,
            "gamma": spec.gamma,
            "seed": config.seed,
            "number": number,
        }

        def make(artifact: Artifact) -> dict[str, Any]:
            asked = asked_prompts(config, variant, self.prepare.path, number, spec.prompts)
            size = config.labels.sequences_per_shard
            tasks = [
                ServeTask(tuple(asked[at : at + size]), shard)
                for shard, at in enumerate(range(0, len(asked), size))
            ]
            target, drafter = target_ref(config, self.scratch), ref(config, current)
            tokenizer = self.prepare.path / TOKENIZER
            factory = partial(Server, config, spec.gamma, target, drafter, tokenizer, artifact.path)
            counts = dict.fromkeys(asdict(ServeCounts()), 0)
            for _, one in self.executor.map_actors(
                factory, tasks, "serve", config.labels.num_workers, "measure"
            ):
                for key, value in asdict(one).items():
                    counts[key] += value
            if not counts["texts"]:
                raise BadData(
                    f"improve: of {len(asked)} training prompts the target ends every text with its first "
                    "token, so that nothing is proposed: give it other prompts"
                )
            size = sum(file.stat().st_size for file in (artifact.path / LABELS).iterdir())
            return {**counts, "bytes": size}

        return made(config, f"served-{self.name}", inputs, make)

    def learn(self, current: Artifact, served: Artifact) -> Artifact:
        """The current drafter, trained on what was served."""
        config, spec = self.learning, self.spec
        inputs = {
            "served": served.fingerprint,
            "start": current.fingerprint,
            "teach": self.teach.fingerprint,  # the validation curve
            "variant": config.train.drafter_named(self.name),
            "train": config.train.model_dump(
                mode="json", exclude={"variants", "num_workers", "deepspeed", "checkpoint_every"}
            ),
            "kl_steps": spec.kl_steps,
            "seed": config.seed,
        }
        artifact = open_artifact(Path(config.storage), f"improved-{self.name}", inputs)
        start = replace(ref(config, current), proposes=False)  # it learns with its whole head
        job = TrainJob(config, {}, self.prepare.path, self.teach.path, start, served=served.path)
        run_missing(self.executor, {self.name: artifact}, {self.name: inputs}, job, self.watch)
        return artifact

    def evidence(self, drafter: Artifact) -> tuple[Artifact, Evidence]:
        """A drafter's replayed rows of the validation prompts.

        Raises:
            Incomplete: if cells failed; the same command tries them again.
        """
        config = self.judging
        inputs = {
            "teach": self.teach.fingerprint,
            "target": self.target,
            "drafter": drafter.fingerprint,
            "drafter_dtype": config.drafter_dtype,
            "sweep": config.sweep.model_dump(
                mode="json",
                include={"policies", "sinks", "budgets", "gammas", "seeds", "controls", "looping_rate"},
            ),
            "kernels": config.run.kernels,
        }

        def make(artifact: Artifact) -> dict[str, Any]:
            source = next(one for one in draft_sources(config) if one.name == self.name)
            reach = positions(config, self.scratch, self.name)
            judged = replace(source, ref=ref(config, drafter), trained_positions=reach)
            target = target_ref(config, self.scratch)
            run = Phases(
                config,
                self.executor,
                self.prepare,
                self.teach,
                None,
                artifact,
                target,
                [judged],
                "validation",
            )
            run.replay()
            if run.failures:
                raise Incomplete(
                    f"{run.failures} failures in replaying {drafter.path.name}; their errors are in "
                    f"{artifact.path / FAILED}; the same command tries them again"
                )
            return {"rows": run.rows}

        artifact = made(config, f"evidence-{self.name}", inputs, make)
        return artifact, Evidence(
            drafter=self.name,
            target=fingerprint(self.target),
            prompts=prompts_fingerprint(self.prepare, "validation"),
            hardware="",
            config=config.name,
            budgets=trained_budgets(drafter.manifest["inputs"]),
            rows=read_all(artifact.path / ROWS, PromptRow),
        )

    def gate(self, candidate: Artifact, current: Artifact) -> tuple[Artifact, Decision]:
        """Whether the candidate may take the place of the current drafter."""
        drafters = (candidate, current)
        (judged, ours), (before, theirs) = (self.evidence(drafter) for drafter in drafters)
        inputs = {"candidate": judged.fingerprint, "baseline": before.fingerprint, "gate": self.spec.gate}

        def make(artifact: Artifact) -> dict[str, Any]:
            said = compare(ours, theirs, self.spec.gate)
            sides = [
                Side(
                    reference=drafter.path.name,
                    version=None,
                    **evidence.model_dump(include={"drafter", "config", "hardware", "budgets"}),
                )
                for drafter, evidence in zip(drafters, (ours, theirs), strict=True)
            ]
            decision = Decision(
                verdict=said.verdict,
                reasons=said.reasons,
                model=None,
                candidate=sides[0],
                baseline=sides[1],
                target=ours.target,
                prompts=ours.prompts,
                gate=self.spec.gate,
                cells=said.cells,
            )
            write(decision, artifact.path)
            return {"cells": len(said.cells)}

        artifact = made(self.config, f"gate-{self.name}", inputs, make)
        text = (artifact.path / JSON).read_text(encoding="utf-8")
        return artifact, Decision.model_validate_json(text)
