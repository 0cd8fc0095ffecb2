"""What the registry says of a drafter: tags to search and compare by, and the card for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pipeline.axes import budget_order
from pipeline.gate.evidence import Evidence, Results, manifest, sound_files
from pipeline.results.pool import MODES
from pipeline.store.files import read_rows
from pipeline.store.layout import CELLS, MODEL
from pipeline.store.rows import CellRow

TITLE = "# BudgetDraft drafter"
HIDDEN = "other_prompt"


class Accepted(NamedTuple):
    """A cell with its real prefix, and the same with another document's KV where that was evaluated."""

    real: CellRow
    other: CellRow | None


def accepted(found: Results) -> list[Accepted]:
    """The drafter's acceptance in every place, policy and budget, at the γ that its report leads with.

    Replayed or estimated where there is such a cell, else measured; at the first seed of sampling.

    Raises:
        BadData: if the report's files are damaged.
    """
    sound_files(found.report, CELLS)
    gamma = manifest(found.report)["inputs"]["axes"]["gamma"]
    rows = [
        row for row in read_rows(found.report.path / CELLS, CellRow)
        if row.cell.drafter == found.name and row.cell.gamma == gamma and row.acceptance is not None
        and not row.cell.threshold
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


def tags(found: Results, evidence: Evidence, cells: Sequence[Accepted]) -> dict[str, str]:
    """Tags of a version; `acceptance.DATASET.CONTEXT.BUDGET` are shares."""
    known = manifest(found.drafter)
    rows = leading(cells, known["inputs"]["variant"]["policy"])
    told = {
        "drafter": found.name,
        "config": evidence.config,
        "budgets": ", ".join(map(str, evidence.budgets)) or "untrained",
        "target": evidence.target,
        "prompts": evidence.prompts,
        "data": found.prepare.fingerprint,
        "hardware": evidence.hardware or "nothing was timed",
        "git_commit": commit(found),
    }
    if rows:
        told["acceptance_at"] = f"{rows[0].cell.policy}, γ = {rows[0].cell.gamma}, {chance(rows[0])}"
    return told | {
        f"acceptance.{row.cell.dataset}.{row.cell.context}.{row.cell.budget}": f"{row.acceptance.mean:.4f}"
        for row in rows
        if row.acceptance
    }


def commit(found: Results) -> str:
    """Of the code that trained the drafter, marked if it was changed."""
    code = manifest(found.drafter)["provenance"]
    return f"{code['git_sha'] or 'unknown'}{'+dirty' if code['git_dirty'] else ''}"


def chance(row: CellRow) -> str:
    return f"temperature {row.cell.temperature:g}" if row.cell.temperature else "greedy"


def share(row: CellRow) -> str:
    found = row.acceptance
    assert found is not None, f"{row.cell} has no acceptance"
    return f"{100 * found.mean:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def table(cells: Sequence[Accepted]) -> list[str]:
    lines = [
        "| data set | context | policy | decoding | budget | acceptance | other document's KV | documents |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row, other in cells:
        hidden = "not evaluated" if other is None else share(other)
        cell = row.cell
        lines.append(
            f"| {cell.dataset} | {cell.context} | {cell.policy} | {chance(row)} | {cell.budget} | "
            f"{share(row)} | {hidden} | {row.num_documents} |"
        )
    return lines


def model_card(found: Results, evidence: Evidence, cells: Sequence[Accepted]) -> str:
    """The card that training wrote, with what was found since: Markdown behind YAML front matter.

    Raises:
        BadData: if the drafter's files are damaged.
    """
    sound_files(found.drafter, "model/README.md")
    trained = (found.drafter.path / MODEL / "README.md").read_text(encoding="utf-8").rstrip()
    contexts = ", ".join(f"{name} = {tokens} tokens" for name, tokens in found.summary.contexts.items())
    outside = [cell.real for cell in cells if not cell.real.in_trained_range]
    looping = max((cell.real.num_looping / cell.real.num_prompts for cell in cells), default=0.0)
    gamma = manifest(found.report)["inputs"]["axes"]["gamma"]
    variant = manifest(found.drafter)["inputs"]["variant"]
    served = next((budget for budget in evidence.budgets if budget not in (0, "full")), '"full"')
    lines = [
        trained,
        "",
        "## Acceptance",
        "",
        f"Share of proposed tokens that the target accepted on test prompts, in percent, at γ = {gamma}, "
        f"with 95 % intervals over documents. Contexts: {contexts}; up to {found.summary.max_new_tokens} new "
        "tokens. The column beside it has another document's KV in place of the prompt's: what is the same "
        "in both, the drafter does not owe to its context.",
        "",
        *table(cells),
        "",
        "## Use",
        "",
        "With Hugging Face, whose drafter keeps its whole cache (budget `full` above). `TARGET` is the model "
        "that it was trained for:",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("TARGET")',
        'target = AutoModelForCausalLM.from_pretrained("TARGET")',
        'drafter = AutoModelForCausalLM.from_pretrained("FOLDER")',
        'inputs = tokenizer("A prompt", return_tensors="pt")',
        "tokens = target.generate(**inputs, assistant_model=drafter, max_new_tokens=64)[0]",
        "print(tokenizer.decode(tokens, skip_special_tokens=True))",
        "```",
        "",
        "With BudgetDraft, behind a budget:",
        "",
        "```python",
        "from pipeline.serving import load_pair",
        "",
        'pair = load_pair("TARGET", "FOLDER")',
        f'view = {{"policy": "{variant["policy"]}", "budget": {served}}}',
        f'print(pair.continue_prompts(["A prompt"], **view, gamma={gamma}, max_new_tokens=64)[0])',
        "```",
        "",
        "## Limits",
        "",
        "- Acceptance holds for this target, these kinds of text and these budgets; greedy text is the "
        "target's own whatever the drafter.",
        f"- Up to {100 * looping:.0f} % of the prompts have a continuation that repeats itself, which is "
        "easy to predict.",
        f"- {outside_text(outside)}",
        "- Whether it is faster depends on the machine: measure there.",
        "- No licence is stated. Those of the drafter that it started from, of the target and of the "
        "training data apply; state one before you publish it.",
        "",
        "## Where it comes from",
        "",
        f"- Code: commit {commit(found)}",
        f"- Config: {evidence.config}; drafter artifact {found.drafter.fingerprint}, report "
        f"{found.report.fingerprint}",
        f"- Data: prepared {found.prepare.fingerprint}, test prompts {evidence.prompts}; target with "
        f"tokenizer {evidence.target}",
        f"- Timed on: {evidence.hardware or 'nothing was timed'}",
        "",
    ]
    return "\n".join(lines)


def outside_text(outside: Sequence[CellRow]) -> str:
    if not outside:
        return "All evaluated positions lie within those that it was trained on."
    places = sorted({f"{row.cell.dataset} at {row.cell.context}" for row in outside})
    return f"Beyond the positions that it was trained on: {', '.join(places)}."


def shortened(card: str, most: int) -> str:
    """A card's body in at most so many characters, cut at a line."""
    body = card[card.index(TITLE) :]
    if len(body) <= most:
        return body
    rest = "\n\nThe rest is in README.md among the artifacts.\n"
    return body[: body.rindex("\n", 0, most - len(rest))] + rest
