"""The forms of a product: the same numbers in each, chosen by time, remembered, left alone where small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from pipeline.axes import FULL
from pipeline.decode import products
from pipeline.decode.loop import autoregressive, speculate
from pipeline.decode.model import decode_model
from pipeline.decode.products import FORMS, MOST_ROWS, Linear, cache_file, choose_forms
from pipeline.decode.runner import Runner
from pipeline.decode.sampling import GREEDY
from pipeline.decode.sources import ModelDrafts
from tests.helpers.models import random_tokens


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another cache than the user's, and products of any size are chosen."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(products, "LARGE_BYTES", 0)
    monkeypatch.setattr(products, "SAMPLE_BYTES", 1)


def layer(out: int = 24, width: int = 16, bias: bool = True) -> Linear:
    return Linear(torch.randn(out, width), torch.randn(out) if bias else None)


def times(monkeypatch: pytest.MonkeyPatch, faster: dict[int, str]) -> list[int]:
    """Instead of a clock: the named form is the fastest for so many rows. Lists what is measured."""
    asked: list[int] = []

    def measure(layers: Any) -> dict[int, dict[str, float]]:
        asked.append(len(layers))
        return {
            rows: {form: 1.0 + FORMS.index(form) - 5 * (form == faster.get(rows)) for form in FORMS}
            for rows in range(1, MOST_ROWS + 1)
        }

    monkeypatch.setattr(products, "measure", measure)
    return asked


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 5, 9, 16, 40])
def test_every_form_gives_the_product(rows: int, bias: bool) -> None:
    made = layer(bias=bias)
    made.pack()
    for x in (torch.randn(1, rows, 16), torch.randn(rows, 16)):
        expected = x.double() @ made.weight.double().T + (made.bias.double() if bias else 0)  # type: ignore[union-attr]
        for form in FORMS:
            out = made.times(x, form)
            assert out.shape == expected.shape and out.is_contiguous()
            torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


def test_the_fastest_form_of_each_number_of_rows_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = times(monkeypatch, {1: "linear", 3: "transposed", 5: "packed"})
    layers = [layer(), layer(), layer(out=8)]
    choose_forms(layers)
    assert asked == [2, 1]  # once a shape
    taken: list[tuple[int, str]] = []
    monkeypatch.setattr(Linear, "times", lambda self, x, form: taken.append((x.shape[1], form)) or x)
    for rows in (1, 3, 5, 17):
        layers[0](torch.randn(1, rows, 16))
    assert taken == [(1, "linear"), (3, "transposed"), (5, "packed"), (17, "linear")]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    layers[0](torch.randn(1, 5, 16))
    assert taken[-1] == (5, "linear")  # the best that a compiler can take in


def test_it_is_measured_once_on_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = times(monkeypatch, {5: "packed"})
    for _ in range(3):
        made = layer()
        choose_forms([made])
        assert made.forms[5][0] == "packed" and made.packed is not None
    assert asked == [1]
    for content in ("{torn", "[]", '{"x": {"1": {"linear": 1}}}'):
        cache_file().write_text(content)
        choose_forms([layer()])
    assert asked == [1] * 4 and json.loads(cache_file().read_text())


def test_without_a_folder_to_keep_it_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    made = layer()
    choose_forms([made])
    assert made.forms and (tmp_path / "file").read_text() == "no folder"


def test_small_models_and_other_types_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = times(monkeypatch, {})
    half = Linear(torch.randn(24, 16).bfloat16(), None)
    choose_forms([half])
    monkeypatch.setattr(products, "LARGE_BYTES", 100 * 2**20)
    small = layer()
    choose_forms([small])
    assert not asked and not half.forms and not small.forms
    x = torch.randn(1, 3, 16)
    assert torch.equal(small(x), F.linear(x, small.weight, small.bias))


def test_texts_are_the_same_in_every_form(
    target: PreTrainedModel, drafter: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Speculation, whose passes read one row and several, over each form of all products."""
    texts = set()
    for form in FORMS:
        times(monkeypatch, dict.fromkeys(range(1, MOST_ROWS + 1), form))
        products.cache_file().unlink(missing_ok=True)
        runners = []
        for model in (target, drafter):
            fast = decode_model(model)
            tokens = random_tokens(1, 20)
            (view,), logits = fast.prefill(tokens, [(20, FULL)])
            runner = Runner(fast, 1, 20, 40, "none")
            runner.cache.load([view])
            runners.append((runner, int(logits.argmax())))
        (ours, first), (theirs, _) = runners
        assert ours.model.layers[0].down.forms[1][0] == form  # type: ignore[attr-defined]
        plain = [step[0] for step in autoregressive(ours, [first], 24, frozenset(), GREEDY)]
        rounds = speculate(ours, ModelDrafts(theirs), [first], 4, 24, frozenset(), GREEDY)
        said = [token for (round_,) in rounds if round_ is not None for token in round_.tokens]
        assert said == plain
        texts.add(tuple(said))
    assert len(texts) == 1
