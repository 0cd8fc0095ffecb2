"""README's table of results against the summary of the study that it is drawn from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HEAD = (
    "data", "context", "greedy", "explained", "T = 1 (estimate)", "T = 1, KL (estimate)", "deploy (greedy)",
    "decode speedup", "end to end",
)  # fmt: skip


def in_points(gain: dict[str, Any]) -> str:
    mean, low, high = (100 * gain[name] for name in ("mean", "low", "high"))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def deployed(choice: dict[str, Any] | None) -> tuple[str, str, str]:
    """The cell in words, and its speed on fresh repeats without and with both prefills."""
    if choice is None:
        return "do not speculate", "", ""
    parts = [f"`{choice['drafter']}`"]
    if choice["drafter"] == "self_speculation":
        parts.append(f"`{choice['policy']}`")
    if choice["drafter"] != "prompt_lookup":
        parts.append(f"B = {choice['budget']}")
    parts.append(f"γ = {choice['gamma']}")
    if choice["threshold"]:
        parts.append(f"stopping under {choice['threshold']:g}")
    speed = f"{choice['again']:.2f} [{choice['again_low']:.2f}, {choice['again_high']:.2f}]"
    return ", ".join(parts), speed, f"{choice['end_to_end']:.2f}"


def table(summary: dict[str, Any]) -> str:
    axes = ("drafter", "dataset", "context", "temperature", "control")
    at_64 = {
        tuple(gain[axis] for axis in axes): gain
        for gain in summary["families"]
        if (gain["budget"], gain["gamma"], gain["prompts"]) == (64, 4, "all")
    }
    rows = []
    for place in summary["recommendations"]:
        where = place["dataset"], place["context"]
        greedy, sampled = (at_64["multi_view", *where, temperature, None] for temperature in (0.0, 1.0))
        other = at_64["multi_view", *where, 0.0, "other_prompt"]
        share = f"{100 * other['mean'] / greedy['mean']:.0f} %"
        kl = at_64["kl", *where, 1.0, None]
        gains = (in_points(greedy), share, in_points(sampled), in_points(kl))
        rows.append((where[0].removesuffix("-sample"), where[1], *gains, *deployed(place["choice"])))
    head, *body = (f"| {' | '.join(cells)} |" for cells in (HEAD, *rows))
    return "\n".join([head, "|---" * len(HEAD) + "|", *body])


def test_readme_shows_the_committed_study() -> None:
    summary = json.loads((ROOT / "docs/results/paper-small/summary.json").read_text(encoding="utf-8"))
    expected = table(summary)
    shown = (ROOT / "README.md").read_text(encoding="utf-8")
    assert expected in shown, f"README.md, Results, has another table than summary.json gives:\n{expected}"
