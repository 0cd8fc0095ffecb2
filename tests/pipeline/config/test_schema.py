"""Reading configs: extends, overrides, error texts, dumping."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.files import dump_config, load_config
from pipeline.config.schema import Config
from pipeline.errors import ConfigError, hide_credentials
from tests.helpers.configs import MINIMAL


def write(folder: Path, values: object, name: str = "test.yaml") -> Path:
    path = folder / name
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    return write(tmp_path, MINIMAL)


def problems(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert len(str(caught.value).splitlines()) <= 40, "an error fits on one screen"
    return str(caught.value)


def test_minimal_equals_its_values(minimal: Path) -> None:
    assert load_config(minimal) == Config.model_validate(MINIMAL)


def test_extends_merges_groups_and_replaces_lists(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL, "base.yaml")
    (tmp_path / "below").mkdir()
    write(tmp_path / "below", "extends: ../base.yaml\nseed: 1\ntrain: {steps: 9}\n", "middle.yaml")
    top = "extends: below/middle.yaml\nsweep:\n  gammas: [7]\ntarget: {kind: pretrained, path: x/y}\n"
    expected: dict[str, Any] = copy.deepcopy(MINIMAL)
    expected["seed"] = 1
    expected["train"]["steps"] = 9
    expected["sweep"]["gammas"] = [7]
    expected["target"] = {"kind": "pretrained", "path": "x/y"}  # nothing of the scratch model is left
    assert load_config(write(tmp_path, top, "top.yaml")) == Config.model_validate(expected)


def test_extends_in_a_circle(tmp_path: Path) -> None:
    write(tmp_path, "extends: b.yaml\n", "a.yaml")
    write(tmp_path, "extends: a.yaml\n", "b.yaml")
    assert "circle: a.yaml → b.yaml → a.yaml" in problems(tmp_path / "a.yaml")


def test_extends_a_missing_file(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL, "books.yaml")
    text = problems(write(tmp_path, "extends: bokks.yaml\n"))
    assert "test.yaml extends" in text and f"did you mean {tmp_path / 'books.yaml'}?" in text


def test_overrides(minimal: Path) -> None:
    config = load_config(
        minimal,
        [
            "train.steps=10",
            "train.learning_rate=1e-3",
            "sweep.budgets=[24, full]",
            "train.variants.multi_view.steps=5",
            "train.variants.0.full_weight=2",
            "train.variants.multi_view.budgets.16=0.9",
            "data.sources.code.files=[a.txt, b.txt]",
            "report.samples=0",
            "tracking.uri=",
            "drafter={kind: pretrained, path: x/y}",
        ],
    )
    assert (config.train.steps, config.train.learning_rate) == (10, 0.001)
    assert config.sweep.budgets == (24, "full")
    assert [v.steps for v in config.train.variants] == [None, 5]
    assert config.train.variants[0].full_weight == 2
    assert config.train.variants[1].budgets == {16: 0.9, 32: 0.4}
    assert config.data.sources[0].files == ("a.txt", "b.txt")  # type: ignore[union-attr]
    assert (config.report.samples, config.tracking.uri, config.drafter.kind) == (0, None, "pretrained")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.steps", ["'train.steps'", "group.field=value"]),
        ("train..steps=1", ["group.field=value"]),
        ("train.steps=[1", ["train.steps=[1", "not valid YAML"]),
        ("train.steps.more=1", ["train.steps is 2", "no field 'more'"]),
        ("train.variants.multi.steps=1", ["names: full_only, multi_view", "none is 'multi'"]),
        ("sweep.gammas.5=1", ["sweep.gammas has 2 items", "none is '5'"]),
        ("train.steps=!!python/name:os.system", ["not valid YAML"]),
    ],
)
def test_bad_override(minimal: Path, override: str, parts: list[str]) -> None:
    text = problems(minimal, override)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.steps=-5", ["train.steps = -5", "an integer, at least 0", "optimizer steps of each variant"]),
        ("train.steps=many", ['train.steps = "many"', "an integer"]),
        ("train.steps=yes", ["train.steps = true", "YAML reads yes", "an integer, at least 0"]),
        ("sweep.gammas=[2, true]", ["sweep.gammas = [2, true]", "YAML reads yes"]),
        ("sweep.gammas=[2, 200]", ["sweep.gammas.1 = 200", "at least 1 and at most 128"]),
        ("sweep.gammas=[]", ["sweep.gammas = []", "a list of at least 1"]),
        ("sweep.gammas=[2,2]", ["sweep: gammas lists 2 twice", "override sweep.gammas=[2,2]"]),
        ("train.clip=.nan", ["train.clip = NaN", "a number, above 0"]),
        ("labels.temperature=.inf", ["labels.temperature = Infinity", "a number, above 0"]),
        ("sweep.budgets=[17]", ["sweep.budgets = [17]", "divisible by 8, not 17"]),
        ("sweep.budgets=[some]", ['sweep.budgets.0 = "some"', "an integer or full"]),
        ("run.executor=rayy", ['run.executor = "rayy"', "allowed: ray, inline"]),
        ("data.contexts.64.tokens=3", ["data.contexts.64.tokens = 3", "at least 16", "exact prompt length"]),
        ("data.sources.code.validation_fractoin=1", ["data.sources.code.valid", "mean validation_fraction?"]),
        ("data.sources.code.kind=txt", ["data.sources.code.kind = ", "text, pg19, longbench, lwm, prompts"]),
        ("data.sources.code.kind=", ["data.sources.code.kind"]),
        ("drafter={kind: pretrained, path: x, heads: 1}", ["drafter.heads is no field", "kind scratch, and"]),
        ("drafter={layers: 1}", ["drafter.kind is missing", "scratch, pretrained"]),
        ("target.rope_scaling=3", ["target.rope_scaling = 3", "rope_type: default, linear"]),
        ("target.rope_scaling={type: yarn}", ["target.rope_scaling.rope_type is missing", "yarn, longrope"]),
        ("batch_size=3", ["batch_size is no field", "labels.batch_sequences or train.batch_sequences?"]),
        ("train.top_k=3", ["train.top_k is no field", "did you mean labels.top_k?"]),
        ("trian.steps=3", ["trian is no field", "did you mean train?"]),
        (
            "report.zzz=3",
            ["report.zzz is no field", "the fields of report are least_documents, bootstrap_samples"],
        ),
        ("train.variants.multi_view.budgets={}", ["train.variants.multi_view: sparse_weight > 0 needs"]),
        (
            "train.variants.multi_view.budgets.x=1",
            ['train.variants.multi_view.budgets.x = "x"', "an integer"],
        ),
        ("train.variants.multi_view.budgets.16=on", ["multi_view.budgets.16 = true", "YAML reads yes"]),
        ("sweep.max_gammas={'64': yes}", ["sweep.max_gammas.64 = true", "YAML reads yes", "an integer"]),
        ("train.variants.multi_view.budgets.16=a", ["train.variants.multi_view.budgets.16 =", "a number"]),
        ("train.variants.multi_view.policy=top", ["multi_view.policy = ", "allowed: chunk_topk", "snapkv"]),
        ("train.batch_sequences=3", ["train: batch_sequences (3) must be a multiple"]),
        ("train.window_tokens=4096", ["data.sequence_tokens (96)", "(4112)"]),
        (
            "sweep.measure.budgets=[16, 64]",
            ["sweep: measure.budgets names 64, which budgets lacks: it has 16, 32, full"],
        ),
        ("sweep.drafters=[nobody]", ["sweep.drafters: ['nobody'] are not among train.variants"]),
        ("improve.kl_steps=200", ["improve: kl_steps (200) are more than steps (100)"]),
        ("improve={}", ["improve.kl_steps above 0 need labels.top_k > 0"]),
        ("improve={kl_steps: 0}", ["least_documents (20) is more than data.validation_prompts (2)"]),
        ("improve={drafter: nobody}", ["improve.drafter: 'nobody' is not among", "multi_view"]),
        ("improve.gate.temperatures=[0, 1]", ["improve: gate.temperatures has 1", "at 0 alone"]),
        ("improve.gate.margins.speed=0.1", ["improve: gate.margins.speed", "leave it out"]),
        ("improve.gate.model=x", ["improve: gate.model", "leave it out"]),
        ("name=a b", ['name = "a b"', "text, matching"]),
        ("train=", ["train = null", "a group with variants, steps"]),
    ],
)
def test_error_says_what_to_do(minimal: Path, override: str, parts: list[str]) -> None:
    text = problems(minimal, override)
    assert all(part in text for part in parts), text
    assert f"override {override}" in text, text
    for noise in ("pydantic", "Input should", "literal[", "extra_forbidden", ".text.", ".scratch."):
        assert noise not in text


def test_error_names_file_and_line(tmp_path: Path) -> None:
    base = write(tmp_path, MINIMAL, "base.yaml")
    text = problems(write(tmp_path, "extends: base.yaml\nseed: -1\ndata:\n  prompts: 0\n"))
    assert f"in {tmp_path / 'test.yaml'}, line 2" in text and f"in {tmp_path / 'test.yaml'}, line 4" in text
    wrong = base.read_text().replace("sequence_tokens: 96", "sequence_tokens: 9")
    line = 1 + wrong.splitlines().index("  sequence_tokens: 9")
    write(tmp_path, wrong, "base.yaml")
    assert f"in {base}, line {line}" in problems(write(tmp_path, "extends: base.yaml\n"))


def test_missing_fields_and_many_problems(tmp_path: Path) -> None:
    text = problems(write(tmp_path, {"name": "x", "data": {}, "unknown1": 1, "unknown2": 2, "seed": "a"}))
    assert "data.sources is missing" in text and "needed: a list of at least 1" in text
    assert "10 problems" in text and "… and 4 more" in text


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["must hold fields", "null"]),
        ("- 1\n", ["must hold fields", "[1]"]),
        ("a: [1\n", ["not valid YAML", "line"]),
        ("seed: 1\ntrain: 2\nseed: 3\n", ["'seed' stands on line 1 and again on line 3"]),
        ("run: {device: cpu, device: cuda}\n", ["'device'"]),
        ("a: !!python/object/apply:os.getcwd []\n", ["not valid YAML"]),
        ("extends: [a.yaml]\n", ["`extends` takes one file name"]),
    ],
)
def test_bad_file(tmp_path: Path, text: str, parts: list[str]) -> None:
    found = problems(write(tmp_path, text))
    assert str(tmp_path / "test.yaml") in found
    assert all(part in found for part in parts), found


def test_unreadable_files(tmp_path: Path, minimal: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("name: café".encode("latin-1"))
    assert "UTF-8" in problems(tmp_path / "latin.yaml")
    assert "cannot be read" in problems(tmp_path)
    assert f"did you mean {minimal}?" in problems(tmp_path / "tset.yaml")


def test_exponents_are_numbers(tmp_path: Path, minimal: Path) -> None:
    # PyYAML alone reads 1e-5 as text; text that looks like it stays text.
    config = load_config(minimal, ["train.learning_rate=1e-5", "data.max_sequences=1e4", "name='1e5'"])
    assert (config.train.learning_rate, config.data.max_sequences, config.name) == (1e-5, 10_000, "1e5")


def test_dump_reads_back_equal(tmp_path: Path, minimal: Path) -> None:
    config = load_config(minimal, ["target.rope_scaling={rope_type: yarn, factor: 4}", "seed=7"])
    dumped = dump_config(config)
    assert load_config(write(tmp_path, dumped, "dumped.yaml")) == config
    # What was added as an option is not told where it is not used, so that old fingerprints stay.
    assert [*yaml.safe_load(dumped)] == [name for name in Config.model_fields if name != "improve"]
    assert "&id" not in dumped and "budgets: [16, 32, full]" in dumped


def test_credentials_are_never_shown(minimal: Path) -> None:
    secret = "http://ann:pa55@host:5000"
    assert hide_credentials(f"see {secret}/x and b@c") == "see http://***@host:5000/x and b@c"
    assert "pa55" not in dump_config(load_config(minimal, [f"tracking.uri={secret}"]))
    for override in (f"tracking.url={secret}", f"tracking.uri=[{secret}]", f"train.variants.x={secret}"):
        assert "pa55" not in problems(minimal, override)
