"""`budgetdraft gate`: a candidate against a baseline, by statistics; writes gate.json, gate.md, gate.png."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from jobs.registry import champion as registry_champion
from jobs.registry import versions
from jobs.registry.decision import Decision, Side, markdown, title
from pipeline.config.gate import GateConfig
from pipeline.errors import BadData, ConfigError
from pipeline.gate.bounds import Verdict
from pipeline.gate.evidence import Evidence, open_results, read_evidence, weights_of
from pipeline.gate.verdict import Comparison, compare
from pipeline.store.files import write_json, write_text

JSON, MARKDOWN, FIGURE = "gate.json", "gate.md", "gate.png"


EXIT_CODES: dict[Verdict, int] = {"pass": 0, "fail": 5, "not_enough_evidence": 6}


@dataclass(frozen=True)
class Found:
    """What a reference stands for."""

    reference: str
    version: versions.Version | None
    evidence: Evidence

    @property
    def side(self) -> Side:
        known = self.evidence.model_dump(include={"drafter", "config", "hardware", "budgets"})
        number = self.version.number if self.version else None
        return Side(reference=self.reference, version=number, **known)


def decide(
    candidate: str,
    baseline: str,
    config: GateConfig,
    output: Path,
    tracking_uri: str,
    promote: bool,
    again: bool = False,
) -> Decision:
    """Compare, write the three files into `output`, and with `promote` make a candidate that passes champion.

    Args:
        candidate, baseline: a report folder or its summary.json, RESULTS or RESULTS:DRAFTER; else what
            `versions.resolve` takes. If the baseline is `champion` and there never was one, any candidate
            passes. A baseline that is the candidate itself is not compared.
        promote: takes results as the baseline only if their drafter is the present champion, evaluated anew.
        again: promote also what somebody rolled back from.

    Raises:
        BadData: if a reference stands for nothing, the two were not evaluated alike, or the candidate passes
            and must not be promoted.
        ConfigError: if `promote` is asked for a candidate that no registry holds.
    """
    if promote and is_results(candidate):
        raise ConfigError("--promote is for drafters in the registry: name the candidate by version or run")
    candidate_found = find(candidate, config, tracking_uri)
    baseline_found = find_baseline(baseline, candidate_found, config, tracking_uri, promote)
    version = candidate_found.version
    if baseline_found is None:
        said: Comparison = Comparison("pass", ["There is no champion yet: nothing was compared."], [])
    elif version and baseline_found.version and version.number == baseline_found.version.number:
        role = "champion" if baseline == versions.CHAMPION else "baseline"
        said = Comparison("pass", [f"The candidate is the {role} itself: nothing was compared."], [])
    else:
        said = compare(candidate_found.evidence, baseline_found.evidence, config)
    decision = Decision(
        verdict=said.verdict,
        reasons=said.reasons,
        model=version.model if version else None,
        candidate=candidate_found.side,
        baseline=baseline_found.side if baseline_found else None,
        target=candidate_found.evidence.target,
        prompts=candidate_found.evidence.prompts,
        gate=config,
        cells=said.cells,
    )
    write(decision, output)
    if promote and decision.verdict == "pass" and version:
        registry_champion.promote(version, output / JSON, again)
    return decision


def find(reference: str, config: GateConfig, tracking_uri: str) -> Found:
    if is_results(reference):
        results, drafter = split_results(reference)
        return Found(reference, None, read_evidence(results, drafter))
    version = versions.resolve(tracking_uri, config.model, reference)
    return Found(reference, version, versions.evidence_of(version))


def find_baseline(
    reference: str, candidate: Found, config: GateConfig, tracking_uri: str, promote: bool
) -> Found | None:
    """As `find`; None for the champion of the candidate's model where it never had one."""
    if candidate.version and (promote or reference == versions.CHAMPION):
        champion = registry_champion.champion_of(tracking_uri, candidate.version.model)
        if reference == versions.CHAMPION and champion is None:
            return None
        if is_results(reference):
            check_same_drafter(reference, champion)
            return replace(find(reference, config, tracking_uri), version=champion)
    return find(reference, config, tracking_uri)


def check_same_drafter(reference: str, champion: versions.Version | None) -> None:
    """Raises BadData if the results' drafter has other weights than the champion."""
    weights = weights_of(open_results(*split_results(reference)).drafter)
    if champion is None or weights != versions.weights_of(champion):
        raise BadData(
            f"--promote takes {reference} as the baseline only if its drafter is the champion, evaluated "
            f"anew: its weights are not those of {champion or 'a champion, for there is none'}"
        )


def is_results(reference: str) -> bool:
    """Whether a reference names a folder or file rather than something in the registry, by its text alone."""
    return "/" in reference or reference.startswith(("report-", "summary.json"))


def split_results(reference: str) -> tuple[Path, str | None]:
    """RESULTS or RESULTS:DRAFTER."""
    results, colon, drafter = reference.rpartition(":")
    return (Path(results), drafter) if colon and not Path(reference).exists() else (Path(reference), None)


def write(decision: Decision, output: Path) -> None:
    """All three files; without cells there is nothing to draw."""
    from pipeline.gate.figure import draw  # matplotlib is slow to import

    output.mkdir(parents=True, exist_ok=True)
    if decision.cells:
        draw(decision.cells, title(decision), output / FIGURE)
    else:
        (output / FIGURE).unlink(missing_ok=True)
    write_text(output / MARKDOWN, markdown(decision))
    write_json(output / JSON, decision.model_dump(mode="json"))
