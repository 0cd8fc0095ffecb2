"""The page of the study: Markdown tables from finished runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline import metrics
from pipeline.artifacts import provenance
from pipeline.config import Config, ScratchModel
from pipeline.report.summary import FamilyGain
from pipeline.rows import CellRow, PredictedRow, PromptRow

if TYPE_CHECKING:
    from benchmarks.study import Study

GAMMA, SMALLEST, SAMPLES, SEED = 4, 64, 2000, 42
COMMAND = (
    "python -m benchmarks.study --storage runs --output docs/results/paper-small --grid grid.json "
    "run.executor=inline"
)
CHANGES = {
    "full_only": "L_A only, no sparse branch (Table 3)",
    "lambda_1": "λ = 1 instead of 0.5 (Table 3)",
    "single_budget": "one fixed budget, 256 (Table 3)",
    "one_view": "one budget drawn per step instead of two",
    "four_views": "four budgets drawn per step",
    "with_b_0": "B = 0 among the trained budgets",
    "kl": "forward KL in both branches",
    "total_variation": "total variation in both branches",
    "rope_linear": "linear RoPE scaling by 4, distilled so",
    "on_policy": "a quarter of the labels on the target's own sampled text",
}


def page(studies: Mapping[str, Study], checks: Sequence[Mapping[str, object]]) -> str:
    grid = studies["table-1"]
    sections = [
        introduction(grid.config),
        "## What was to be reached\n\n" + check_table(checks),
        headline_section(grid.summary.families),
        grid_section(grid),
        "## Table 2: sources of drafts, measured\n\n"
        "Decode speed against our own autoregressive decoding, interleaved with it; γ = 4; every source is "
        "lossless, and *exact* counts the prompts that equal it token for token.\n\n"
        + measured_table(studies["table-2"].cells)
        + "\n\n![speed by context](table-2.png)",
        ablation_section(studies),
        "## Figure 3: speed against γ, measured\n\n`multi_view~42` behind B = 64.\n\n"
        + gamma_table(studies["figure-3"].cells)
        + "\n\n![speed by γ](figure-3.png)",
        adaptive_section(studies["adaptive"].cells),
        advice_section(grid),
    ]
    return "\n\n".join(sections) + "\n"


def introduction(config: Config) -> str:
    target, drafter = config.target, config.drafter
    assert isinstance(target, ScratchModel) and isinstance(drafter, ScratchModel)
    made = provenance()
    versions = ", ".join(
        f"{k} {v}" for k, v in made["versions"].items() if v and k in ("torch", "transformers")
    )
    models = (
        f"a target of {target.layers} layers × {target.hidden} that was pretrained here for "
        f"{target.pretrain.steps} steps, and one-layer drafters of width {drafter.hidden}, distilled for "
        f"{config.train.steps} steps each"
    )
    return f"""# The paper's experiments on two CPU cores

