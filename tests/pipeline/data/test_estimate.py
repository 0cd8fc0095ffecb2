"""What is counted before it is read."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.axes import Place
from pipeline.data.estimate import estimate_prompts
from pipeline.data.sources.registry import make_readers
from tests.helpers.configs import config_with


def test_user_prompts_and_hub_data_are_counted_before_they_are_read(tmp_path: Path) -> None:
    """Prompts of the user go to the first context that holds them; of the hub nothing is known."""
    (tmp_path / "own.jsonl").write_text(
        "".join(json.dumps({"prompt": "word " * count}) + "\n" for count in (10, 12, 36, 900))
    )

    own = {"kind": "prompts", "name": "own", "files": ["own.jsonl"]}
    contexts = [{"name": "64", "tokens": 64}, {"name": "96", "tokens": 96}]
    sources = [own, {"kind": "pg19", "name": "books"}]
    config = config_with(data={"root": str(tmp_path), "contexts": contexts, "sources": sources})
    prompts, how = estimate_prompts(config, make_readers(config.data, 0), 300)
    assert prompts == {
        Place("own", "64"): 2, Place("own", "96"): 1, Place("books", "64"): 4, Place("books", "96"): 4,
    }  # fmt: skip
    assert how.startswith("estimate: ") and how.endswith("; on the hub at most: data.prompts")
