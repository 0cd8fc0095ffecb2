"""`budgetdraft plan`: what a config will cost, and whether it fits, before anything runs."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from jobs.executor import NoExecutor, read_settings
from jobs.pipeline import settled
from jobs.prepare import prepare
from jobs.teach import label_bytes, label_tasks
from pipeline import costs
from pipeline.artifacts import Artifact
from pipeline.cells import Drafter, chosen_drafter, configured_picks, draft_lengths, view_cells
from pipeline.config import AnyModel, AnySource, Config, ScratchModel
from pipeline.costs import Device, Memory, Shape, Sharding
from pipeline.data.reading import looks_local
from pipeline.data.sources import make_readers
from pipeline.errors import BadData
from pipeline.models import build_scratch, pick_device
from pipeline.teacher import LabelTask, smallest_uint

GB = 1e9
COMPRESSED, EXPANSION = {".gz", ".parquet", ".zip"}, 2.5  # text in files of these kinds, to its size there
NO_CAP = 1_000_000_000  # the default of data.max_sequences and labels.max_sequences
# Resident bytes of imports that a plan does without, measured on Linux with the pinned versions.
MLFLOW_BYTES, RAY_BYTES, INDUCTOR_BYTES = 100_000_000, 70_000_000, 100_000_000
CUDA_BYTES = 600_000_000  # context and cuBLAS workspaces of one process
TIMED_TOKENS = 2048  # of the sequence that a scratch model is timed on
TIMED_RUNS = 3
# What to lower where a stage does not fit, in the order in which it is tried.
FIELDS = {
    "pretrain": ("train.micro_batch_sequences", "{role}.pretrain.sequence_tokens", "data.sequence_tokens"),
    "teach": ("labels.batch_sequences", "data.sequence_tokens"),
    "train": ("train.micro_batch_sequences", "train.max_logits_mib", "train.windows", "data.sequence_tokens"),
    "sweep": ("sweep.measure.prompts_together", "decode.prefill_chunk", "data.max_new_tokens"),
}


@dataclass(frozen=True)
class Amount:
    """A figure of the table: `how` says exact, at most, or what it is estimated from."""

    name: str
    value: float
    unit: str
    how: str


@dataclass(frozen=True)
class Facts:
    """What is known of the data: from the manifest of stage prepare, or estimated."""

    prepared: Artifact | None
    sequences: int
    labelled: int
    prompts: dict[str, int]  # by the name of the prompts file
    vocab: int
    how: str

    def prompts_of(self, config: Config, context: str) -> list[int]:
        """Test prompts at a context, by data set."""
        names = [f"test-{source.name}-{context}.jsonl" for source in config.data.sources]
        return [self.prompts[name] for name in names if name in self.prompts]


class _Unprepared(Exception):
    """Stage prepare has work left."""


class _Nothing(NoExecutor):
    def _refuse(self, what: str) -> NoReturn:
        raise _Unprepared


def plan(config: Config, as_json: bool, memory_gb: float | None, tflops: float | None) -> None:
    """Print what every stage takes.

    Args:
        memory_gb: memory of the device in 10^9 bytes; default: that of `run.device` here.
        tflops: effective TFLOP/s of the device; default: measured, where both models are scratch models.

    Raises:
        BadData: if an input is missing, a model's config is not on disk, or something does not fit; the text
            names the field.
    """
    config = settled(config)
    shapes = {role: shape_of(config, role) for role in ("target", "drafter")}
    facts = facts_of(config, shapes["target"].vocab)
    shapes = {role: shape_of(config, role, facts.vocab) for role in shapes}
    device = device_of(config)
    peaks = memory(config, shapes, facts, device)
    amounts = [
        *data_amounts(config, facts),
        *disk_amounts(config, shapes, facts),
        *row_amounts(config, facts),
    ]
    hours, rates = hours_of(config, shapes, facts, tflops)
    limit = int(memory_gb * GB) if memory_gb else device_memory(device.kind)
    problems = disk_problems(config, amounts)
    problems += memory_problems(config, shapes, facts, device, limit)
    document = {
        "config": config.name,
        "device": device.kind,
        "memory_limit_bytes": limit,
        "amounts": [asdict(amount) for amount in amounts],
        "memory": [{**asdict(peak), "each": peak.each, "total": peak.total} for peak in peaks],
        "hours": hours,
        "rates": rates,
        "problems": problems,
    }
    print(
        json.dumps(document, indent=2) if as_json else "\n".join(table(document, peaks, amounts)), flush=True
    )
    if problems:
        raise BadData("; ".join(problems))


# ── what is known ─────────────────────────────────────────────────────────────────────────────────


def shape_of(config: Config, role: str, vocab: int | None = None) -> Shape:
    """A model's shape; `vocab` is the tokenizer's, which a scratch model takes for its own."""
    spec: AnyModel = getattr(config, role)
    if isinstance(spec, ScratchModel):
        if vocab is None and config.data.tokenizer.kind == "target":
            vocab = shape_of(config, "target").vocab
        return costs.scratch_shape(spec, vocab or config.data.tokenizer.vocab_size)
    from huggingface_hub import try_to_load_from_cache
    from transformers import AutoConfig, AutoModelForCausalLM

    file: object = Path(spec.path) / "config.json"
    if not Path(spec.path).is_dir() and spec.path.count("/") == 1:
        file = try_to_load_from_cache(spec.path, "config.json", revision=spec.revision)
    if not isinstance(file, str | Path) or not Path(file).exists():
        raise BadData(
            f"{role}.path = {spec.path}: its config.json is not on this machine. Download it "
            f"(`hf download {spec.path} config.json`) or name a local folder in {role}.path"
        )
    try:
        given = AutoConfig.from_pretrained(Path(file).parent, trust_remote_code=spec.trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(given, trust_remote_code=spec.trust_remote_code)
        return costs.pretrained_shape(given, sum(weight.numel() for weight in model.parameters()))
    except (OSError, ValueError, AttributeError) as error:
        raise BadData(f"{role}.path = {spec.path}: its config.json cannot be used: {error}") from error


def facts_of(config: Config, vocab: int) -> Facts:
    """Exact counts of a complete stage prepare; else estimates.

    Raises:
        BadData: if a local source is missing.
    """
    prepared: Artifact | None = None
    data = config.data
    try:
        prepared = prepare(config, _Nothing())
    except _Unprepared:
        pass
    except BadData:
        if not any(on_hub(config, source) for source in data.sources):
            raise
    if prepared is not None:
        from transformers import AutoTokenizer

        counts = prepared.manifest["counts"]
        labelled = sum(t.last - t.first for t in label_tasks(config, prepared) if isinstance(t, LabelTask))
        tokens = len(AutoTokenizer.from_pretrained(prepared.path / "tokenizer"))
        return Facts(prepared, counts["sequences"], labelled, counts["prompts"], tokens, "exact")
    sequences, how = estimate_sequences(config, vocab)
    prompts = {
        f"test-{source.name}-{context.name}.jsonl": data.prompts
        for source in data.sources
        if "test" in source.use
        for context in data.contexts
    }
    return Facts(None, sequences, min(sequences, config.labels.max_sequences), prompts, vocab, how)


def on_hub(config: Config, source: AnySource) -> bool:
    """Whether a source is read from the hub, so that nothing is known of its size."""
    path = getattr(source, "path", None)
    return path is not None and not looks_local(path, Path(config.data.root))


def estimate_sequences(config: Config, vocab: int) -> tuple[int, str]:
    """Training sequences by the sizes of the local source files, and what that rests on."""
    data = config.data
    # A vocabulary's entries hold about log2(V) / 4 bytes of text: 2.2 at 512, 2.8 at 2K, 4.2 at 128K.
    per_token = math.log2(vocab) / 4
    tokens = 0.0
    readers = make_readers(data, config.seed)
    for reader in readers.values():
        source = reader.source
        if "train" not in source.use:
            continue
        if on_hub(config, source):
            if data.max_sequences < NO_CAP:
                return data.max_sequences, f"assumed: data.max_sequences, as {source.name} is on the hub"
            wanted = config.train.steps * config.train.batch_sequences
            return wanted, f"assumed: what train.steps read, as {source.name} is on the hub and no cap is set"
        paths = {
            table.path
            for shard in reader.shards()
            if shard.split in (None, "train")
            for table in shard.tables
        }
        share = 1.0
        if source.kind == "text":
            share -= source.validation_fraction * ("validation" in source.use)
            share -= source.test_fraction * ("test" in source.use)
        for path in paths:
            text = os.path.getsize(path) * (EXPANSION if Path(path).suffix in COMPRESSED else 1)
            # What is left at the end of a document is not used; files of text are documents.
            found = text / per_token / data.sequence_tokens
            tokens += share * (math.floor(found) if source.kind == "text" else found)
    return min(int(tokens), data.max_sequences), f"estimate: file sizes at {per_token:.2f} bytes a token"


# ── what it takes ─────────────────────────────────────────────────────────────────────────────────


def data_amounts(config: Config, facts: Facts) -> Iterator[Amount]:
    length = config.data.sequence_tokens
    yield Amount("training sequences", facts.sequences, "", facts.how)
    yield Amount("training tokens", facts.sequences * length, "", facts.how)
    yield Amount("labelled sequences", facts.labelled, "", facts.how)
    for name, count in sorted(facts.prompts.items()):
        if name.startswith("test-"):
            label = name.removeprefix("test-").removesuffix(".jsonl")
            yield Amount(
                f"prompts {label}", count, "", "exact" if facts.prepared else "at most: data.prompts"
            )


def disk_amounts(config: Config, shapes: dict[str, Shape], facts: Facts) -> Iterator[Amount]:
    """Labels; models in fp32 and, of those that are trained, the last checkpoint with AdamW's moments."""
    if facts.prepared:
        size = label_bytes(config, facts.labelled, facts.prepared)
    else:
        entry = torch.tensor(0).numpy().astype(smallest_uint(facts.vocab)).itemsize
        per_token = 2 * entry + config.labels.top_k * (entry + 2)
        size = facts.labelled * config.data.sequence_tokens * per_token
    yield Amount("labels on disk", size, "B", facts.how)
    for role, shape in shapes.items():
        spec: AnyModel = getattr(config, role)
        if isinstance(spec, ScratchModel):
            copies = 4 if spec.pretrain.steps else 1
            yield Amount(f"scratch {role} on disk", 4 * shape.parameters * copies, "B", "estimate: 4 B × N")
    trained = [config.train.steps if v.steps is None else v.steps for v in config.train.drafters]
    models = sum(4 if steps else 1 for steps in trained)
    size = 4 * shapes["drafter"].parameters * models
    yield Amount("drafters on disk", size, "B", "estimate: 4 B × N, 12 B × N a checkpoint")


