"""Drafters in use: assisted generation of transformers behind a budget, Python programs, docs/serving.md."""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Olmo2Config, PreTrainedModel
from typer.testing import CliRunner

from jobs.cli.main import app
from pipeline.config.files import dump_config
from pipeline.decode.sources import ModelDrafts
from pipeline.errors import BadData
from pipeline.kv.view_cache import ATTENTION
from pipeline.kv.views import view_of
from pipeline.models.build import prepare_model
from pipeline.models.load import ModelRef
from pipeline.serving.assisted import BudgetedAssistant
from pipeline.serving.pair import Pair, load_pair
from tests.helpers.documents import story
from tests.helpers.models import VOCABULARY, random_tokens
from tests.helpers.pairs import make_pair, rounds_of, tokens_of
from tests.helpers.paths import ROOT
from tests.helpers.toys import artifact, toy_config

DOCS = ROOT / "docs" / "serving.md"
LENGTH, LIMIT, GAMMA = 100, 24, 4


def twin(model: PreTrainedModel, attention: str = "sdpa") -> PreTrainedModel:
    """The same weights under transformers' own attention, never stopping by itself."""
    other = type(model)._from_config(copy.deepcopy(model.config), attn_implementation=attention)
    other.load_state_dict(model.state_dict())
    other.generation_config.eos_token_id, other.generation_config.pad_token_id = None, 0
    return other.eval()


