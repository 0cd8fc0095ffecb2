"""CONTRIBUTING counts its edits: a toy policy, data set, loss and draft source are added so, and used."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers.clock import patience
from tests.helpers.paths import ROOT


class Edit(NamedTuple):
    """Puts `new` behind the text `anchor`, which the file has once; a file without anchor is a new one.

    `named` is what CONTRIBUTING calls the place by.
    """

    file: str
    named: str
    anchor: str | None
    new: str


class Addition(NamedTuple):
    """A section of CONTRIBUTING, the edits that it asks for, and a program that uses what was added."""

    section: str
    edits: tuple[Edit, ...]
    use: str


POLICY = Addition(
    "Adding a KV policy",
    (
        Edit(
            "pipeline/kv/policies.py", "(keys_BHSD, queries_BHGWD, budget) -> indices_BHN",
            "Select = Callable[[Tensor, Tensor, int], Tensor]\n",
            """

def first_ones(keys_BHSD: Tensor, queries_BHGWD: Tensor, budget: int) -> Tensor:
    B, H, _, _ = keys_BHSD.shape
    return torch.arange(budget, device=keys_BHSD.device).expand(B, H, budget)
""",
        ),
        Edit(
            "pipeline/kv/policies.py", "POLICIES",
            "POLICIES: dict[str, Select] = {", '\n    "first_ones": first_ones,',
        ),
        Edit("pipeline/config/sweep.py", "Policy", "Policy = Literal[", '"first_ones", '),
    ),
    """
from pipeline.kv.policies import select
from pipeline.kv.views import view_of
from tests.helpers.models import VOCABULARY, random_tokens
from tests.helpers.pairs import make_pair, plain_tokens, rounds_of, tokens_of

config = tiny_config({"sweep.policies": ["first_ones"], "train.variants": [
    {"name": "multi_view", "budgets": {16: 1.0}, "policy": "first_ones"}]})
assert config.sweep.policies == ("first_ones",)
refuses({"sweep.policies": ["last_ones"]}, "first_ones")

keys = torch.randn(1, 2, 37, 4)
assert select("first_ones", keys, keys.unsqueeze(2), 16).tolist() == [[list(range(16))] * 2]
pair = make_pair(model(0), model(1), [random_tokens(1, 40)], view_of("first_ones", 16), 20)
(rounds,) = rounds_of(pair, 4, 16)
assert tokens_of(pair, [rounds]) == plain_tokens(pair, 16)
assert int(pair.drafter.cache.kept_B[0]) == 16
""",
)  # fmt: skip

DATA_SET = Addition(
    "Adding a data set",
    (
        Edit(
            "pipeline/data/sources/stanzas.py", "Reader", None,
            '''"""Files whose documents stand between empty lines, for evaluation alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.config.data import StanzasSource
from pipeline.data.documents import Document, Reader, Request, Shard
from pipeline.data.prompts import continuation_prompts
from pipeline.data.reading import BadRow, Table, local_path, must_be_file, text_problem
from pipeline.store.rows import Prompt


class StanzasReader(Reader[StanzasSource]):
    continues_text = True

    def shards(self) -> list[Shard]:
        path = local_path(self.source.path, self.root)
        must_be_file(path, "a text file of stanzas")
        return [Shard(self.source.name, "test", 0, (Table(str(path)),))]

    def documents(self, shard: Shard) -> Iterator[Document | BadRow]:
        path = shard.tables[0].path
        for index, text in enumerate(Path(path).read_text(encoding="utf-8").split("\\n\\n")):
            if problem := text_problem(text, 16):
                yield BadRow(path, index, *problem)
            else:
                name = f"{self.source.name}/{index}"
                yield Document(document_id=name, source=self.source.name, split="test", text=text)

    def prompts(self, documents: Iterable[Document], request: Request) -> list[Prompt]:
        return continuation_prompts(documents, request)