Real text (public-domain novels in PG-19's schema, QMSum meetings in LongBench's, stories in NarrativeQA's) and
toy models: {models}.
The data are samples, not the official sets, and no figure here is a PG-19, LongBench or NarrativeQA figure. The
target is a weak language model: of its greedy texts many loop, which is why everything is also given at
temperature 1. What can be learned here is whether and how the method works, not what it is worth on large models.

- Machine: {made["platform"]}, {made["cpus"]} CPUs, no GPU; Python {made["python"]}, {versions}
- Command: `{COMMAND}`. It runs the configs of
  `conf/paper-small/` one after another (`budgetdraft run conf/paper-small/table-1.yaml` and so on) and writes
  this page, its figures and `summary.json` from their reports
- Intervals are 95 % over documents; of differences between families over documents and training seeds
- *Predicted* speeds come from step times and replayed rounds, *measured* ones from the clock; they never share
  a column. At temperature 1 acceptance is an estimate: the expectation over texts that the target sampled"""


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def check_table(checks: Sequence[Mapping[str, object]]) -> str:
    def value(given: object) -> str:
        return "" if given is None else f"{given:.3g}"

    told = {True: "yes", False: "**no**", None: "not measured"}
    return markdown(
        ["what", "value", "target", "met", "note"],
        [
            [c["row"], value(c["value"]), c["target"], told[c["met"]], c["note"]]  # type: ignore[index]
            for c in checks
        ],
    )


def points(gain: Any) -> str:
    return f"{100 * gain.mean:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"


def same(families: Sequence[FamilyGain], gain: FamilyGain, **changes: object) -> FamilyGain | None:
    """The gain of the same cell but for what is changed."""
    names = ("drafter", "baseline", "dataset", "context", "policy", "budget", "control", "gamma",
             "temperature", "seed", "prompts")  # fmt: skip
    wanted = {name: getattr(gain, name) for name in names} | changes
    return next((g for g in families if all(getattr(g, n) == v for n, v in wanted.items())), None)


def headline_section(families: Sequence[FamilyGain]) -> str:
    """`multi_view` − `full_only` behind the smallest budget, over three training seeds."""
    rows = []
    for gain in families:
        wanted = (gain.drafter, gain.baseline, gain.budget, gain.control, gain.prompts, gain.gamma)
        if wanted != ("multi_view", "full_only", SMALLEST, None, "all", GAMMA):
            continue
        varied, other, full = (
            same(families, gain, **changes)
            for changes in ({"prompts": "not_looping"}, {"control": "other_prompt"}, {"budget": "full"})
        )
        share = ""
        if other and gain.low > 0:
            share = f"{100 * min(max(other.mean / gain.mean, 0), 1):.0f} %"
        rows.append(
            [
                gain.dataset,
                gain.context,
                "greedy" if gain.temperature == 0 else f"{gain.temperature:g}",
                points(gain),
                points(varied) if varied else "",
                points(other) if other else "",
                share,
                points(full) if full else "",
                gain.num_documents,
            ]
        )
    head = ["data", "context", "temperature", "B = 64", "without looping texts", "under other_prompt",
            "explained by it", "full cache", "documents"]  # fmt: skip
    return (
        "## Headline: `multi_view` − `full_only`, points of acceptance\n\n"
        f"γ = {GAMMA}, three training seeds, equal steps. *Explained by it*: the share of the gain that is there "
        "when the kept KV are another document's, and so is robustness to the sparse shape rather than use of "
        "the context.\n\n" + markdown(head, rows)
    )


def grid_section(grid: Study) -> str:
    """Per data set, context and budget: acceptance, and the γ with the best predicted speed."""
    replayed = {key(c): c for c in grid.cells if c.mode in ("replay", "estimate") and not c.control}
    measured = {key(c): c for c in grid.cells if c.mode == "measure"}
    rows = []
    for dataset, context, budget in dict.fromkeys(
        (p.dataset, p.context, p.budget) for p in grid.predicted if p.drafter == "multi_view~42"
    ):
        here = [
            p
            for p in grid.predicted
            if (p.drafter, p.dataset, p.context, p.budget) == ("multi_view~42", dataset, context, budget)
        ]
        best = max(here, key=lambda p: p.speedup)
        cell, timed = replayed[key(best)], measured.get(key(best))
        at_four = [
            acceptance(replayed.get((drafter, dataset, context, best.policy, budget, GAMMA, temperature)))
            for drafter in ("full_only~42", "multi_view~42")
            for temperature in (0.0, 1.0)
        ]
        rows.append(
            [dataset, context, budget, *at_four, best.gamma, acceptance(cell), speed(best), speed(timed)]
        )
    head = ["data", "context", "B", "full_only, greedy", "full_only, 1", "multi_view, greedy",
            "multi_view, 1", "best γ", "acceptance there", "predicted speedup", "measured speedup"]  # fmt: skip
    return (
        "## Table 1: the grid\n\nAcceptance in percent at γ = 4 of the drafters with training seed 42, greedy "
        "and at temperature 1; then the γ with the best predicted speed of `multi_view~42`.\n\n"
        + markdown(head, rows)
        + "\n\n![acceptance by budget](table-1.png)"
    )


def key(cell: CellRow | PredictedRow) -> tuple[object, ...]:
    return (
        cell.drafter, cell.dataset, cell.context, cell.policy, cell.budget, cell.gamma, cell.temperature
    )  # fmt: skip


def acceptance(cell: CellRow | None) -> str:
    return "" if cell is None or cell.acceptance is None else f"{100 * cell.acceptance:.1f}"


def speed(cell: CellRow | PredictedRow | None) -> str:
    if cell is None or cell.speedup is None or cell.speedup_low is None or cell.speedup_high is None:
        return ""
    return f"{cell.speedup:.2f} [{cell.speedup_low:.2f}, {cell.speedup_high:.2f}]"


def measured_table(cells: Sequence[CellRow]) -> str:
    head = ["data", "context", "source", "policy", "B", "acceptance", "speedup", "end to end", "AR tokens/s",
            "exact"]  # fmt: skip
    return markdown(
        head,
        [
            [
                c.dataset, c.context, c.drafter, c.policy, c.budget, acceptance(c), speed(c),
                f"{c.end_to_end_speedup or 0:.2f}", f"{c.ar_tokens_per_s or 0:.0f}",
                f"{c.exact_prompts} of {c.num_prompts}",
            ]
            for c in cells
            if c.mode == "measure"
        ],
    )  # fmt: skip


def gamma_table(cells: Sequence[CellRow]) -> str:
    gammas = sorted({c.gamma for c in cells})
    places = dict.fromkeys((c.dataset, c.context) for c in cells)
    found = {(c.dataset, c.context, c.gamma): speed(c) for c in cells}
    return markdown(
        ["data", "context", *(f"γ = {gamma}" for gamma in gammas)],
        [[*place, *(found.get((*place, gamma), "") for gamma in gammas)] for place in places],
    )


def adaptive_section(cells: Sequence[CellRow]) -> str:
    lengths = sorted({(c.gamma, c.threshold) for c in cells})
    places = dict.fromkeys((c.dataset, c.context) for c in cells)
    found = {(c.dataset, c.context, c.gamma, c.threshold): speed(c) for c in cells}
    names = [f"γ = {g}" + (f", stop under {t:g}" if t else "") for g, t in lengths]
    return (
        "## Adaptive draft length, measured\n\n`multi_view~42` behind B = 64: stopping behind a proposal of "
        "which the drafter is less sure than a threshold, against always drafting γ.\n\n"
        + markdown(
            ["data", "context", *names],
            [[*place, *(found.get((*place, *one), "") for one in lengths)] for place in places],
        )
    )


def ablation_section(studies: Mapping[str, Study]) -> str:
    """Every changed drafter minus multi_view of the same seed, per data set, contexts pooled."""
    rows = [row for name in ("table-3", "ablations", "on-policy") for row in studies[name].rows]
    by_drafter: dict[str, dict[tuple[object, ...], PromptRow]] = {}
    for row in rows:
        if row.gamma == GAMMA and not row.control and row.budget in (SMALLEST, "full") and row.num_proposed:
            name = row.drafter.partition("~")[0]
            place = (row.dataset, row.temperature, row.budget, row.prompt_id)
            by_drafter.setdefault(name, {})[place] = row
    base = by_drafter["multi_view"]
    lines = []
    for name, what in CHANGES.items():
        ours = by_drafter.get(name, {})
        for dataset in dict.fromkeys(str(place[0]) for place in base):
            cells = []
            for budget in (SMALLEST, "full"):
                for temperature in (0.0, 1.0):
                    shared = [p for p in base if p in ours and p[:3] == (dataset, temperature, budget)]
                    cells.append(difference([ours[p] for p in shared], [base[p] for p in shared]))
            lines.append([f"`{name}`", what, dataset, *cells])
    head = ["drafter", "what differs", "data", "B = 64, greedy", "B = 64, temperature 1", "full, greedy",
            "full, temperature 1"]  # fmt: skip
    return (
        "## Ablations: each drafter − `multi_view`, points of acceptance\n\nEqual steps, training seed 42, "
        "γ = 4; the three contexts of a data set pooled, paired by prompt, intervals over documents. One seed "
        "each: differences of less than a point or two may be the seed's.\n\n" + markdown(head, lines)
    )


def difference(ours: Sequence[PromptRow], theirs: Sequence[PromptRow]) -> str:
    if not ours:
        return ""
    sides = [
        ([row.num_accepted for row in side], [row.num_proposed or 0 for row in side])
        for side in (ours, theirs)
    ]
    clusters = [row.document_id for row in ours]
    return points(metrics.paired_difference(*sides, samples=SAMPLES, seed=SEED, clusters=clusters))


def advice_section(grid: Study) -> str:
    rows = []
    for advice in grid.summary.recommendations:
        choice, other = advice.choice, advice.runner_up
        again = "" if advice.rechecked is None else f"{advice.rechecked:.2f}"
        fastest = "" if advice.best_rechecked is None else f"{advice.best_rechecked:.2f}"
        what, expected, basis = advice.why, "", ""
        if choice:
            what = f"{choice.drafter}, {choice.policy}, B = {choice.budget}, γ = {choice.gamma}"
            expected, basis = speed_of(choice), choice.basis
        second = (
            f"{other.drafter}, B = {other.budget}, γ = {other.gamma}: {other.speedup:.2f}" if other else ""
        )
        rows.append([advice.dataset, advice.context, what, expected, basis, again, fastest, second])
    head = ["data", "context", "deploy", "expected speedup", "basis", "measured again",
            "fastest measured, again", "runner-up"]  # fmt: skip
    return "## What to deploy\n\n" + markdown(head, rows)


def speed_of(choice: Any) -> str:
    return f"{choice.speedup:.2f} [{choice.speedup_low:.2f}, {choice.speedup_high:.2f}]"
