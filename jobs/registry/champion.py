"""The champion of a registered model: which version it is, which were before, and how that changes.

MLflow's alias says which version it is. A tag of the model lists the champions that led to it, the present
one last. Where the two differ, the alias is right: `promote` moves the alias first, `rollback` shortens the
list first. So a promotion that is cut off in between counts as done, and a rollback as not begun.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from jobs.registry.versions import CHAMPION, Version, aliases_of, only_model, registry, resolve
from pipeline.errors import BadData, Incomplete

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHAMPIONS = "champions"  # tag of a model: numbers in order, without those that were rolled back from
ROLLED_BACK, GATE, NOBODY = "rolled_back", "gate", "nobody"


def champion_of(uri: str, model: str | None = None) -> Version | None:
    """The present champion of a model (None: the only one); None if there never was one.

    Raises:
        BadData: if there was one and is none now.
        Incomplete: if MLflow is out of reach.
    """
    with registry(uri) as client:
        model = model or only_model(client)
        if present_champion(client, model)[0] is None:
            return None
    return resolve(uri, model, CHAMPION)


def champions(client: MlflowClient, model: str) -> tuple[int | None, list[int]]:
    """The present champion, and all champions in order, it last. Raises BadData if there is no such model."""
    champion = aliases_of(client, model).get(CHAMPION)
    listed = client.get_registered_model(model).tags.get(CHAMPIONS, "")
    known = [int(number) for number in listed.split(",") if number]
    # A promotion was cut off before it wrote the list, or a person has moved the alias in MLflow's pages.
    if champion is not None and known[-1:] != [champion]:
        known.append(champion)
    return champion, known


def present_champion(client: MlflowClient, model: str) -> tuple[int | None, list[int]]:
    """As `champions`; raises BadData if the champion was lost: else any candidate would pass unopposed."""
    champion, known = champions(client, model)
    if champion is None and known:
        raise BadData(
            f"{model} has no champion any more: version {known[-1]} or its alias was deleted. `budgetdraft "
            "rollback` makes the latest champion that is left champion again"
        )
    return champion, known


def promote(version: Version, gate: Path, again: bool = False) -> int | None:
    """Make a version the champion; returns the previous champion's number, its own if it was champion.

    Args:
        gate: the gate's `gate.json`, which must say that this version passes against the present champion,
            or that there never was one. It is kept among the artifacts of the version's run.
        again: also a version that somebody rolled back from.

    Raises:
        BadData: if the gate does not say so, the champion was lost, or the version was rolled back from.
        Incomplete: if MLflow is out of reach.
    """
    try:
        decision = json.loads(gate.read_text(encoding="utf-8"))
        verdict, asked = decision["verdict"], decision["gate"]
        model, candidate = decision["model"], decision["candidate"]["version"]
        # Without a champion the baseline is None; results outside the registry have no version.
        baseline = (
            None if decision["baseline"] is None else decision["baseline"]["version"] or "of no registry"
        )
        said = (
            f"{verdict} against {baseline or NOBODY}; margins: acceptance {asked['margins']['acceptance']}, "
            f"speed {asked['margins']['speed']}; error rate {asked['error_rate']}"
        )
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise BadData(f"{gate} is no gate.json of `budgetdraft gate` ({error!r})") from None
    if verdict != "pass":
        raise BadData(f"{gate} says {verdict!r}: only what passes the gate is promoted")
    if (model, candidate) != (version.model, version.number):
        raise BadData(f"{gate} is about {model} version {candidate}, not about {version}")
    number = str(version.number)
    with registry(version.uri) as client:
        champion, known = present_champion(client, version.model)
        if champion == version.number:
            # Do what a promotion that was cut off has left undone.
            write_champions(client, version.model, known)
            client.delete_model_version_tag(version.model, number, ROLLED_BACK)
            return champion
        if baseline != champion:
            raise BadData(
                f"{gate} compares with version {baseline or 'none'}, but the champion of {version.model} is "
                f"{champion or 'none'}: run the gate again"
            )
        if not again and ROLLED_BACK in client.get_model_version(version.model, number).tags:
            raise BadData(
                f"{version} passes, but somebody rolled back from it: --again promotes it all the same"
            )
        with TemporaryDirectory() as temporary:
            named = Path(shutil.copy(gate, Path(temporary) / f"gate-against-{baseline or NOBODY}.json"))
            client.log_artifact(version.run_id, str(named), GATE)
        move_champion(client, version.model, champion, version.number)
        write_champions(client, version.model, [*known, version.number])
        client.set_model_version_tag(version.model, number, GATE, said)
    return champion


def rollback(uri: str, model: str | None = None, to: int | None = None) -> tuple[int | None, int]:
    """Make an earlier champion the champion again; returns both numbers, old (None: it was lost) and new.

    Args:
        to: which one; nothing is done if it is the champion. Default: the latest before the present one.
            Versions that were deleted are passed over.

    Raises:
        BadData: if there is none before it.
        Incomplete: if MLflow is out of reach; the text has the command that completes this rollback.
    """
    with registry(uri) as client:
        model = model or only_model(client)
        champion, known = champions(client, model)
        if to is not None and to == champion:
            return champion, to
        left = {int(version.version) for version in client.search_model_versions(f"name = '{model}'")}
        at = next(
            (
                index for index, number in reversed(list(enumerate(known)))
                if number in left and number != champion and to in (None, number)
            ),
            None,
        )  # fmt: skip
        if at is None:
            wanted = "before" if to is None else to
            raise BadData(
                f"{model} has no champion {wanted} to go back to: its champions were, in order, "
                f"{known or 'none'}, and versions {sorted(left) or 'none'} are left. Without its tag "
                f"{CHAMPIONS!r} the model is as if it never had one"
            )
    number = known[at]
    try:
        with registry(uri) as client:
            for undone in left.intersection(known[at + 1 :]) - {number}:
                client.set_model_version_tag(model, str(undone), ROLLED_BACK, f"to version {number}")
            write_champions(client, model, known[: at + 1])
            move_champion(client, model, champion, number)
    except Incomplete as error:
        raise Incomplete(
            f"{error}. `budgetdraft rollback --to {number}` goes to version {number}, whether or not this did"
        ) from None
    return champion, number


def write_champions(client: MlflowClient, model: str, known: Sequence[int]) -> None:
    client.set_registered_model_tag(model, CHAMPIONS, ",".join(map(str, known)))


def move_champion(client: MlflowClient, model: str, expected: int | None, number: int) -> None:
    """Set the alias. MLflow cannot compare and set, so its present version is checked right before."""
    champion = aliases_of(client, model).get(CHAMPION)
    if champion != expected:
        raise Incomplete(
            f"the champion of {model} became version {champion} meanwhile: look at it, then try again"
        )
    client.set_registered_model_alias(model, CHAMPION, str(number))
    client.delete_model_version_tag(model, str(number), ROLLED_BACK)
