"""README's table of results against the summary of the study that it is drawn from."""

from __future__ import annotations

import json
from typing import Any

from tests.helpers.paths import ROOT

HEAD = (
    "data", "context", "greedy", "greedy, 800 steps", "explained", "T = 1 (estimate)",
    "T = 1, KL (estimate)", "deploy (greedy)", "decode speedup", "end to end",
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


def at_64(summary: dict[str, Any]) -> dict[tuple[object, ...], dict[str, Any]]:
    """Gains at B = 64 and γ = 4 over all prompts."""
    axes = ("drafter", "dataset", "context", "temperature", "control")
    return {
        tuple(gain[axis] for axis in axes): gain
        for gain in summary["families"]
        if (gain["budget"], gain["gamma"], gain["prompts"]) == (64, 4, "all")
    }


def table(summary: dict[str, Any], longer: dict[str, Any]) -> str:
    """Of both studies: `longer` is of the target that was pretrained for 800 steps."""
    gains, gains_longer = at_64(summary), at_64(longer)
    rows = []
    for place in summary["recommendations"]:
        where = place["dataset"], place["context"]
        greedy, sampled = (gains["multi_view", *where, temperature, None] for temperature in (0.0, 1.0))
        trained = gains_longer["multi_view", *where, 0.0, None]
        other = gains_longer["multi_view", *where, 0.0, "other_prompt"]
        assert trained["low"] > 0, "no gain, so no share of one"
        share = f"{100 * other['mean'] / trained['mean']:.0f} %"
        kl = gains["kl", *where, 1.0, None]
        told = (in_points(greedy), in_points(trained), share, in_points(sampled), in_points(kl))
        rows.append((where[0].removesuffix("-sample"), where[1], *told, *deployed(place["choice"])))
    head, *body = (f"| {' | '.join(cells)} |" for cells in (HEAD, *rows))
    return "\n".join([head, "|---" * len(HEAD) + "|", *body])


def summary_of(study: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "docs/results" / study / "summary.json").read_text("utf-8"))
    return found


def test_readme_shows_the_committed_studies() -> None:
    expected = table(summary_of("paper-small"), summary_of("paper-small-800"))
    shown = (ROOT / "README.md").read_text(encoding="utf-8")
    assert expected in shown, f"README's table of results is not that of the study:\n{expected}"
