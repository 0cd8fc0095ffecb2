"""The log of served rounds: what was proposed and accepted, and what the target thought of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.axes import FULL, View
from pipeline.config.train import Variant
from pipeline.errors import BadData
from pipeline.kv.views import view_of
from pipeline.models.load import ModelRef
from pipeline.serving.rounds import Asked, ServeCounts, Server, ServeTask, asked_prompts, sampled_views
from pipeline.store.files import read_rows, write_array, write_rows
from pipeline.store.rows import ServedText
from tests.helpers.pairs import make_pair, plain_tokens, rounds_of, tokens_of
from tests.helpers.tiny import numbers, save_model, tiny_config, tiny_prompts, tiny_tokenizer

LENGTH, WINDOW, WINDOWS, GAMMA, TOP = 96, 12, 2, 3, 5
MOST = WINDOW * WINDOWS
CONFIG = {
    "data.sequence_tokens": LENGTH,
    "labels.top_k": TOP,
    "labels.batch_sequences": 2,
    "train.window_tokens": WINDOW,
    "train.windows": WINDOWS,
}
SPARSE = view_of("chunk_topk", 16)
ENDS = (8, 30)


class Served:
    """A pair on disk, training prompts of two lengths, packed sequences, and a shard of all of them."""

    def __init__(self, folder: Path, target: PreTrainedModel, drafter: PreTrainedModel) -> None:
        self.folder = folder
        self.target = save_model(target, folder / "target")
        self.drafter = save_model(drafter, folder / "drafter")
        tiny_tokenizer().save_pretrained(folder / "tokenizer")
        self.prompts = [
            tiny_prompts("train", 1, length, MOST, seed=number)[0].model_copy(
                update={"prompt_id": f"p{number}"}
            )
            for number, length in enumerate((40, 57, 40))
        ]
        self.asked, self.sequences = folder / "asked" / "a.jsonl", folder / "sequences" / "train-00000.npy"
        write_rows(self.asked, self.prompts)
        write_array(self.sequences, numbers(3, LENGTH, seed=30))
        places = [(self.asked, 0), (self.sequences, 2), (self.asked, 1), (self.sequences, 0), (self.asked, 2)]
        views = (FULL, SPARSE, FULL, FULL, SPARSE)
        self.task = ServeTask(tuple(Asked(*at, view) for at, view in zip(places, views, strict=True)), 7)
        self.counts = self.server(folder / "served")(self.task)
        self.rows = read_rows(folder / "served" / "labels" / "answers-00007.rounds.jsonl", ServedText)

    def server(self, output: Path, **changes: Any) -> Server:
        config = tiny_config(CONFIG | changes)
        return Server(config, GAMMA, self.target, self.drafter, self.folder / "tokenizer", output)

    def plain(self, ref: ModelRef) -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(ref.path, attn_implementation="eager")
        return model.eval()

    def pairs(self) -> list[tuple[Asked, ServedText]]:
        """Prompts with what was served of them."""
        names = [f"p{a.row}" if a.file == self.asked else f"train-00000-{a.row}" for a in self.task.asked]
        rows = {row.prompt_id: row for row in self.rows}
        assert [name for name in names if name in rows] == list(rows)
        return [
            (asked, rows[name]) for asked, name in zip(self.task.asked, names, strict=True) if name in rows
        ]

    def tokens(self, asked: Asked) -> list[int]:
        """Of a prompt, by its place."""
        if asked.file == self.asked:
            return self.prompts[asked.row].tokens
        tokens: list[int] = np.load(asked.file)[asked.row, : LENGTH - MOST].tolist()
        return tokens

    def arrays(self) -> dict[str, np.ndarray]:
        files = (self.folder / "served" / "labels").glob("answers-00007.*.npy")
        return {file.name.split(".")[1]: np.load(file) for file in files}


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, target: PreTrainedModel, drafter: PreTrainedModel
) -> Served:
    before = target.generation_config.eos_token_id
    target.generation_config.eos_token_id = list(ENDS)
    made = Served(tmp_path_factory.mktemp("served"), target, drafter)
    target.generation_config.eos_token_id = before
    return made


@torch.no_grad()
def greedy(model: PreTrainedModel, tokens: list[int], count: int) -> list[int]:
    """By whole forward passes, without a cache."""
    made: list[int] = []
    for _ in range(count):
        made.append(int(model(torch.tensor([tokens + made])).logits[0, -1].argmax()))
    return made


def test_texts_are_the_targets_and_proposals_the_drafters(served: Served) -> None:
    """Behind the full view, against plain forward passes of both models."""
    target, drafter = served.plain(served.target), served.plain(served.drafter)
    checked = rejected = whole = 0
    for asked, row in served.pairs():
        prompt = served.tokens(asked)
        text = greedy(target, prompt, len(row.tokens))
        assert row.tokens == text and row.prompt_tokens == len(prompt) and row.view == asked.view
        assert len(text) == MOST or text[-1] in ENDS
        at = 1
        for one in row.rounds:
            assert one.begins_at == at
            ours = text[at : at + one.accepted]
            assert one.proposals[: one.accepted] == ours
            last = at + one.accepted  # the target's own token, unless the text is at its end
            if one.accepted < len(one.proposals):
                assert one.proposals[one.accepted] != text[last]
                rejected += 1
            else:
                whole += 1
            if asked.view == FULL:
                expected = greedy(drafter, prompt + text[:at], len(one.proposals))
                assert one.proposals == expected
                checked += 1
            at = min(last + 1, len(text))
        assert at == len(text)
    assert checked > 5 and rejected > 2 and whole > 2
    assert len({len(row.tokens) for row in served.rows}) > 1, "no text ends early"


@pytest.mark.parametrize("view", [FULL, SPARSE], ids=str)
def test_the_log_has_the_rounds_of_the_decoder(
    served: Served, target: PreTrainedModel, drafter: PreTrainedModel, view: View
) -> None:
    compared = 0
    for asked, row in served.pairs():
        if asked.view != view:
            continue
        pair = make_pair(target, drafter, [torch.tensor([served.tokens(asked)])], view, MOST + GAMMA)
        rounds = rounds_of(pair, GAMMA, MOST, frozenset(ENDS))
        assert [row.tokens] == tokens_of(pair, rounds) == plain_tokens(pair, MOST, frozenset(ENDS))
        logged = [(len(one.proposals), one.accepted) for one in row.rounds]
        assert logged == [(one.proposed, one.accepted) for one in rounds[0]]
        compared += len(logged)
    assert compared > 4


@torch.no_grad()
def test_labels_are_the_plain_forwards_at_every_decided_context(served: Served) -> None:
    target, stored = served.plain(served.target), served.arrays()
    assert stored["ids"].shape == stored["log_probs"].shape == (len(served.rows), MOST, TOP)
    for number, row in enumerate(served.rows):
        prefix, learned = int(stored["prefix"][number]), int(stored["supervised"][number])
        tokens_L = stored["tokens"][number].astype(np.int64)
        assert (prefix, learned) == (row.prompt_tokens, len(row.tokens) - 1)
        assert tokens_L.tolist()[prefix : prefix + len(row.tokens)] == row.tokens
        assert not tokens_L[prefix + len(row.tokens) :].any()
        logits = target(torch.from_numpy(tokens_L[None])).logits[0, prefix : prefix + learned]
        np.testing.assert_array_equal(stored["argmax"][number, :learned], logits.argmax(-1))
        assert stored["argmax"][number, :learned].tolist() == row.tokens[1:]  # greedy: the text itself
        ids = torch.from_numpy(stored["ids"][number, :learned].astype(np.int64))
        assert torch.equal(ids.sort(-1).values, logits.topk(TOP).indices.sort(-1).values)
        log_p = logits.log_softmax(-1).gather(-1, ids)
        np.testing.assert_allclose(stored["log_probs"][number, :learned], log_p, rtol=2e-3, atol=2e-3)


def test_counts_are_those_of_the_log_and_bytes_those_that_are_said(served: Served) -> None:
    rounds = [one for row in served.rows for one in row.rounds]
    proposed, accepted = sum(len(one.proposals) for one in rounds), sum(one.accepted for one in rounds)
    assert served.counts == ServeCounts(len(served.rows), len(rounds), proposed, accepted)
    each = LENGTH * 2 + MOST * (2 + TOP * (2 + 2)) + 8
    assert sum(array.nbytes for array in served.arrays().values()) == len(served.rows) * each


def test_a_shard_is_served_once_and_again_where_a_part_is_missing(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = served.server(tmp_path)
    assert server(served.task) == served.counts
    theirs = {file.name: file.read_bytes() for file in (served.folder / "served" / "labels").iterdir()}
    assert {file.name: file.read_bytes() for file in (tmp_path / "labels").iterdir()} == theirs
    with monkeypatch.context() as patch:
        patch.setattr(Server, "serve", lambda *_: pytest.fail("it is there already"))
        assert server(served.task) == served.counts
    (tmp_path / "labels" / "answers-00007.rounds.jsonl").unlink()
    server(served.task)
    assert {file.name: file.read_bytes() for file in (tmp_path / "labels").iterdir()} == theirs


def test_a_text_that_ends_at_once_is_left_out(served: Served, tmp_path: Path) -> None:
    server = served.server(tmp_path)
    ended = served.rows[1].tokens[0]
    server.pair.eos = frozenset({*ENDS, ended})
    server(served.task)
    rows = read_rows(tmp_path / "labels" / "answers-00007.rounds.jsonl", ServedText)
    kept = [row.prompt_id for row in served.rows if row.tokens[0] != ended]
    assert [row.prompt_id for row in rows] == kept and 0 < len(kept) < len(served.rows)
    assert len(np.load(tmp_path / "labels" / "answers-00007.argmax.npy")) == len(kept)


# ── which prompts, behind which views ─────────────────────────────────────────────────────────────


def test_rounds_of_improving_go_through_all_prompts_once(served: Served) -> None:
    config, variant = tiny_config(CONFIG), Variant(name="v", budgets={16: 1.0})
    rounds = [asked_prompts(config, variant, served.folder, number, 2) for number in range(3)]
    places = [(asked.file, asked.row) for asked_of in rounds for asked in asked_of]
    assert len(set(places)) == 6 and {file for file, _ in places} == {served.asked, served.sequences}
    assert rounds[1] == asked_prompts(config, variant, served.folder, 1, 2)
    many = asked_prompts(config, variant, served.folder, 0, 100)
    assert len({(asked.file, asked.row) for asked in many}) == len(many) == 6
    with pytest.raises(BadData, match="neither sequences nor prompts"):
        asked_prompts(config, variant, served.folder / "tokenizer", 0, 2)


def test_views_are_sampled_by_the_weights_of_the_budgets() -> None:
    variant = Variant(name="v", policy="window", sinks=2, budgets={16: 3.0, 32: 1.0})
    views = sampled_views(variant, 4000, np.random.default_rng(3))
    small = View("window", 16, sinks=2)
    assert set(views) == {small, View("window", 32, sinks=2)}
    assert views.count(small) / 4000 == pytest.approx(0.75, abs=0.03)
    full = Variant(name="v", sparse_weight=0)
    assert sampled_views(full, 2, np.random.default_rng(3)) == [FULL, FULL]