''',
        ),
        Edit(
            "pipeline/data/sources/registry.py", "import",
            "import Pg19Reader\n", "from pipeline.data.sources.stanzas import StanzasReader\n",
        ),
        Edit(
            "pipeline/data/sources/registry.py", "READERS",
            "READERS: dict[str, type[Reader[Any]]] = {", '\n    "stanzas": StanzasReader,',
        ),
        Edit(
            "pipeline/config/data.py", "Source",
            'description="wrap each prompt in the tokenizer\'s chat template")\n',
            """

class StanzasSource(Source):
    kind: Literal["stanzas"]
    use: tuple[Literal["test"], ...] = ("test",)
    path: str = Field(description="text file")
""",
        ),
        Edit("pipeline/config/data.py", "AnySource", "    TextSource | ", "StanzasSource | "),
    ),
    """
from pathlib import Path

from jobs.executors.inline import InlineExecutor
from jobs.stages.prepare import prepare
from pipeline.data.documents import Document
from pipeline.store.files import read_rows
from pipeline.store.rows import Prompt

Path("poem.txt").write_text("\\n\\n".join(["word after word " * 20, "short", "line upon line " * 20]))
source = {"kind": "stanzas", "name": "poem", "path": "poem.txt"}
text = {"kind": "text", "name": "code", "files": ["stanza.txt"], "use": ["train"]}
Path("stanza.txt").write_text("another text of other words, over and over\\n" * 200)
config = tiny_config({"storage": "runs", "data.sources": [text, source], "data.validation_prompts": 0,
    "data.max_bad_fraction": 0.5})
refuses({"data.sources": [source | {"kind": "stanza"}]}, "stanzas")
made = prepare(config, InlineExecutor(config))
(documents,) = made.path.glob("documents/poem-test-*.jsonl")
assert [row.document_id for row in read_rows(documents, Document)] == ["poem/0", "poem/2"]
prompts = read_rows(made.path / "prompts" / "test-poem-64.jsonl", Prompt)
assert {prompt.document_id for prompt in prompts} == {"poem/0", "poem/2"}
assert all(len(prompt.tokens) == 64 for prompt in prompts)
assert made.manifest["counts"]["rows"]["poem"]["bad"] == {"too short": 1}
""",
)  # fmt: skip

LOSS = Addition(
    "Adding a loss",
    (
        Edit(
            "pipeline/train/losses.py", "(scores, labels) -> loss_T",
            "    return labels.ids, labels.log_probs\n",
            """

def refusal(scores: Tensor | States, labels: TargetLabels) -> Tensor:
    return 1 - (-cross_entropy(scores, labels)).exp()
""",
        ),
        Edit("pipeline/train/losses.py", "LOSSES", '    "kl": kl,', '\n    "refusal": refusal,'),
        Edit("pipeline/config/train.py", "LossKind", "LossKind = Literal[", '"refusal", '),
    ),
    """
from pipeline.train.losses import LOSSES, States, TargetLabels

# It reads the arg-max alone, so that a config needs no labels.top_k for it.
variant = {"name": "multi_view", "budgets": {16: 1.0}, "full_loss": "refusal", "sparse_loss": "refusal"}
assert tiny_config({"train.variants": [variant]}).train.variants[0].full_loss == "refusal"
refuses({"train.variants": [variant | {"full_loss": "refuse"}]}, "refusal")

hidden, head = torch.randn(5, 8), torch.randn(11, 8)
labels = TargetLabels(torch.tensor([0, 3, 10, 7, 3]))
expected = 1 - (hidden @ head.T).double().softmax(-1)[torch.arange(5), labels.argmax]
for scores in (hidden @ head.T, States(hidden, head)):
    torch.testing.assert_close(LOSSES["refusal"](scores, labels).double(), expected, atol=1e-5, rtol=1e-5)
""",
)  # fmt: skip

DRAFT_SOURCE = Addition(
    "Adding a draft source",
    (
        Edit(
            "pipeline/decode/sources.py", "DraftSource",
            "dtype=torch.float), sure_BTV, lengths)\n",
            '''

class RepeatDrafts(DraftSource):
    """Proposes the last token again and again."""

    name = "repeat"

    def __init__(
        self, prompts: Sequence[Sequence[int]], room: int, num_tokens: int, device: torch.device | str = "cpu"
    ) -> None:
        self.num_tokens = num_tokens

    def check_room(self, needed: int) -> None:
        return None

    def propose(
        self, sampler: Sampler, gamma: int, unread_BQ: Tensor, step_B: Tensor, open_rows: Sequence[bool]
    ) -> Proposals:
        tokens_BT = unread_BQ[:, -1:].repeat(1, gamma)
        sure_BTV = None if sampler.rule.greedy else F.one_hot(tokens_BT, self.num_tokens).float()
        return Proposals(tokens_BT, torch.zeros_like(tokens_BT, dtype=torch.float), sure_BTV)