def row_amounts(config: Config, facts: Facts) -> Iterator[Amount]:
    replayed, measured = sweep_rows(config, facts)
    yield Amount("rows of replay", replayed, "", "at most")
    how = "at most, and what predictions point at" if config.sweep.predicts else "at most"
    yield Amount("rows measured", measured, "", how)
    runs = math.ceil(measured / config.sweep.measure.prompts_together) * config.sweep.measure.repeats
    yield Amount("timed runs", runs, "", how)


def draft_sources(config: Config) -> list[Drafter]:
    """What the sweep evaluates: the chosen drafters, then baselines."""
    chosen = [d.name for d in config.train.drafters if chosen_drafter(d.name, config.sweep.drafters)]
    baselines = [Drafter(name, None, 0, name) for name in config.sweep.baselines]
    return [Drafter(name, None, 0) for name in chosen] + baselines


def sampling(config: Config) -> int:
    """How often a prompt is continued by sampling: temperatures above 0, each with all seeds."""
    return sum(temperature > 0 for temperature in config.sweep.temperatures) * len(config.sweep.seeds)


def sweep_rows(config: Config, facts: Facts) -> tuple[int, int]:
    """Rows of replay and of measuring, one a prompt, cell and text: drafters × views × lengths × chances.

    At most: a prompt whose continuation ends at once has none, and none has `other_prompt` where there is no
    other document. Thresholds are replayed on greedy text only. What is measured because of its predicted
    speed (sweep.measure.predict, .plane) comes on top.
    """
    sweep, sources = config.sweep, draft_sources(config)
    greedy, sampled = 0.0 in sweep.temperatures, sampling(config)
    replayed = measured = 0
    for context in config.data.contexts:
        prompts = facts.prompts_of(config, context.name)
        for source in sources:
            lengths = draft_lengths(sweep, context.name, source)
            fixed = [length for length in lengths if not length.threshold]
            texts = greedy * len(lengths) + sampled * len(fixed)
            replayed += sum(prompts) * len(view_cells(sweep, source)) * texts
        timed = sum(min(count, sweep.measure.prompts) for count in prompts)
        measured += timed * (greedy + sampled) * len(configured_picks(sweep, sources, context.name))
    return replayed * (sweep.mode != "measure"), measured * (sweep.mode != "replay")


