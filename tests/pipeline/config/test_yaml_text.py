"""YAML with anchors, without end, or of values that are none: what comes out, and the error texts."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.files import load_config, load_group
from pipeline.config.gate import GateConfig
from pipeline.config.yaml_text import MOST_LEVELS, MOST_VALUES, read_yaml
from pipeline.errors import ConfigError
from tests.helpers.configs import MINIMAL

BUDGETS = """
train:
  variants:
    - {name: full_only, budgets: &b {16: 0.6, 32: 0.4}, rope_scaling: &r {rope_type: linear, factor: 2}}
    - {name: multi_view, budgets: *b, rope_scaling: {<<: *r, factor: 4}}
"""


def values(text: str) -> Any:
    return read_yaml(text, "a.yaml")[1]


def places(value: Any) -> list[Any]:
    """All dicts and lists in `value`."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [
        *([value] if isinstance(value, dict | list) else []),
        *(p for part in inside for p in places(part)),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "a: &x {b: {c: [1]}}\nd: *x\ne: [*x, *x]",
        "a: &x [[1], {b: 2}]\nc: &y [*x, *x]\nd: [*y, *x]",
        "a: &x {b: {c: 1}}\nd: {<<: *x, e: 2}\nf: {<<: [*x, {g: [3]}]}",
        "- &x {a: 1}\n- *x",
        "&k a: 1\nb: {*k : 2}",
    ],
)
def test_every_place_has_its_own_value(text: str) -> None:
    assert values(text) == yaml.safe_load(text)
    ids = [id(place) for place in places(values(text))]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("extended", [False, True])
def test_an_override_changes_no_other_place(tmp_path: Path, extended: bool) -> None:
    path = tmp_path / "base.yaml"
    (tmp_path / "minimal.yaml").write_text(yaml.safe_dump(MINIMAL))
    path.write_text("extends: minimal.yaml" + BUDGETS)
    if extended:
        path = tmp_path / "top.yaml"
        path.write_text("extends: base.yaml\nseed: 1\n")
    overrides = ["train.variants.multi_view.budgets.64=0.5", "train.variants.full_only.rope_scaling.factor=8"]
    full_only, multi_view = load_config(path, overrides).train.variants
    assert (full_only.budgets, multi_view.budgets) == ({16: 0.6, 32: 0.4}, {16: 0.6, 32: 0.4, 64: 0.5})
    assert (full_only.rope_scaling, multi_view.rope_scaling) == (
        {"rope_type": "linear", "factor": 8}, {"rope_type": "linear", "factor": 4},
    )  # fmt: skip


def test_an_override_of_anchors_makes_two_values(tmp_path: Path) -> None:
    path = tmp_path / "minimal.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    variants = "train.variants=[{name: a, budgets: &b {16: 1}}, {name: b, budgets: *b}]"
    first, second = load_config(path, [variants, "train.variants.b.budgets.32=1"]).train.variants
    assert (first.budgets, second.budgets) == ({16: 1}, {16: 1, 32: 1})


def test_a_merged_value_is_told_by_its_own_line(tmp_path: Path) -> None:
    path = tmp_path / "gate.yaml"
    path.write_text("margins:\n  <<:\n    speed: -3\n")
    with pytest.raises(ConfigError) as caught:
        load_group(GateConfig, path)
    assert "margins.speed = -3" in str(caught.value) and f"{path}, line 3" in str(caught.value)


LAUGHS = "a: &a [1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join(9 * [f'*{before}'])}]\n" for before, name in pairwise("abcdefghi")
)
CHAIN = "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 3000))

# Text, line of the fault, and what is told of it.
ENDLESS = [
    ("name: x\na: &x {b: *x}\n", 2, "&x stands around its own alias *x"),
    ("name: x\na: &x [1, {b: [*x]}]\n", 2, "&x stands around its own alias *x"),
    ("name: x\na: &x\n  b: 1\n  <<: *x\n", 4, "&x stands around its own alias *x"),
    ("name: x\na: " + "[" * 5000 + "]" * 5000, 2, f"more than {MOST_LEVELS} levels"),
    ("name: x\na: " + "[" * 5000, 2, f"more than {MOST_LEVELS} levels"),
    ("".join(" " * depth + "a:\n" for depth in range(1000)), MOST_LEVELS + 1, f"{MOST_LEVELS} levels"),
    (CHAIN, MOST_LEVELS, f"more than {MOST_LEVELS} levels"),
    (LAUGHS, 6, f"more than {MOST_VALUES} values"),
]


@pytest.mark.parametrize(("text", "line", "told"), ENDLESS, ids=range(len(ENDLESS)))
def test_what_has_no_end_is_a_config_error(tmp_path: Path, text: str, line: int, told: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    found = str(caught.value)
    assert str(path) in found and told in found and f"line {line}," in found
    assert len(found) < 1000 and len(found.splitlines()) < 10


@pytest.mark.parametrize(
    "override",
    [
        "train.steps=" + "[" * 5000 + "]" * 5000,
        "train.steps=" + "{a: " * 5000 + "}" * 5000,
        "train.steps=&x [*x]",
        ".".join(["train"] * 5000) + "=1",
        "train.steps=" + "9" * 5000,
    ],
    ids=["list", "dict", "anchor", "name", "number"],
)
def test_an_override_without_end_is_a_config_error(tmp_path: Path, override: str) -> None:
    path = tmp_path / "minimal.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    assert "override" in str(caught.value) and len(str(caught.value)) < 1000


def test_as_deep_as_is_allowed(tmp_path: Path) -> None:
    deep = "[" * (MOST_LEVELS - 1) + "]" * (MOST_LEVELS - 1)
    assert values(f"a: {deep}") == yaml.safe_load(f"a: {deep}")
    with pytest.raises(yaml.YAMLError):
        values(f"a: [{deep}, [{deep}]]")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("2025-02-30", "timestamp"),
        ("0x_", "int"),
        ("9" * 5000, "int"),
        ("!!int abc", "int"),
        ("!!float abc", "float"),
        ("!!bool abc", "bool"),
        ("!!timestamp abc", "timestamp"),
    ],
)
def test_a_value_that_is_not_what_it_looks_like(tmp_path: Path, text: str, kind: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"seed: 1\nname: {text}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert f"is no {kind}; put text in quotes" in str(caught.value) and "line 2" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("3: 4\n", "3 is no field"),
        ("on: 1\n", "1 is no field"),
        ("margins: {3: 4}\n", "margins.3 is no field"),
    ],
)
def test_a_key_that_is_no_text(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=told):
        load_group(GateConfig, path)


@pytest.mark.parametrize("text", ['name: "a\\0b"\n', 'data: {root: "\\x00"}\n', '"a\\0": 1\n'])
def test_text_that_no_path_can_hold(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="a NUL character, which no path can hold"):
        load_config(path)
