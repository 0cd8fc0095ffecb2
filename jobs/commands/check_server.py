"""`budgetdraft check-server`: the evaluation prompts of a finished run, sent to a server that speculates.

Writes check.json, check.md and check.png. The prompts go to the given addresses and nowhere else.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from matplotlib.figure import Figure

from pipeline.axes import FULL, View
from pipeline.errors import BadData
from pipeline.gate.evidence import Results, beside, manifest, sound_files
from pipeline.intervals import Interval
from pipeline.kv.views import view_of
from pipeline.markdown import table
from pipeline.observe.progress import progress
from pipeline.serving.client import Server
from pipeline.serving.judged import (
    ServerCheck,
    by_position,
    comparable,
    difference_of,
    judge,
    share,
    speeds,
)
from pipeline.serving.served import Promise, ServedPrompt, ask
from pipeline.store.files import atomic_path, read_rows, write_json, write_text
from pipeline.store.layout import CONTINUATIONS, PROMPTS
from pipeline.store.rows import Continuation, Prompt, PromptRow

JSON, MARKDOWN, FIGURE = "check.json", "check.md", "check.png"

log = logging.getLogger(__name__)


def check_server(
    server: Server,
    plain: Server | None,
    results: Results,
    view: View,
    gamma: int,
    prompts: int,
    margin: float,
    output: Path,
) -> ServerCheck:
    """Ask, compare, and write the three files into `output`.

    Args:
        plain: a server of the same target without speculation, asked in turn with the other.
        view, gamma: the cell whose replayed rows are the promise.
        prompts: of each data set and context, the first so many.
        margin: how much less acceptance than promised is tolerated, as a share.

    Raises:
        BadData: if the run has no such cell.
    """
    promises = promises_of(results, view, gamma, prompts)
    log.info("check-server: %d prompts, one after the other, to %s", len(promises), server.url)
    told = []
    with progress(len(promises), "ask") as bar:
        for promise in promises:
            told.append(ask(promise, server, plain))
            bar.update()
    verdict, reasons = judge(told, gamma, margin, results.summary.least_documents)
    counted = comparable(told)

    def promised(prompt: ServedPrompt) -> tuple[float, float]:
        return sum(prompt.replayed_at), gamma * prompt.replayed_rounds

    with_it, without, ratio = speeds(told)
    check = ServerCheck(
        verdict=verdict,
        reasons=reasons,
        url=server.url,
        plain_url=plain.url if plain else None,
        model=server.model,
        drafter=results.name,
        view=view_text(view),
        gamma=gamma,
        margin=margin,
        served=share(counted, lambda p: (sum(p.accepted_at), gamma * p.rounds)) if counted else None,
        replayed=share(counted, promised) if counted else None,
        difference=difference_of(counted, gamma) if counted else None,
        by_position=by_position(counted, gamma),
        tokens_per_s=with_it,
        plain_tokens_per_s=without,
        speedup=ratio,
        prompts=told,
    )
    output.mkdir(parents=True, exist_ok=True)
    if check.by_position:
        draw(check, output / FIGURE)
    else:
        (output / FIGURE).unlink(missing_ok=True)
    write_text(output / MARKDOWN, markdown(check))
    write_json(output / JSON, check.model_dump(mode="json"))
    return check


def served_view(window: int | None, sinks: int) -> View:
    """What a server's drafter sees: the whole cache, or a window."""
    return FULL if window is None else view_of("window", window, sinks)


def view_text(view: View) -> str:
    return f"{view.name} with {view.sinks} sinks" if view.sinks else view.name


def promises_of(results: Results, view: View, gamma: int, prompts: int) -> list[Promise]:
    """The first prompts of every place that were replayed in this cell, greedily, behind their own context.

    Raises:
        BadData: if there is no such cell; the text names those that there are.
    """
    cells: dict[tuple[View, int], dict[str, PromptRow]] = defaultdict(dict)
    for name in sound_files(results.sweep, "rows/"):
        for row in read_rows(results.sweep.path / name, PromptRow):
            cell = row.cell
            if (cell.drafter, row.mode, cell.control, cell.threshold) == (results.name, "replay", None, 0.0):
                cells[cell.view.kept, cell.gamma][row.prompt_id] = row
    if (view.kept, gamma) not in cells:
        there = ", ".join(sorted(f"{view_text(behind)} at γ = {of}" for behind, of in cells))
        raise BadData(
            f"{results.report.path} has no replay of {results.name} behind {view_text(view)} at γ = {gamma}; "
            f"there are {there or 'none of it'}"
        )
    return list(with_texts(results, cells[view.kept, gamma], prompts))


def with_texts(results: Results, rows: Mapping[str, PromptRow], count: int) -> Iterator[Promise]:
    inputs = manifest(results.sweep)["inputs"]
    teach = beside(results.report, "teach", inputs["teach"])
    sound_files(teach, f"{CONTINUATIONS}/")
    for name in sorted(sound_files(results.prepare, f"{PROMPTS}/test-")):
        if not name.endswith(".jsonl"):
            continue
        texts = {
            text.prompt_id: text
            for text in read_rows(teach.path / CONTINUATIONS / Path(name).name, Continuation)
        }
        found = [p for p in read_rows(results.prepare.path / name, Prompt) if p.prompt_id in rows]
        for prompt in found[:count]:
            yield Promise(prompt, texts[prompt.prompt_id], rows[prompt.prompt_id])


# ── what is written ───────────────────────────────────────────────────────────────────────────────


def markdown(check: ServerCheck) -> str:
    """The summary for people and for a CI service."""
    head = f"## Server: {check.verdict.replace('_', ' ')}"
    what = f"`{check.drafter}` behind {check.view}, γ = {check.gamma}, served as {check.model} by {check.url}"
    lines = [head, "", what, "", *(f"- {reason}" for reason in check.reasons), ""]
    if check.by_position:
        rows: list[list[object]] = [
            ["all", percent_of(check.served), percent_of(check.replayed)],
            *([p.position, percent_of(p.served), percent_of(p.replayed)] for p in check.by_position),
        ]
        lines += [
            "Acceptances in percent of γ × rounds; at a position, of rounds:",
            "",
            table(["position", "served", "replayed"], rows),
            "",
        ]
    if check.tokens_per_s:
        plain = f", without speculation {check.plain_tokens_per_s:.1f}" if check.plain_tokens_per_s else ""
        ratio = check.speedup
        faster = f": {ratio.mean:.2f} times as fast [{ratio.low:.2f}, {ratio.high:.2f}]" if ratio else ""
        lines.append(f"Behind the first token {check.tokens_per_s:.1f} tokens/s{plain}{faster}.")
    return "\n".join(lines) + "\n"


def percent_of(interval: Interval | None) -> str:
    """In percent, with its interval."""
    if interval is None:
        return ""
    return f"{100 * interval.mean:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def draw(check: ServerCheck, file: Path) -> None:
    """Acceptances at each position, served beside replayed."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    panel = figure.add_subplot()
    for shift, name in ((-0.1, "served"), (0.1, "replayed")):
        values: list[Interval] = [getattr(position, name) for position in check.by_position]
        spread = [[v.mean - v.low for v in values], [v.high - v.mean for v in values]]
        at = [position.position + shift for position in check.by_position]
        panel.errorbar(at, [v.mean for v in values], yerr=spread, fmt="o", capsize=3, label=name)
    panel.set(xlabel="draft position", ylabel="acceptances ÷ rounds", ylim=(0, 1))
    panel.set_xticks([position.position for position in check.by_position])
    panel.legend()
    with atomic_path(file) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
