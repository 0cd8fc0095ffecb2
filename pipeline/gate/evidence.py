"""What one drafter did on every prompt, with all that decides whether it may be compared with another.

It is read out of a finished report folder and its neighbours in the storage, and travels as `evidence.json`
and `rows.jsonl.gz`, so that a drafter can be judged where its storage is not at hand.
"""

from __future__ import annotations

import gzip
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.config.data import Split
from pipeline.config.models import PretrainedModel
from pipeline.errors import BadData
from pipeline.results.summary import Summary, read_summary
from pipeline.store.artifacts import Artifact
from pipeline.store.files import atomic_path, file_sha256, fingerprint, read_rows, write_text
from pipeline.store.layout import MODEL, SUMMARY
from pipeline.store.rows import Prompt, PromptRow, Row

EVIDENCE, EVIDENCE_ROWS = "evidence.json", "rows.jsonl.gz"
# It names files and library versions; which tokens a text gives is decided by the other tokenizer files.
NOT_CONTENT = "tokenizer_config.json"
# Keys of config.json about how the model was saved, not about the model; keys that begin with _ are too.
NOT_THE_MODEL = {"transformers_version", "dtype", "torch_dtype", "use_cache"}


class Evidence(Row):
    """One drafter's rows of the test prompts: every mode and control, as the sweep wrote them.

    `target` is a fingerprint of the target's weights, config, precision and tokenizer, `prompts` one of the
    test prompts' tokens: two drafters are comparable prompt by prompt where both are equal, whatever data
    they were trained on. `hardware` says what measured rows were timed on; it is "" where nothing was timed,
    and names the sweep where the sweep did not note it. `config` is the name of the config of the run that
    made the report, `budgets` those that the drafter saw in training, none if it was not trained.
    """

    drafter: str
    target: str
    prompts: str
    hardware: str
    config: str
    budgets: list[int | Literal["full"]]
    rows: list[PromptRow]


@dataclass(frozen=True)
class Results:
    """A finished report, with the artifacts that one of its drafters came from."""

    report: Artifact
    sweep: Artifact
    prepare: Artifact
    name: str
    drafter: Artifact
    summary: Summary


def open_results(results: Path, drafter: str | None = None) -> Results:
    """The artifacts behind a report.

    Args:
        results: a report folder, or its `summary.json`; the other artifacts lie beside the folder.
        drafter: a trained drafter of its sweep; default: the last one.

    Raises:
        BadData: if the folder is no finished report, the sweep has failures or other rows by now, or there is
            no such drafter.
    """
    folder = results.parent if results.is_file() else results
    folder = folder.resolve()
    stage, _, digest = folder.name.partition("-")
    if stage != "report" or not (folder / SUMMARY).exists():
        raise BadData(f"{results} is not a finished report: name a report folder, such as runs/report-…")
    report = Artifact(folder, stage, digest)
    summary = read_summary(folder / SUMMARY)
    made = manifest(report)["inputs"]
    sweep = beside(report, "sweep", made["sweep"])
    inputs = manifest(sweep)["inputs"]
    teach = beside(report, "teach", inputs["teach"])
    prepare = prepared(report, summary, manifest(teach)["inputs"]["prepare"])
    if made["rows"] != {name: known["sha256"] for name, known in manifest(sweep)["files"].items()
                        if name in made["rows"]}:  # fmt: skip
        raise BadData(f"{sweep.path} has other rows than {folder} was made of: use a newer report")
    names = list(inputs["drafters"])
    name = names[-1] if drafter is None else drafter
    if name not in names:
        raise BadData(f"{folder} has no trained drafter {name!r}; there are {', '.join(names)}")
    return Results(
        report, sweep, prepare, name, beside(report, f"drafter-{name}", inputs["drafters"][name]), summary
    )


def read_evidence(results: Path, drafter: str | None = None) -> Evidence:
    """The evidence for one drafter of a finished report; arguments and errors as of `open_results`.

    Reads and hashes the target's weights; a target of the hub that is not in this machine's cache is
    downloaded.

    Raises:
        BadData: also if a file that is read is not the one that was made.
    """
    return evidence_of_results(open_results(results, drafter))


def evidence_of_results(results: Results) -> Evidence:
    files = sound_files(results.sweep, "rows/")
    rows = [
        row for name in files for row in read_rows(results.sweep.path / name, PromptRow)
        if row.cell.drafter == results.name
    ]  # fmt: skip
    timings = [row.timing for row in rows if row.timing]
    unnoted = f"not noted by {results.sweep.path.name}"
    hardware = sorted({timing.hardware or unnoted for timing in timings})
    return Evidence(
        drafter=results.name,
        target=target_fingerprint(results),
        prompts=prompts_fingerprint(results.prepare),
        hardware="; ".join(hardware),
        config=results.summary.config,
        budgets=trained_budgets(manifest(results.drafter)["inputs"]),
        rows=rows,
    )


