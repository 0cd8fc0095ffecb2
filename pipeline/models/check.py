"""Whether the models of a config can be run on its texts, as far as the files on this machine tell."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.axes import kept_positions
from pipeline.errors import BadData
from pipeline.models.build import scratch_config
from pipeline.models.heads.begin import default_layers
from pipeline.models.hub import config_folder
from pipeline.models.layers import FAMILY
from pipeline.models.limits import longest_text
from pipeline.models.load import ModelRef, check_model, model_ref, own_positions, read_config
from pipeline.models.support import problem_of
from pipeline.models.weights import check_weights
from pipeline.store.storage import with_home

if TYPE_CHECKING:
    from pipeline.config.models import PretrainedModel, Role
    from pipeline.config.rope import RopeScaling
    from pipeline.config.schema import Config


def check_models(config: Config) -> None:
    """Raise BadData for a model that cannot be run, before any work; reads no weights, asks no hub."""
    for role in config.models:
        check_role(config, role)


def check_role(config: Config, role: Role, weights: bool = True) -> None:
    """The same for the target, or for the drafter as it is in each variant.

    Args:
        weights: also look at the headers of a local folder's weights.
    """
    given, reach = config.models[role], longest_text(config)
    spec = config.target if role == "target" else config.drafter_base
    layers = given.layers if given.kind == "first_layers" else None
    if given.kind == "head" and spec.kind == "pretrained":
        check_head(spec, given.feature_layers)
    if spec.kind == "scratch":
        for name, rope in ropes(config, role):
            scaled = spec.model_copy(update={"rope_scaling": rope}) if rope else spec
            if problem := problem_of(scratch_config(scaled, config.data.tokenizer.vocab_size), reach):
                raise BadData(f"cannot run the {name}: {problem}")
        return
    folder = config_folder(spec.path, spec.revision)
    if folder is None:
        return  # loading will say so, or fetch it
    ref = replace(model_ref(spec, None, role, reach), layers=layers)
    if role == "drafter":
        check_draft_vocabulary(config, ref, folder)
        check_positions(config, ref, folder)
    for name, rope in ropes(config, role):
        check_model(replace(ref, rope_scaling=rope, role=name) if rope else ref, folder)
    if weights and with_home(spec.path).is_dir():  # of the hub, they may not be here yet
        check_weights(ref, folder, read_config(ref, folder))


def check_head(spec: PretrainedModel, layers: tuple[int, ...] | None) -> None:
    """Raises BadData for a target that no head can be made of, or that has not the layers that it reads."""
    folder = config_folder(spec.path, spec.revision)
    if folder is None:
        return
    given = read_config(model_ref(spec, None, "target"), folder).get_text_config(decoder=True)
    rope = getattr(given, "rope_parameters", None)
    if not hasattr(given, "intermediate_size") or not rope or any(isinstance(x, dict) for x in rope.values()):
        raise BadData(
            f"drafter.kind: head is for targets whose layers are alike and turn positions in one way, and "
            f"{spec.path!r} is a {given.model_type}: take another kind"
        )
    last, read = given.num_hidden_layers - 1, layers or default_layers(given.num_hidden_layers)
    if max(read) > last or min(read) < 1:
        raise BadData(
            f"drafter.feature_layers: {list(read)} are not all among the target's layers, 1 to {last}"
        )


def check_draft_vocabulary(config: Config, ref: ModelRef, folder: Path) -> None:
    size = config.train.draft_vocabulary
    if size is not None and size >= (
        tokens := read_config(ref, folder).get_text_config(decoder=True).vocab_size
    ):
        raise BadData(f"train.draft_vocabulary: {size} must be less than the {tokens} tokens of {ref.path!r}")


def check_positions(config: Config, ref: ModelRef, folder: Path) -> None:
    """Whether kept entries can stand where variants have them.

    Raises:
        BadData: for a variant that moves entries in a model that does not rotate whole keys, or one without
            steps whose model has learned them to stand elsewhere.
    """
    given = read_config(ref, folder)
    kind, learned = given.get_text_config(decoder=True).model_type, kept_positions(given)
    for variant in config.train.variants:
        if learned == "rebased" != variant.positions and not config.train.steps_of(variant):
            raise BadData(
                f"train.variants.{variant.name}.positions: {variant.positions} is not how {ref.path!r} was "
                "trained, and without steps it stays as it is: set positions: rebased"
            )
        if variant.positions != "true" and kind not in FAMILY:
            raise BadData(
                f"train.variants.{variant.name}.positions: {variant.positions} is for {', '.join(FAMILY)}, "
                f"and {ref.path!r} is a {kind}: leave it out"
            )


def beyond_positions(config: Config) -> list[str]:
    """One line for each model that has to read more positions than it is built for, with the fields at fault.

    Left out are models with `rope_scaling` in the config, which is meant for such contexts, drafters made of
    the target, and models that are not on this machine.

    Raises:
        BadData: if neither the config nor a model says for how many positions it was trained.
    """
    data, notes = config.data, []
    asked = {"data.sequence_tokens": data.sequence_tokens} | {
        f"data.contexts.{name}.tokens + data.max_new_tokens": tokens + data.max_new_tokens
        for name, tokens in data.context_tokens.items()
    }
    for role, spec in config.models.items():
        if spec.kind == "scratch":
            reach = spec.max_positions
        elif spec.kind == "pretrained" and (folder := config_folder(spec.path, spec.revision)):
            reach = own_positions(replace(model_ref(spec, None, role), path=str(folder), rope_scaling=None))
        else:
            continue
        beyond = [f"{field} ({tokens:,})" for field, tokens in asked.items() if tokens > reach]
        if beyond and not spec.rope_scaling:
            notes.append(
                f"{role} is built for {reach:,} positions, and {', '.join(beyond)} ask for more: lower them, "
                f"or set {role}.rope_scaling"
            )
    return notes


def ropes(config: Config, role: Role) -> Iterator[tuple[str, RopeScaling | None]]:
    """What a role is called and the rope parameters that replace its own, in each variant."""
    for variant in config.train.variants if role == "drafter" else ():
        field = f" with train.variants.{variant.name}.rope_scaling" if variant.rope_scaling else ""
        yield f"{role}{field}", variant.rope_scaling
    if role == "target":
        yield role, None