def device_of(config: Config) -> Device:
    """The device of `run.device`, and what a process takes before its work: imports and a first small step.

    Without the GPU that the config names, its costs are those of a GPU all the same.
    """
    kind = "cuda" if config.run.device == "cuda" else pick_device(config.run.device).type
    if kind == "cuda":
        return Device(kind, CUDA_BYTES)
    small = ScratchModel.model_validate(
        {"kind": "scratch", "layers": 1, "hidden": 32, "heads": 2, "kv_heads": 2, "intermediate": 64,
         "max_positions": 64, "pretrain": {"steps": 1}}
    )  # fmt: skip
    timed_step(small, 300, 32, "cpu")
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    imports = RAY_BYTES if config.run.executor == "ray" else MLFLOW_BYTES * config.tracking.enabled
    return Device(kind, resident + imports)


def memory(config: Config, shapes: dict[str, Shape], facts: Facts, device: Device) -> list[Memory]:
    """The peak of every stage that does something; of training, that of the largest variant."""
    train, sweep, ray = config.train, config.sweep, config.run.executor == "ray"
    sharding = Sharding()
    if ray:
        sharding = costs.sharding_of(read_settings(train.deepspeed), train.num_workers)
    workers = at_once(config, device, train.num_workers)
    peaks = [
        replace(costs.pretrain_memory(config, role, shape, sharding, device), processes=workers)
        for role, shape in shapes.items()
        if isinstance(spec := getattr(config, role), ScratchModel) and spec.pretrain.steps
    ]
    label_batch = config.labels.batch_sequences
    prompt_batch = min(label_batch, max(facts.prompts.values()))
    if facts.prepared:
        tasks = [t for t in label_tasks(config, facts.prepared) if isinstance(t, LabelTask)]
        label_batch = min(label_batch, max((t.last - t.first for t in tasks), default=1))
    taught = costs.teach_memory(config, shapes["target"], label_batch, prompt_batch, device)
    peaks.append(replace(taught, processes=at_once(config, device, config.labels.num_workers)))
    variants = [v for v in train.drafters if (train.steps if v.steps is None else v.steps)]
    steps = sum(train.steps if v.steps is None else v.steps for v in variants)
    trained = [costs.train_memory(config, v, steps, shapes["drafter"], sharding, device) for v in variants]
    if trained:
        peaks.append(replace(max(trained, key=lambda peak: peak.each), processes=workers))
    trained_sources = [source for source in draft_sources(config) if source.baseline is None]
    picks = [p for c in config.data.contexts for p in configured_picks(sweep, trained_sources, c.name)]
    swept = costs.sweep_memory(
        config,
        shapes["target"],
        shapes["drafter"],
        len(trained_sources),
        len({pick.drafter for pick in picks}),
        [cell.budget for cell in view_cells(sweep, trained_sources[0])],
        list({pick.cell.budget for pick in picks}),
        device,
    )
    if config.decode.compile != "none" and sweep.mode != "replay":
        swept = replace(swept, base=swept.base + INDUCTOR_BYTES)
    return [*peaks, swept]