def target_fingerprint(results: Results) -> str:
    """A fingerprint of all that decides the target's texts: weights, config, precision, tokenizer."""
    known = manifest(results.sweep)["inputs"]["target"]
    if isinstance(known, str):
        scratch = beside(results.report, "pretrain-target", known)
        spec = manifest(scratch)["inputs"]["model"]
        folder, weights = scratch.path / MODEL, weights_of(scratch)
    else:
        from pipeline.models.hub import model_folder
        from pipeline.models.load import model_ref  # imports torch

        spec = known["model"]
        # It was checked when it was run, perhaps by a version that asked for less.
        folder = model_folder(model_ref(PretrainedModel.model_construct(**spec), None))
        for name, (size, changed) in known["files"].items():
            file = folder / name
            if not file.exists() or [file.stat().st_size, file.stat().st_mtime_ns] != [size, changed]:
                raise BadData(f"{file} is not the one that the sweep was made with: run the pipeline again")
        weights = {file.name: file_sha256(file) for file in sorted(folder.glob("*.safetensors"))}
    tokenizer = sound_files(results.prepare, "tokenizer/")
    tokenizer = {name: digest for name, digest in tokenizer.items() if Path(name).name != NOT_CONTENT}
    settings = {"dtype": spec["dtype"], "rope_scaling": spec["rope_scaling"]}
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadData(f"{folder / 'config.json'} is not JSON ({error}): run the pipeline again") from None
    model = {key: saved[key] for key in saved.keys() - NOT_THE_MODEL if not key.startswith("_")}
    return fingerprint({"weights": weights, "model": model, "tokenizer": tokenizer, **settings})


def weights_of(model: Artifact) -> dict[str, str]:
    """A trained model's files of weights → SHA-256; errors as of `sound_files`."""
    files = sound_files(model, "model/")
    return {Path(name).name: digest for name, digest in files.items() if name.endswith(".safetensors")}


def prompts_fingerprint(prepare: Artifact, split: Split = "test") -> str:
    """A fingerprint of a split's prompts: names, documents, tokens and limits of their continuations."""
    names = [name for name in sound_files(prepare, f"prompts/{split}-") if name.endswith(".jsonl")]
    prompts = [prompt for name in sorted(names) for prompt in read_rows(prepare.path / name, Prompt)]
    fields = {"prompt_id", "document_id", "dataset", "context", "tokens", "max_new_tokens"}
    return fingerprint([prompt.model_dump(include=fields) for prompt in prompts])


def trained_budgets(inputs: dict[str, Any]) -> list[int | Literal["full"]]:
    """The budgets that a drafter saw in training, from the inputs in its manifest."""
    variant, train = inputs["variant"], inputs["train"]
    steps = train["steps"] if variant["steps"] is None else variant["steps"]
    if not steps:
        return []
    budgets: list[int | Literal["full"]] = []
    if variant["sparse_weight"]:
        budgets += sorted(map(int, variant["budgets"]))
    if variant["full_weight"]:
        budgets.append("full")
    return budgets


def beside(artifact: Artifact, stage: str, digest: str) -> Artifact:
    """Another artifact of the same storage."""
    return Artifact(artifact.path.parent / f"{stage}-{digest}", stage, digest)


def prepared(report: Artifact, summary: Summary, digest: str) -> Artifact:
    """The prepared data, which may lie outside of the storage."""
    # Reports of earlier versions do not say where it is; theirs lies beside them.
    folder = report.path / (summary.prepared or f"../prepare-{digest}")
    artifact = Artifact(folder.resolve(), "prepare", digest)
    if manifest(artifact)["fingerprint"] != digest:
        raise BadData(f"{artifact.path} is not the prepared data that {report.path} was made with")
    return artifact


def manifest(artifact: Artifact) -> dict[str, Any]:
    """Raises BadData if the artifact is not complete."""
    try:
        return artifact.manifest
    except ValueError as error:
        raise BadData(str(error)) from None


def sound_files(artifact: Artifact, beginning: str) -> dict[str, str]:
    """The files of an artifact whose names start with `beginning` → SHA-256.

    Raises:
        BadData: if one of them is not as its manifest has it.
    """
    files = {
        name: known["sha256"]
        for name, known in manifest(artifact)["files"].items()
        if name.startswith(beginning)
    }
    for name, digest in files.items():
        file = artifact.path / name
        if not file.is_file() or file_sha256(file) != digest:
            raise BadData(f"{file} is damaged or missing: run the pipeline again, which repairs it")
    return files


def save_evidence(evidence: Evidence, folder: Path) -> None:
    """Write `evidence.json` and `rows.jsonl.gz`; the same evidence gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(row.model_dump_json() + "\n" for row in evidence.rows)
    with atomic_path(folder / EVIDENCE_ROWS) as temporary:
        temporary.write_bytes(gzip.compress(lines.encode(), mtime=0))
    write_text(folder / EVIDENCE, evidence.model_dump_json(exclude={"rows"}, indent=2) + "\n")


def load_evidence(folder: Path) -> Evidence:
    """What `save_evidence` wrote.

    Raises:
        BadData: if the files are missing, torn, or of another version.
    """
    try:
        with gzip.open(folder / EVIDENCE_ROWS, "rt", encoding="utf-8") as file:
            rows = [PromptRow.model_validate_json(line) for line in file]
        facts = json.loads((folder / EVIDENCE).read_text(encoding="utf-8"))
        return Evidence.model_validate({**facts, "rows": rows})
    except (OSError, EOFError, ValueError, TypeError, RecursionError, zlib.error) as error:
        raise BadData(f"{folder} holds no whole evidence of this version: {error}") from None
