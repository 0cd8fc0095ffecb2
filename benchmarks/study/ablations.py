"""What each change to multi_view is worth, in a table and in words, and what distilling is worth at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

from benchmarks.page_parts import percent, points
from benchmarks.study.families import SMALLEST, Change, Column, Families, accepted, change, datasets_of
from pipeline.config.schema import Config
from pipeline.markdown import table

CHANGES = {
    "untrained": "not distilled at all",
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
HOW = (0.0, "greedily"), (1.0, "at temperature 1")
SHORT = {0.0: "greedy", 1.0: "T = 1"}
OTHER = "under other_prompt"

Ablation = tuple[str, str, dict[str, Change]]  # variant, data set, column → change where it has prompts

COLUMNS = {
    f"B = {SMALLEST}, greedy": Column(SMALLEST, 0.0),
    "without looping texts": Column(SMALLEST, 0.0, without_looping=True),
    OTHER: Column(SMALLEST, 0.0, "other_prompt"),
    f"B = {SMALLEST}, T = 1": Column(SMALLEST, 1.0),
    "T = 1 under other_prompt": Column(SMALLEST, 1.0, "other_prompt"),
    "full, greedy": Column("full", 0.0),
    "full, T = 1": Column("full", 1.0),
}


def ablation_rows(cells: Families) -> list[Ablation]:
    rows = []
    for name, dataset in product(CHANGES, datasets_of(cells)):
        differences = {head: change(cells, name, dataset, column) for head, column in COLUMNS.items()}
        known = {head: difference for head, difference in differences.items() if difference}
        rows.append((name, dataset, known))
    return rows


def ablation_table(rows: Sequence[Ablation]) -> str:
    return table(
        ["drafter", "what differs", "data", *COLUMNS],
        [
            [
                f"`{name}`",
                CHANGES[name],
                data,
                *(points(cells[h].value) if h in cells else "" for h in COLUMNS),
            ]
            for name, data, cells in rows
        ],
    )


def ablation_words(rows: Sequence[Ablation]) -> str:
    """Plainly, which changes help and which do not, behind the smallest budget."""
    heads = [next(h for h, c in COLUMNS.items() if c == Column(SMALLEST, t)) for t, _ in HOW]
    lines = []
    for name in dict.fromkeys(name for name, _, _ in rows):
        by_data = {dataset: cells for other, dataset, cells in rows if other == name}
        parts = []
        for head, (temperature, how) in zip(heads, HOW, strict=True):
            differences = {dataset: cells[head] for dataset, cells in by_data.items()}
            spread = max(difference.spread for difference in differences.values())
            several = any(len(difference.by_seed) > 1 for difference in differences.values())
            seeds = f"seeds up to {100 * spread:.1f} apart" if several else "one seed"
            shared = "" if temperature else share_without_context(by_data, differences)
            parts.append(f"{verdict(differences)} {how} ({span(differences)} points, {seeds}{shared})")
        lines.append(f"- `{name}`, {CHANGES[name]}: {parts[0]}; {parts[1]}")
    return "\n".join(lines)


def share_without_context(
    by_data: Mapping[str, Mapping[str, Change]], differences: Mapping[str, Change]
) -> str:
    """The share of a greedy change that is there with another document's KV too, if it helps or hurts."""
    if verdict(differences) not in ("helps", "hurts"):
        return ""
    shares = [
        100 * by_data[data][OTHER].value.mean / difference.value.mean
        for data, difference in differences.items()
        if difference.sign
    ]
    return f", {min(shares):.0f} to {max(shares):.0f} % of it {OTHER}"


def span(differences: Mapping[str, Change]) -> str:
    means = [difference.value.mean for difference in differences.values()]
    return f"{100 * min(means):+.1f} to {100 * max(means):+.1f}"


def seed_spread(rows: Sequence[Ablation]) -> float:
    """The largest spread among the seeds of one change behind the smallest budget."""
    shown = Column(SMALLEST, 0.0), Column(SMALLEST, 1.0)
    heads = [head for head, column in COLUMNS.items() if column in shown]
    return max(cells[head].spread for _, _, cells in rows for head in heads)


def verdict(differences: Mapping[str, Change]) -> str:
    """From the data sets where the change is clear; all share the drafters, and so the luck of the seeds."""
    up, down = (
        [dataset for dataset, difference in differences.items() if difference.sign == sign]
        for sign in (1, -1)
    )
    if len(up) >= 2 and not down:
        return "helps"
    if len(down) >= 2 and not up:
        return "hurts"
    if not up and not down:
        return "makes no clear difference"
    return "is clear only in " + ", ".join([*(f"{d} (up)" for d in up), *(f"{d} (down)" for d in down)])