def at_once(config: Config, device: Device, workers: int) -> int:
    """Processes of a stage on one device: on a CPU they share the machine, on GPUs by what they ask for."""
    if config.run.executor == "inline":
        return 1
    share = config.run.gpus_per_task
    return workers if device.kind == "cpu" else min(workers, int(1 / share) if 0 < share < 1 else 1)


# ── how long ──────────────────────────────────────────────────────────────────────────────────────


class _Vocabulary:
    """Stands in for a tokenizer of so many entries where a model is built to be timed."""

    bos_token_id = eos_token_id = pad_token_id = None

    def __init__(self, entries: int) -> None:
        self.entries = entries

    def __len__(self) -> int:
        return self.entries


def timed_step(
    spec: ScratchModel, vocab: int, tokens: int, device: str, bfloat16: bool = False
) -> dict[bool, float]:
    """Seconds of one sequence forward alone (False) and of a whole training step (True), the best run.

    On a CPU they are seconds of one thread's own time: what else runs on the machine does not count.
    """
    model = build_scratch(spec, _Vocabulary(vocab), 0).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens_1S = torch.zeros(1, tokens, dtype=torch.long, device=device)
    clock = time.process_time if device == "cpu" else time.perf_counter

    def step(training: bool) -> None:
        half = torch.autocast(device, torch.bfloat16, enabled=bfloat16 and training)
        with torch.set_grad_enabled(training), half:
            logits = model(input_ids=tokens_1S, use_cache=False).logits
        if training:
            logits.float().logsumexp(-1).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    seconds = {False: math.inf, True: math.inf}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for training in [False, True] * TIMED_RUNS:
        began = clock()
        step(training)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds[training] = min(seconds[training], clock() - began)
    torch.set_num_threads(threads)
    return seconds


