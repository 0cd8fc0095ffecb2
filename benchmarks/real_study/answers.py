"""The answers that a study's target wrote, as one file that `labels.answers.written` takes.

    python -m benchmarks.real_study.answers runs/teach-0123456789ab docs/results/smollm2/answers.jsonl.xz \\
        --target SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study.runs import manifest
from pipeline.data.tokenizer import read_tokenizer
from pipeline.store.files import read_all
from pipeline.store.layout import ASKED, LABELS, TOKENIZER
from pipeline.store.rows import Prompt
from pipeline.train.target.written import (
    AnsweredPrompt,
    Writing,
    prompt_hash,
    vocabulary_hash,
    write_answers,
)

FILE = "answers.jsonl.xz"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_study.answers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "taught", type=Path, help="finished folder of stage teach, beside that of stage prepare"
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--target", required=True, help="what the file calls the target")
    given = parser.parse_args(arguments)
    print(f"{collect(given.taught, given.output, given.target)} prompts → {given.output}")


def collect(taught: Path, output: Path, target: str) -> int:
    """Write the file from the labels of finished stages; the number of its prompts.

    Answers that ended at once have no labels; they are put back as answers without tokens.
    """
    made = manifest(taught)["inputs"]
    prepare, asked = taught.parent / f"prepare-{made['prepare']}", made["labels"]["answers"]
    answers: dict[str, list[tuple[list[int], list[int]]]] = defaultdict(list)
    most = 0
    for tokens_L, prefix, supervised, best_A in labelled(taught / LABELS):
        most = len(best_A)
        count = supervised + (supervised < most)  # the EOS has no label
        text = tokens_L[prefix : prefix + count].tolist()
        answers[prompt_hash(tokens_L[:prefix])].append((text, [-1, *best_A[: count - 1].tolist()]))
    rows = []
    for prompt in read_all(prepare / ASKED, Prompt):
        found = answers[hashed := prompt_hash(prompt.tokens)]
        found += [([], [])] * (asked["per_prompt"] - len(found))
        texts, best = zip(*found, strict=True)
        rows.append(
            AnsweredPrompt(
                prompt=hashed,
                prompt_id=prompt.prompt_id,
                document_id=prompt.document_id,
                answers=list(texts),
                best=list(best),
            )
        )
    vocabulary = vocabulary_hash(read_tokenizer(prepare / TOKENIZER))
    writing = Writing(target=target, tokenizer=vocabulary, temperature=asked["temperature"], max_tokens=most)
    write_answers(output, writing, rows)
    return len(rows)


def labelled(labels: Path) -> Iterator[tuple[Any, int, int, Any]]:
    """Of every stored answer: tokens [L] behind the prompt's, how many those are, labels, arg-maxes [A]."""
    for file in sorted(labels.glob("answers-*.tokens.npy")):
        stem = file.name.removesuffix(".tokens.npy")
        arrays = (np.load(labels / f"{stem}.{name}.npy") for name in ("prefix", "supervised", "argmax"))
        for tokens_L, prefix, supervised, best_A in zip(np.load(file), *arrays, strict=True):
            yield tokens_L, int(prefix), int(supervised), best_A


if __name__ == "__main__":
    main()