def nothing_kept(cells: Families) -> str:
    """The gain from training with B = 0 too, where nothing of the prefix is kept."""
    parts = []
    for temperature, how in HOW:
        column = Column(0, temperature)
        differences = {data: change(cells, "with_b_0", data, column) for data in datasets_of(cells)}
        known = {data: difference for data, difference in differences.items() if difference}
        texts = [f"{points(difference.value)} ({data})" for data, difference in known.items()]
        parts.append(f"{how} {', '.join(texts)}")
    return "; ".join(parts)


# ── against the drafter as it was pretrained ──────────────────────────────────────────────────────


def scaled_only(config: Config) -> dict[str, str]:
    """How RoPE was scaled, by drafter, of those that were scaled but not distilled."""
    return {
        variant.name: f"{variant.rope_scaling['rope_type']}, factor {variant.rope_scaling['factor']:g}"
        for variant in config.train.variants
        if variant.steps == 0 and variant.rope_scaling
    }


def distilled(cells: Families, config: Config) -> list[str]:
    kept = [variant.name for variant in config.train.variants if variant.steps == 0]
    return [name for name in dict.fromkeys(name for name, *_ in cells) if name not in kept]


def accepted_table(cells: Families, config: Config) -> str:
    """Behind the smallest budget: acceptance of every family, and its lead over the untrained drafter."""
    rows = []
    for name, data in product(["untrained", *distilled(cells, config)], datasets_of(cells)):
        columns = [Column(SMALLEST, temperature) for temperature, _ in HOW]
        leads = [change(cells, name, data, column, "untrained") for column in columns]
        rows.append(
            [
                f"`{name}`",
                data,
                *(percent(accepted(cells, name, data, column)) for column in columns),
                *(points(lead.value) if lead and name != "untrained" else "" for lead in leads),
            ]
        )
    short = SHORT.values()
    return table(["drafter", "data", *short, *(f"− `untrained`, {label}" for label in short)], rows)


def distilled_words(cells: Families, config: Config) -> str:
    """Which distilled drafters are accepted more than the one that they were distilled from."""
    lines = []
    for temperature, how in HOW:
        column, by_verdict = Column(SMALLEST, temperature), dict[str, list[str]]()
        for name in distilled(cells, config):
            leads = {data: change(cells, name, data, column, "untrained") for data in datasets_of(cells)}
            known = {data: lead for data, lead in leads.items() if lead}
            says = verdict(known)
            by_verdict.setdefault(says if says in ("helps", "hurts") else "", []).append(
                f"`{name}` ({span(known)})"
            )
        more, less, neither = (", ".join(by_verdict.get(says, ())) for says in ("helps", "hurts", ""))
        beaten = f"accepted more than `untrained`: {more}" if more else (
            "no distillation here beats the drafter as it was pretrained"
        )  # fmt: skip
        rest = (f"accepted less: {less}" if less else "", f"neither clearly: {neither}" if neither else "")
        lines.append(f"- {how.capitalize()}, " + "; ".join(filter(None, (beaten, *rest))))
    return "\n".join(lines)


# ── RoPE beyond the trained range ─────────────────────────────────────────────────────────────────

ROPE_COLUMNS = [Column(budget, temperature) for budget in (SMALLEST, "full") for temperature, _ in HOW]
HEADS = [f"B = {column.budget}, {SHORT[column.temperature]}" for column in ROPE_COLUMNS]


def rope_table(cells: Families, config: Config) -> str:
    """Each drafter with scaled RoPE minus the same without, neither of them distilled, by context."""
    rows = []
    for (name, how), data in product(scaled_only(config).items(), datasets_of(cells)):
        for context in config.data.contexts:
            differences = rope_changes(cells, name, data, context.name)
            texts = [points(difference.value) if difference else "" for difference in differences]
            rows.append([f"`{name}`", how, data, context.name, *texts])
    return table(["drafter", "RoPE", "data", "context", *HEADS], rows)


def rope_changes(cells: Families, name: str, data: str, context: str) -> list[Change | None]:
    columns = [column._replace(context=context) for column in ROPE_COLUMNS]
    return [change(cells, name, data, column, "untrained") for column in columns]


def beyond_range(config: Config) -> list[str]:
    """The contexts that are longer than what the drafter was pretrained on."""
    assert config.drafter.kind == "scratch"
    trained = config.drafter.pretrain.sequence_tokens or config.data.sequence_tokens
    return [context.name for context in config.data.contexts if context.tokens > trained]


def rope_words(cells: Families, config: Config) -> str:
    """In how many data sets and contexts beyond the trained range scaling helps, or hurts."""
    places = list(product(datasets_of(cells), beyond_range(config)))
    lines = []
    for name in scaled_only(config):
        by_place = [rope_changes(cells, name, *place) for place in places]
        parts = []
        for head, differences in zip(HEADS, zip(*by_place, strict=True), strict=True):
            signs = [difference.sign for difference in differences if difference]
            parts.append(f"{head}: {signs.count(1)} / {signs.count(-1)}")
        lines.append(f"- `{name}`, places (of {len(places)}) with clearly more / less: {'; '.join(parts)}")
    return "\n".join(lines)