''',
        ),
        Edit(
            "pipeline/decode/sources.py", "SOURCES",
            '{"prompt_lookup": LookupDrafts', ', "repeat": RepeatDrafts',
        ),
        Edit("pipeline/axes.py", "ModelFree", "ModelFree = Literal[", '"repeat", '),
    ),
    """
from pathlib import Path

from jobs.stages.sweep import located
from pipeline.axes import NOTHING
from pipeline.results.pool import replay_check
from pipeline.store.files import read_all
from pipeline.store.rows import PromptRow
from pipeline.sweep.evaluator import Evaluator
from pipeline.sweep.grid import draft_sources
from tests.helpers.sweeps import CPU, SWEEP, SweepBench

config = tiny_config(SWEEP | {"sweep.baselines": ["repeat"]})
refuses({"sweep.baselines": ["repeats"]}, "repeat")
refuses({"train.variants": [{"name": "repeat", "budgets": {16: 1.0}}]}, "choose another name")

bench = SweepBench(Path("bench"), {"target": model(0), "drafter": model(1)})
tokenizer = bench.prepare / "tokenizer"
sources = [located(config, {}, {}, one) for one in draft_sources(config) if one.baseline]
evaluator = Evaluator(config, bench.refs["target"], sources, tokenizer, CPU)
evaluator(bench.replay_task(Path("out")))
evaluator(bench.measure_task(evaluator, Path("out"), last=2))
rows = read_all(Path("out/rows"), PromptRow)
assert {(row.cell.kind, row.mode, row.cell.view) for row in rows} == {
    ("repeat", "replay", NOTHING), ("repeat", "measure", NOTHING)}
assert all(row.timing.exact for row in rows if row.mode == "measure")
check = replay_check(rows)
assert check.rows == check.equal > 0
""",
)  # fmt: skip

PRELUDE = """
import os
os.environ["TRITON_INTERPRET"] = "1"

import torch
from pydantic import ValidationError
from pipeline.config.models import ScratchModel
from pipeline.models.build import build_scratch
from tests.helpers.configs import SCRATCH
from tests.helpers.models import FakeTokenizer, sharpen
from tests.helpers.tiny import tiny_config


def model(seed):
    return sharpen(build_scratch(ScratchModel.model_validate(SCRATCH), FakeTokenizer(), seed)).eval()


def refuses(changes, part):
    try:
        tiny_config(changes)
    except ValidationError as error:
        assert part in str(error), error
    else:
        raise AssertionError(f"{changes} was taken")
"""


def asked_for(section: str) -> list[tuple[str, str]]:
    """File and text of every numbered edit of a section of CONTRIBUTING."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    body = re.search(rf"^## {re.escape(section)}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert body, f"CONTRIBUTING has no section {section!r}"
    return re.findall(r"^\d+\. `([^`]+)`: (.*)$", body[1], re.MULTILINE)


def apply(edit: Edit, code: Path) -> None:
    file = code / edit.file
    if edit.anchor is None:
        assert not file.exists()
        file.write_text(edit.new, encoding="utf-8")
        return
    before, *behind = file.read_text(encoding="utf-8").split(edit.anchor)
    assert len(behind) == 1, f"{edit.file} has {edit.anchor!r} {len(behind)} times"
    file.write_text(before + edit.anchor + edit.new + behind[0], encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("added", [POLICY, DATA_SET, LOSS, DRAFT_SOURCE], ids=lambda added: added.section)
def test_what_is_added_as_contributing_says_works(added: Addition, tmp_path: Path) -> None:
    asked = asked_for(added.section)
    files = [file.replace("<name>", "stanzas") for file, _ in asked]
    assert files == [edit.file for edit in added.edits]
    for (_, text), edit in zip(asked, added.edits, strict=True):
        assert edit.named in text, f"{added.section}: {text!r} does not name {edit.named}"

    for package in ("pipeline", "kernels", "jobs", "tests/helpers"):
        leave = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=leave)
    for edit in added.edits:
        apply(edit, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + added.use],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=patience(240),
    )
    assert done.returncode == 0, done.stderr[-4000:]