class Recorded(BudgetedAssistant):
    """An assistant that notes its proposals and how many entries each layer held after them, by round."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.proposed: list[list[int]] = []
        self.held: list[list[int]] = []

    def generate(self, input_ids: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        output = super().generate(input_ids, *arguments, **keywords)
        self.proposed.append(output.sequences[0, input_ids.shape[1] :].tolist())
        self.held.append([layer.keys.shape[2] for layer in output.past_key_values.layers])
        return output


def assisted(target: PreTrainedModel, assistant: Any, prompt_1S: torch.Tensor) -> list[int]:
    mask = torch.ones_like(prompt_1S)
    output = target.generate(
        prompt_1S, attention_mask=mask, assistant_model=assistant, max_new_tokens=LIMIT, do_sample=False
    )
    return output[0, prompt_1S.shape[1] :].tolist()


def engine(
    target: PreTrainedModel, drafter: PreTrainedModel, prompt_1S: torch.Tensor, policy: str, budget: Any
) -> tuple[list[int], list[list[int]]]:
    """What this engine writes behind a prompt, and what it proposes by round.

    The prompt's last token is read as the continuation's first. Of proposals there are, as in transformers,
    at most so many that the target's own token still fits.
    """
    pair = make_pair(target, drafter, [prompt_1S[:, :-1]], view_of(policy, budget), LIMIT + 1 + GAMMA)
    pair = pair._replace(firsts=[int(prompt_1S[0, -1])])
    source, offers = ModelDrafts(pair.drafter), []
    propose = source.propose

    def noted(*arguments: Any) -> Any:
        offers.append(propose(*arguments))
        return offers[-1]

    source.propose = noted  # type: ignore[method-assign]
    rounds = rounds_of(pair, GAMMA, LIMIT + 1, source=source)
    wanted, left = [], LIMIT
    for offer, one in zip(offers, rounds[0], strict=True):
        wanted.append(offer.tokens_BT[0, : left - 1].tolist())
        left -= len(one.tokens)
    return tokens_of(pair, rounds)[0][1:], [tokens for tokens in wanted if tokens]


@pytest.mark.parametrize(
    ("policy", "budget", "attention"),
    [
        ("chunk_topk", 16, "sdpa"),
        ("chunk_topk", 48, "eager"),
        ("streaming", 16, "eager"),
        ("snapkv", 32, "sdpa"),
        ("chunk_topk", 0, "sdpa"),
        ("chunk_topk", "full", "sdpa"),
    ],
)
def test_assisted_generation_drafts_behind_the_budget(
    target: PreTrainedModel, drafter: PreTrainedModel, policy: str, budget: Any, attention: str
) -> None:
    prompt = random_tokens(1, LENGTH, seed=7)
    assistant = Recorded(twin(drafter, attention), policy, budget, GAMMA)
    text = assisted(twin(target), assistant, prompt)
    plain = twin(target).generate(prompt, max_new_tokens=LIMIT, do_sample=False)
    assert text == plain[0, LENGTH:].tolist()

    expected, proposals = engine(target, drafter, prompt, policy, budget)
    assert text == expected
    assert assistant.proposed == proposals
    # After the first round a layer holds the view, the prompt's last token, and all proposals but the last.
    most = LENGTH - 1 if budget == "full" else budget
    assert len(assistant.held[0]) == drafter.config.num_hidden_layers
    assert max(assistant.held[0]) <= most + GAMMA
    # And in the end no more than the view, that token and the continuation.
    assert max(assistant.held[-1]) <= most + LIMIT
    if budget != "full":
        _, with_all = engine(target, drafter, prompt, policy, "full")
        assert proposals != with_all, (
            "the budget makes no difference here: this test would not see it ignored"
        )


def test_budget_full_is_transformers_own_assistant(target: PreTrainedModel, drafter: PreTrainedModel) -> None:
    prompt, plain = random_tokens(1, LENGTH, seed=8), twin(drafter)
    assistant = Recorded(twin(drafter), "chunk_topk", "full", GAMMA)
    settings = plain.generation_config
    settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = GAMMA, "constant"
    settings.assistant_confidence_threshold = 0.0
    generate, proposed = plain.generate, []

    def noted(input_ids: torch.Tensor, **arguments: Any) -> Any:
        output = generate(input_ids, **arguments)
        proposed.append(output.sequences[0, input_ids.shape[1] :].tolist())
        return output

    plain.generate = noted
    assert assisted(twin(target), assistant, prompt) == assisted(twin(target), plain, prompt)
    assert assistant.proposed == proposed


def test_an_architecture_without_a_lean_form_drafts_behind_the_budget() -> None:
    config = Olmo2Config(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(3)
    ours = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape))
    model, prompt = prepare_model(ours, VOCABULARY), random_tokens(1, LENGTH, seed=9)
    # A model that drafts for itself behind a budget.
    assistant = Recorded(twin(model), "chunk_topk", 16, GAMMA)
    text = assisted(twin(model), assistant, prompt)
    expected, proposals = engine(model, model, prompt, "chunk_topk", 16)
    assert text == expected
    assert assistant.proposed == proposals
    assert any(one != text[: len(one)] for one in proposals), "it sees as much as the target"


def test_an_assistant_leaves_its_drafter_as_it_was(target: PreTrainedModel, drafter: PreTrainedModel) -> None:
    model, prompt = twin(drafter), random_tokens(1, LENGTH, seed=7)
    settings, logits = model.generation_config.to_dict(), model(prompt).logits
    first, second = (
        assisted(twin(target), BudgetedAssistant(model, "chunk_topk", 16, GAMMA), prompt) for _ in range(2)
    )
    assert first == second
    assert model.config._attn_implementation == "sdpa"
    assert model.generation_config.to_dict() == settings
    torch.testing.assert_close(model(prompt).logits, logits)


def test_a_prompt_of_one_token_has_no_prefix_to_cut(
    target: PreTrainedModel, drafter: PreTrainedModel
) -> None:
    prompt = random_tokens(1, 1)
    plain = twin(target).generate(prompt, max_new_tokens=LIMIT, do_sample=False)
    text = assisted(twin(target), BudgetedAssistant(twin(drafter), "chunk_topk", 16, GAMMA), prompt)
    assert text == plain[0, 1:].tolist()


def test_an_assistant_says_what_it_cannot_do(target: PreTrainedModel, drafter: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="load it with AutoModelForCausalLM"):
        BudgetedAssistant(drafter, "chunk_topk", 16, GAMMA)
    with pytest.raises(ValueError, match="divisible by 8"):
        BudgetedAssistant(twin(drafter), "chunk_topk", 20, GAMMA)
    prompt = random_tokens(1, LENGTH)
    padded = torch.ones_like(prompt)
    padded[0, :3] = 0
    assistant = BudgetedAssistant(twin(drafter), "chunk_topk", 16, GAMMA)
    with pytest.raises(ValueError, match="the prompt has padding"):
        twin(target).generate(prompt, attention_mask=padded, assistant_model=assistant, max_new_tokens=LIMIT)
    unknown = BudgetedAssistant(twin(drafter), "chunk_top", 16, GAMMA)
    with pytest.raises(ValueError, match="unknown KV policy 'chunk_top'"):
        assisted(twin(target), unknown, prompt)


# ── Python programs ───────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def folders(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as docs/serving.md has it: `target`, `drafter`, `prompt.txt`."""
    place = tmp_path_factory.mktemp("serving")
    (place / "target").symlink_to(artifact(finished, "pretrain-target") / "model")
    (place / "drafter").symlink_to(artifact(finished, "drafter-multi_view") / "model")
    (place / "prompt.txt").write_text(story(3)[:400])
    return place