def hours_of(
    config: Config, shapes: dict[str, Shape], facts: Facts, tflops: float | None
) -> tuple[dict[str, float] | None, str]:
    """Device-hours by stage, and where the rates come from; None where they cannot be known."""
    prompts = {c.name: sum(facts.prompts_of(config, c.name)) for c in config.data.contexts}
    sources = [source for source in draft_sources(config) if source.baseline is None]
    views = sum(len(view_cells(config.sweep, source)) for source in sources) * (1 + sampling(config))
    samples = sampling(config)
    work = costs.work(
        config, shapes["target"], shapes["drafter"], facts.labelled, prompts, samples, len(sources), views
    )
    kind = config.run.device if config.run.device != "auto" else pick_device("auto").type
    specs: dict[str, AnyModel] = {role: getattr(config, role) for role in shapes}
    if tflops:
        rate: Callable[[str, bool], float] = lambda role, training: tflops * 1e12  # noqa: E731
        how = f"estimate: FLOPs at the given {tflops:g} TFLOP/s"
    elif all(isinstance(s, ScratchModel) for s in specs.values()) and (
        kind == "cpu" or torch.cuda.is_available()
    ):
        measured = {}
        own = config.run.cpus_per_task if config.run.executor == "ray" else torch.get_num_threads()
        threads = max(1, int(own)) if kind == "cpu" else 1
        for role, spec in specs.items():
            assert isinstance(spec, ScratchModel)
            length = min(config.data.sequence_tokens, TIMED_TOKENS)
            flops = shapes[role].forward_flops(length, length / 2)
            bfloat16 = config.train.dtype == "bfloat16"
            for training, seconds in timed_step(spec, shapes[role].vocab, length, kind, bfloat16).items():
                measured[role, training] = threads * flops * (3 if training else 1) / seconds
        rate = lambda role, training: measured[role, training]  # noqa: E731
        how = f"estimate: FLOPs at rates measured here, of a process with {threads} threads: " + ", ".join(
            f"{role} {'training' if training else 'forward'} {value / 1e12:.3g} TFLOP/s"
            for (role, training), value in measured.items()
        )
    else:
        return None, "not known: give --tflops X, the effective TFLOP/s of the device"
    hours: dict[str, float] = {}
    for part in work:
        hours[part.stage] = hours.get(part.stage, 0) + part.flops / rate(part.role, part.training) / 3600
    return hours, how


