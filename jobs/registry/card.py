"""What the registry says of a drafter: tags to search and compare by, and the card for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jinja2

from pipeline.axes import budget_order
from pipeline.gate.evidence import Evidence, Results, manifest, sound_files
from pipeline.markdown import table
from pipeline.results.pool import MODES
from pipeline.store.files import read_rows
from pipeline.store.layout import CELLS, MODEL
from pipeline.store.rows import CellRow

TITLE = "# BudgetDraft drafter"
HIDDEN = "other_prompt"


class Accepted(NamedTuple):
    """A cell with its real prefix, and the same cell with another document's KV if that was evaluated."""

    real: CellRow
    other: CellRow | None


def accepted(results: Results) -> list[Accepted]:
    """The drafter's acceptance in every place, policy and budget, at the γ that its report leads with.

    Replayed or estimated where there is such a cell, else measured; at the first seed of sampling.

    Raises:
        BadData: if the report's files are damaged.
    """
    sound_files(results.report, CELLS)
    gamma = manifest(results.report)["inputs"]["axes"]["gamma"]
    rows = [
        row for row in read_rows(results.report.path / CELLS, CellRow)
        if row.cell.drafter == results.name and row.cell.gamma == gamma and row.acceptance is not None
        and not row.cell.threshold and not row.cell.lossy
    ]  # fmt: skip
    seeds = {
        row.cell.temperature: min(r.cell.seed for r in rows if r.cell.temperature == row.cell.temperature)
        for row in rows
    }
    cells: dict[tuple[object, ...], CellRow] = {}
    for mode in MODES:
        cells |= {
            (*place(row), row.cell.control): row for row in rows if row.mode == mode
            and row.cell.seed == seeds[row.cell.temperature]
        }  # fmt: skip
    real = [row for row in cells.values() if row.cell.control is None]
    real.sort(
        key=lambda row: (
            row.cell.temperature,
            row.cell.dataset,
            row.cell.context,
            row.cell.policy,
            budget_order(row.cell.budget),
        )
    )
    return [Accepted(row, cells.get((*place(row), HIDDEN))) for row in real]


def place(row: CellRow) -> tuple[object, ...]:
    return row.cell.dataset, row.cell.context, row.cell.policy, row.cell.budget, row.cell.temperature


def leading(cells: Sequence[Accepted], policy: str) -> list[CellRow]:
    """One cell for each data set, context and budget: greedy if any is, with the policy of training if it was
    evaluated."""
    rows = [cell.real for cell in cells]
    rows = [row for row in rows if row.cell.temperature == min(r.cell.temperature for r in rows)]
    policies = {row.cell.policy for row in rows}
    return [row for row in rows if row.cell.policy == (policy if policy in policies else min(policies))]


def tags(results: Results, evidence: Evidence, cells: Sequence[Accepted]) -> dict[str, str]:
    """Tags of a version; `acceptance.DATASET.CONTEXT.BUDGET` are shares."""
    known = manifest(results.drafter)
    rows = leading(cells, known["inputs"]["variant"]["policy"])
    version_tags = {
        "drafter": results.name,
        "config": evidence.config,
        "budgets": ", ".join(map(str, evidence.budgets)) or "untrained",
        "target": evidence.target,
        "prompts": evidence.prompts,
        "data": results.prepare.fingerprint,
        "hardware": evidence.hardware or "nothing was timed",
        "git_commit": commit(results),
    }
    if rows:
        version_tags["acceptance_at"] = f"{rows[0].cell.policy}, γ = {rows[0].cell.gamma}, {chance(rows[0])}"
    return version_tags | {
        f"acceptance.{row.cell.dataset}.{row.cell.context}.{row.cell.budget}": f"{row.acceptance.mean:.4f}"
        for row in rows
        if row.acceptance
    }


def commit(results: Results) -> str:
    """The commit of the code that trained the drafter, marked if the code had uncommitted changes."""
    code = manifest(results.drafter)["provenance"]
    return f"{code['git_sha'] or 'unknown'}{'+dirty' if code['git_dirty'] else ''}"


def chance(row: CellRow) -> str:
    return f"temperature {row.cell.temperature:g}" if row.cell.temperature else "greedy"


def share(row: CellRow) -> str:
    accepted = row.acceptance
    assert accepted is not None, f"{row.cell} has no acceptance"
    return f"{100 * accepted.mean:.1f} [{100 * accepted.low:.1f}, {100 * accepted.high:.1f}]"


def acceptance_table(cells: Sequence[Accepted]) -> str:
    head = (
        "data set", "context", "policy", "decoding", "budget", "acceptance", "other document's KV",
        "documents",
    )  # fmt: skip
    rows = [
        (
            *row.cell.place, row.cell.policy, chance(row), row.cell.budget, share(row),
            "not evaluated" if other is None else share(other), row.num_documents,
        )
        for row, other in cells
    ]  # fmt: skip
    return table(head, rows)


def model_card(results: Results, evidence: Evidence, cells: Sequence[Accepted]) -> str:
    """The card that training wrote, with the results of evaluation: Markdown behind YAML front matter.

    Raises:
        BadData: if the drafter's files are damaged.
    """
    sound_files(results.drafter, "model/README.md")
    looping = max((cell.real.num_looping / cell.real.num_prompts for cell in cells), default=0.0)
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("jobs.registry", "."),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    ).get_template("card.md.j2")
    return template.render(
        trained=(results.drafter.path / MODEL / "README.md").read_text(encoding="utf-8").rstrip(),
        gamma=manifest(results.report)["inputs"]["axes"]["gamma"],
        contexts=", ".join(f"{name} = {tokens} tokens" for name, tokens in results.summary.contexts.items()),
        max_new_tokens=results.summary.max_new_tokens,
        acceptance=acceptance_table(cells),
        policy=manifest(results.drafter)["inputs"]["variant"]["policy"],
        budget=next((budget for budget in evidence.budgets if budget not in (0, "full")), '"full"'),
        looping=f"{100 * looping:.0f}",
        positions=outside_text([cell.real for cell in cells if not cell.real.in_trained_range]),
        commit=commit(results),
        evidence=evidence,
        drafter=results.drafter.fingerprint,
        report=results.report.fingerprint,
        prepare=results.prepare.fingerprint,
        hardware=evidence.hardware or "nothing was timed",
    )


def outside_text(outside: Sequence[CellRow]) -> str:
    if not outside:
        return "All evaluated positions lie within those that it was trained on."
    places = sorted({f"{row.cell.dataset} at {row.cell.context}" for row in outside})
    return f"Beyond the positions that it was trained on: {', '.join(places)}."


def shortened(card: str, most: int) -> str:
    """A card's body in at most `most` characters, cut at a line."""
    body = card[card.index(TITLE) :]
    if len(body) <= most:
        return body
    rest = "\n\nThe rest is in README.md among the artifacts.\n"
    return body[: body.rindex("\n", 0, most - len(rest))] + rest