@pytest.fixture(scope="module")
def written(folders: Path) -> Callable[[str, int], str]:
    """`written(prompt, tokens)`: the target's greedy continuation, by transformers."""
    target = AutoModelForCausalLM.from_pretrained(folders / "target")
    tokenizer = AutoTokenizer.from_pretrained(folders / "target")

    def write(prompt: str, tokens: int) -> str:
        given = tokenizer(prompt, return_tensors="pt")
        output = target.generate(**given, max_new_tokens=tokens, do_sample=False)
        return str(tokenizer.decode(output[0, given["input_ids"].shape[1] :], skip_special_tokens=True))

    return write


@pytest.fixture(scope="module")
def pair(folders: Path) -> Pair:
    return load_pair(folders / "target", ModelRef(str(folders / "drafter")))


@pytest.mark.parametrize("budget", [16, "full"])
def test_prompts_are_continued_as_the_target_would(
    pair: Pair, written: Callable[[str, int], str], budget: Any
) -> None:
    prompts = [story(3)[:150], story(4)[:320], story(5)[:60]]
    texts = pair.continue_prompts(prompts, "chunk_topk", budget, gamma=3, max_new_tokens=20)
    assert texts == [written(prompt, 20) for prompt in prompts]


def test_a_drafter_is_given_its_budget(pair: Pair) -> None:
    reading = pair.read([story(3)[:400]], view_of("chunk_topk", 16), 3, 20, 0.0)
    cache = reading.source.runner.cache
    assert int(cache.kept_B) <= cache.capacity == 16 < int(cache.prefix_B)


def test_sampling_goes_by_the_seed(pair: Pair) -> None:
    prompts = [story(3)[:150], story(3)[:150]]

    def sample(seed: int) -> list[str]:
        return pair.continue_prompts(prompts, "streaming", 16, 3, 20, temperature=1.0, seed=seed)

    first = sample(1)
    assert sample(1) == first != sample(2)
    assert first[0] != first[1], "prompts draw numbers of their own"


def test_programs_are_told_what_is_wrong(pair: Pair, folders: Path, tmp_path: Path) -> None:
    with pytest.raises(BadData, match="there is no prompt"):
        pair.continue_prompts([], "chunk_topk", 16, 3, 20)
    with pytest.raises(BadData, match="the prompt is empty"):
        pair.continue_prompts([""], "chunk_topk", 16, 3, 20)
    with pytest.raises(ValueError, match="divisible by 8"):
        pair.continue_prompts(["Once"], "chunk_topk", 20, 3, 20)
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare" / name).symlink_to(folders / "drafter" / name)
    with pytest.raises(BadData, match="bare holds no tokenizer"):
        load_pair(folders / "target", tmp_path / "bare")
    assert load_pair(folders / "target", tmp_path / "bare", tokenizer=folders / "target").eos == pair.eos


# ── docs/serving.md ───────────────────────────────────────────────────────────────────────────────


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("number", range(2))
def test_examples_run_as_they_stand(
    folders: Path,
    written: Callable[[str, int], str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:
    examples = blocks(DOCS, "python")
    assert len(examples) == 2
    run_example(examples[number], folders, monkeypatch)
    assert capsys.readouterr().out == written((folders / "prompt.txt").read_text(), 32) + "\n"


def test_the_example_of_the_readme_runs(
    folders: Path,
    written: Callable[[str, int], str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (example,) = blocks(ROOT / "README.md", "python")
    run_example(example, folders, monkeypatch)
    assert capsys.readouterr().out == written("Once upon a time", 64) + "\n"


def run_example(example: str, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folders)
    exec(compile(example, "example", "exec"), {"__name__": "__main__"})


def test_the_example_of_the_command_line_runs(
    corpus: Path, finished: Path, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (line,) = [line for block in blocks(DOCS, "sh") for line in block.splitlines() if " generate " in line]
    program, *arguments = shlex.split(line)
    assert program == "budgetdraft"
    monkeypatch.chdir(folders)
    Path("my.yaml").write_text(dump_config(toy_config(corpus, finished)))
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "[multi_view, chunk_topk budget 64, γ 4: acceptance " in done.output
    assert done.output.rstrip().endswith("same tokens]")


def test_links_within_the_page_and_the_repository_lead_somewhere() -> None:
    text = DOCS.read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", text, re.M)
    }
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links
    for link in links:
        if link.startswith("#"):
            assert link[1:] in headings, link
        elif not link.startswith("https://"):
            assert (DOCS.parent / link).is_file(), link