# ── what does not fit ─────────────────────────────────────────────────────────────────────────────


def device_memory(kind: str) -> int | None:
    """Bytes of the device here: of the GPU, or of the machine; None for a GPU that is not here."""
    if kind == "cuda":
        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def disk_problems(config: Config, amounts: list[Amount]) -> list[str]:
    folder = Path(config.storage)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    needed = sum(amount.value for amount in amounts if amount.unit == "B")
    if needed <= free:
        return []
    return [
        f"labels, models and checkpoints need {needed / GB:.1f} GB, and {free / GB:.1f} GB are free in "
        f"{folder}: lower labels.max_sequences or labels.top_k, or set storage"
    ]


def memory_problems(
    config: Config, shapes: dict[str, Shape], facts: Facts, device: Device, limit: int | None
) -> list[str]:
    """One line for each stage that needs more than `limit`, with the first field whose change helps."""
    problems = []
    for place, peak in enumerate(memory(config, shapes, facts, device)):
        if limit is None or peak.total <= limit:
            continue
        stage, _, role = peak.stage.partition(" ")
        fields = [field.format(role=role) for field in FIELDS[stage]]
        advice = f"none of {', '.join(fields)} alone makes it fit; a smaller model or more memory would"
        for field, changed in ((f, c) for f in fields for c in lowered(config, f)):
            value, other = changed
            after = memory(other, shapes, replace(facts, prepared=None), device)[place]
            if after.total <= limit:
                advice = f"set {field}={value}, with which it takes {after.total / GB:.1f} GB"
                break
        problems.append(
            f"stage {peak.stage} needs {peak.total / GB:.1f} GB of {device.kind} memory, and there are "
            f"{limit / GB:.1f} GB: {advice}"
        )
    return problems


def lowered(config: Config, field: str) -> Iterator[tuple[int, Config]]:
    """The config with a field halved, and halved again, as long as that is valid."""
    values = config.model_dump(mode="python")
    *path, name = field.split(".")
    group = values
    for part in path:
        group = group[part]
    value = group[name] or config.data.sequence_tokens
    while (value := value // 2) >= 1:
        group[name] = value
        with suppress(ValueError):
            yield value, Config.model_validate(values)


# ── the table ─────────────────────────────────────────────────────────────────────────────────────


def table(document: dict[str, Any], peaks: list[Memory], amounts: list[Amount]) -> Iterator[str]:
    for amount in amounts:
        value = f"{amount.value / GB:,.3f} GB" if amount.unit == "B" else f"{int(amount.value):,}"
        yield f"{amount.name:<38}{value:>18}  {amount.how}"
    parts = ("base", "weights", "gradients", "optimizer", "activations", "logits", "kv")
    limit = document["memory_limit_bytes"]
    yield f"\npeak {document['device']} memory in GB, estimates" + (
        f"; there are {limit / GB:.1f}" if limit else "; no such device here: give --memory-gb"
    )
    yield f"{'stage':<24}" + "".join(f"{part:>12}" for part in (*parts, "a process", "processes", "total"))
    for peak in peaks:
        values = [getattr(peak, part) / GB for part in parts]
        row = "".join(f"{value:>12.3f}" for value in [*values, peak.each / GB])
        yield f"{peak.stage:<24}{row}{peak.processes:>12}{peak.total / GB:>12.3f}"
    yield f"\ndevice-hours; {document['rates']}"
    for stage, hours in (document["hours"] or {}).items():
        yield f"{stage:<24}{hours:>12.3f}"
    if document["hours"]:
        yield "timed decoding is not in them: it waits for memory, not for arithmetic"
