"""What a config will cost before anything runs: sizes, memory, arithmetic. Formulas only, nothing is loaded.

Every size is in bytes and every amount of work in FLOPs (a multiply-add is two). The letters are those of the
models: N parameters, C hidden width, A query heads × head width, K key/value heads × head width, I MLP width,
V vocabulary. Memory is that of one process at its peak. What is estimated is estimated upwards: prefixes are
as long as they can be, views as many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import Config, ScratchModel, Variant

FP32 = 4
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
# glibc serves tensors below its largest mmap threshold from a heap that is never compacted, and keeps what is
# freed. Measured on training steps of Llamas of 64 to 512 channels: 1.5 to 2.1 times what is alive.
HEAP_LIMIT, HEAP_FACTOR = 32 * 2**20, 1.8
# On a CPU oneDNN compiles bfloat16 products anew for every number of tokens, and keeps 1024 of them.
# Measured on drafters of 64 channels: 6 MiB a prefix length over 240 lengths; none in fp32.
LENGTH_BYTES, MOST_LENGTHS = 6 * 2**20, 256
LABEL_POSITIONS = 1024  # `pipeline.teacher.POSITIONS`: positions whose logits are labelled at a time
LOSS_COPIES = 3  # of fp32 logits: log-softmax and, in backward, the gradients before and behind it
LOGIT_COPIES = 4  # `pipeline.measure.LOGIT_COPIES`: of a round's logits
LOSS_SCRATCH = 256 * 2**20  # `kernels.distill_loss.SCRATCH_BYTES`
ROUND_SLOTS = 64  # `pipeline.slots.ROUND_SLOTS`
REDUCE_BUCKET = 500_000_000  # elements; DeepSpeed's default of zero_optimization.reduce_bucket_size
LIVE_PARAMETERS = 1_000_000_000  # DeepSpeed's default of stage3_max_live_parameters


@dataclass(frozen=True)
class Shape:
    """A decoder-only model, as far as its costs go."""

    parameters: int
    layers: int
    hidden: int
    query: int
    kv: int
    intermediate: int
    vocab: int

    def kv_bytes(self, tokens: int, itemsize: int = FP32) -> int:
        """Keys and values of so many tokens, all layers."""
        return 2 * self.layers * self.kv * tokens * itemsize

    def training_bytes(self, bfloat16: bool) -> int:
        """What one token leaves in one layer for its backward pass.

        Of each norm: its input, the normalised input and the result, which the projections keep. Of the
        attention: rotated queries and keys, values, its result. Of the MLP: gate, its activation, up, their
        product. Under autocast the norms' fp32 stays and what projections read is kept in bfloat16.
        """
        norms, rest = 6 * self.hidden, 2 * self.query + 2 * self.kv + 4 * self.intermediate
        return 20 * self.hidden + 2 * rest if bfloat16 else FP32 * (norms + rest)

    def reading_bytes(self, itemsize: int) -> int:
        """What one token needs in the layer that is being computed without gradients."""
        widest = max(3 * self.intermediate, 4 * self.query + 3 * self.kv)
        return itemsize * (2 * self.hidden + widest)

    def forward_flops(self, tokens: float, attended: float) -> float:
        """2 N for every token, and 4 A for every pair of a token and one of those that it attends to."""
        return tokens * (2 * self.parameters + 4 * self.layers * self.query * attended)


def scratch_shape(spec: ScratchModel, vocab: int) -> Shape:
    """A Llama as `pipeline.models.build_scratch` makes it: tied embeddings, no biases."""
    width = spec.hidden // spec.heads
    query, kv = spec.hidden, spec.kv_heads * width
    layer = 2 * spec.hidden * (query + kv) + 3 * spec.hidden * spec.intermediate + 2 * spec.hidden
    parameters = vocab * spec.hidden + spec.layers * layer + spec.hidden
    return Shape(parameters, spec.layers, spec.hidden, query, kv, spec.intermediate, vocab)


def pretrained_shape(config: Any, parameters: int) -> Shape:
    """A model by its transformers config; its parameters are counted by whoever can build it."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv = (getattr(config, "num_key_value_heads", None) or heads) * width
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    layers, hidden, vocab = config.num_hidden_layers, config.hidden_size, config.vocab_size
    return Shape(parameters, layers, hidden, heads * width, kv, inner, vocab)


@dataclass(frozen=True)
class Device:
    """Where a process runs: "cpu" or "cuda", and what it takes there before it does anything."""

    kind: str
    base_bytes: int

    def held(self, alive: float, largest: float) -> int:
        """What the allocator holds for tensors that come and go, of which the largest has so many bytes."""
        loose = self.kind == "cpu" and largest < HEAP_LIMIT
        return int(alive * (HEAP_FACTOR if loose else 1.0))


@dataclass(frozen=True)
class Memory:
    """Peak bytes of one process of a stage, by what they are for. `processes` share the device."""

    stage: str
    base: int
    weights: int
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    kv: int = 0
    processes: int = 1

    @property
    def each(self) -> int:
        parts = (self.weights, self.gradients, self.optimizer, self.activations, self.logits, self.kv)
        return self.base + sum(parts)

    @property
    def total(self) -> int:
        return self.processes * self.each


@dataclass(frozen=True)
class Sharding:
    """How optimizer state is spread over `workers`: a ZeRO stage, or None for the plain torch engine."""

    stage: int | None = None
    workers: int = 1
    bucket: int = REDUCE_BUCKET
    live: int = LIVE_PARAMETERS
    offload: bool = False

    def state_bytes(self, parameters: int, device: Device) -> tuple[int, int, int]:
        """Weights, gradients and optimizer state of one worker that trains with AdamW in fp32.

        Weights and gradients take 4 N, AdamW's two moments 8 N. From stage 1 on each worker has moments of
        its N / workers, with a master copy of them and their gradient; stage 2 also drops other workers'
        gradients, stage 3 their weights, up to what is gathered for use. Gradients travel through a bucket,
        of which a CPU touches what is filled only.
        """
        whole, part = FP32 * parameters, FP32 * parameters // self.workers
        if not self.stage:
            return whole, whole, 2 * whole
        bucket = FP32 * (min(parameters, self.bucket) if device.kind == "cpu" else self.bucket)
        gathered = part + FP32 * min(parameters, self.live)
        weights = whole if self.stage < 3 else min(whole + part, gathered)
        gradients = (whole if self.stage == 1 else 0) + part + bucket
        on_device = device.kind == "cpu" or not self.offload
        return weights, gradients, 3 * part if on_device else 0


def sharding_of(settings: dict[str, Any], workers: int) -> Sharding:
    """From the content of a DeepSpeed settings file."""
    zero = settings.get("zero_optimization", {})
    offload = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    bucket = int(zero.get("reduce_bucket_size", REDUCE_BUCKET))
    live = int(zero.get("stage3_max_live_parameters", LIVE_PARAMETERS))
    return Sharding(int(zero.get("stage", 0)), workers, bucket, live, offload)


def pretrain_memory(config: Config, role: str, shape: Shape, sharding: Sharding, device: Device) -> Memory:
    """Next-token training: the activations of all layers of a micro-batch, and its logits in fp32."""
    spec = config.target if role == "target" else config.drafter
    assert isinstance(spec, ScratchModel)
    length = spec.pretrain.sequence_tokens or config.data.sequence_tokens
    tokens = config.train.micro_batch_sequences * length
    activations, logits = training_step(shape, tokens, tokens, config.train.dtype == "bfloat16", device)
    state = sharding.state_bytes(shape.parameters, device)
    return Memory(f"pretrain {role}", device.base_bytes, *state, activations, logits)


def training_step(
    shape: Shape, tokens: int, logit_tokens: int, bfloat16: bool, device: Device
) -> tuple[int, int]:
    """Activations of a forward and backward pass, and the logits of so many of its tokens.

    One layer at a time also has its gradients: two of the MLP's width, two of the model's.
    """
    wide, narrow = FP32 * tokens * shape.intermediate, FP32 * tokens * shape.hidden
    mlp = shape.layers * 4 * wide // (2 if bfloat16 else 1)
    rest = shape.layers * tokens * shape.training_bytes(bfloat16) - mlp
    activations = device.held(mlp + 2 * wide, wide) + device.held(rest + 2 * narrow, narrow)
    one = FP32 * logit_tokens * shape.vocab
    return activations, device.held(LOSS_COPIES * one + (one // 2 if bfloat16 else 0), one)


def train_memory(
    config: Config, variant: Variant, steps: int, shape: Shape, sharding: Sharding, device: Device
) -> Memory:
    """The two-branch loss: one prefill, the views of every window, one forward of all windows behind them.

    A window starts as late as it can, and the budgets drawn are the largest. The full view of a prefix is
    the prefill's own KV; other views are copies; the cache copies each once more, and backward makes the
    gradients of one layer of it twice. No heap's share on these: windows that all start so late are rare.

    Args:
        steps: of all variants that one process trains, one after another.
    """
    train, length = config.train, config.data.sequence_tokens
    starts = [length - (place + 1) * train.window_tokens for place in range(train.windows)]
    budgets = sorted(variant.budgets, reverse=True)[: variant.num_views] if variant.sparse_weight else []
    full = variant.full_weight > 0
    kept = [min(budget, start) for budget in budgets for start in starts]
    behind = kept + (starts if full else [])
    micro, bfloat16 = train.micro_batch_sequences, train.dtype == "bfloat16"
    tokens = micro * train.window_tokens * len(behind)
    cache = shape.kv_bytes(micro * (sum(behind) + train.window_tokens * len(behind)))
    views = shape.kv_bytes(micro * (sum(kept) + (starts[0] if full else 0)))
    # Under autocast attention reads, and keeps for backward, a bfloat16 copy of the cache.
    behind_bytes = views + cache + (cache // 2 if bfloat16 else 0) + 2 * cache // shape.layers
    one = FP32 * tokens * shape.vocab
    beyond = one > train.max_logits_mib * 2**20 and sharding.stage != 3
    activations, logits = training_step(shape, tokens, tokens, bfloat16, device)
    if beyond:
        logits = min(logits, LOSS_SCRATCH)
    reading = micro * starts[0] * shape.reading_bytes(FP32)
    lengths = min(steps * train.batch_sequences // micro, length - train.min_prefix_tokens, MOST_LENGTHS)
    compiled = LENGTH_BYTES * lengths if bfloat16 and device.kind == "cpu" else 0
    return Memory(
        f"train {variant.name}",
        device.base_bytes + compiled,
        *sharding.state_bytes(shape.parameters, device),
        activations=max(activations, device.held(reading, FP32 * micro * starts[0] * shape.intermediate)),
        logits=logits,
        kv=behind_bytes,
    )


def teach_memory(config: Config, shape: Shape, label_batch: int, prompt_batch: int, device: Device) -> Memory:
    """The larger of labelling `label_batch` sequences and continuing `prompt_batch` of the longest prompts.

    Labelling makes the logits of all positions, and of a slice of them the copies that labels need.
    Continuing holds the prefix KV twice while its cache is filled.
    """
    data, labels, size = config.data, config.labels, ITEMSIZE[config.target.dtype]
    length, wide = data.sequence_tokens, size * shape.intermediate
    logits = label_batch * length * shape.vocab * size
    per_logit = 2 * FP32 if labels.top_k else size + 1
    copies = label_batch * min(length, LABEL_POSITIONS) * shape.vocab * per_logit
    reading = device.held(label_batch * length * shape.reading_bytes(size), label_batch * length * wide)
    made = device.held(logits, logits) + device.held(copies, copies // 2)
    start = (device.base_bytes, shape.parameters * size)
    peaks = [Memory("teach", *start, activations=reading), Memory("teach", *start, logits=made)]

    writing = [(prompt_batch, max(c.tokens for c in data.contexts), data.max_new_tokens)]
    if labels.on_policy_fraction:
        count = config.train.windows * config.train.window_tokens
        writing.append((label_batch, length - count, count))
    for batch, prefix, count in writing:
        cache = shape.kv_bytes(batch * (prefix + count), size)
        beside = max(cache, batch * prefix * shape.reading_bytes(size))
        alive = shape.kv_bytes(batch * prefix, size) + beside
        peaks.append(Memory("teach", *start, kv=device.held(alive, batch * prefix * shape.kv * size)))
    return max(peaks, key=lambda peak: peak.each)


def sweep_memory(
    config: Config,
    target: Shape,
    drafter: Shape,
    drafters: int,
    measured: int,
    cells: Sequence[int | str],
    timed: Sequence[int | str],
    device: Device,
) -> Memory:
    """The larger of replaying a prompt and measuring the prompts that are decoded together.

    Args:
        drafters, measured: drafters that are loaded, and those of them that are timed.
        cells: budgets of the replayed views, controls included.
        timed: budgets of the measured views.
    """
    sweep, data = config.sweep, config.data
    prefix, count = max(c.tokens for c in data.contexts), data.max_new_tokens
    size, target_size = ITEMSIZE[config.drafter.dtype], ITEMSIZE[config.target.dtype]

    def kept(budgets: Sequence[int | str]) -> list[int]:
        return [prefix if budget == "full" else min(int(budget), prefix) for budget in budgets]

    def reading(shape: Shape, itemsize: int) -> int:
        layer = prefix * (shape.hidden + 2 * shape.kv) * itemsize
        alive = layer + min(prefix, config.decode.prefill_chunk) * shape.reading_bytes(itemsize)
        return device.held(alive, prefix * max(shape.hidden, 2 * shape.kv) * itemsize)

    remembered = 2 if "other_prompt" in sweep.controls else 1
    entries = remembered * sum(kept(list(dict.fromkeys(cells)))) + sum(kept(cells)) + count * len(cells)
    one = len(cells) * count * drafter.vocab * size
    weights = drafters * drafter.parameters * size
    base = device.base_bytes
    replay = Memory(
        "sweep", base, weights,
        activations=max(reading(drafter, size), len(cells) * count * drafter.reading_bytes(size)),
        logits=device.held(2 * one, one),
        kv=device.held(drafter.kv_bytes(entries, size), prefix * drafter.kv * size),
    )  # fmt: skip
    if sweep.mode == "replay":
        return replay
    together, room = sweep.measure.prompts_together, count + max(sweep.gammas)
    slots = -(-prefix // ROUND_SLOTS) * ROUND_SLOTS + room
    caches = sum(entry + room for entry in set(kept(timed)))
    measure = Memory(
        "sweep", base, weights + target.parameters * target_size,
        activations=max(reading(target, target_size), reading(drafter, size)),
        logits=LOGIT_COPIES * FP32 * together * (max(sweep.gammas) + 1) * target.vocab,
        kv=target.kv_bytes(together * slots + prefix, target_size)
        + drafter.kv_bytes(together * (measured * caches + sum(set(kept(timed)))), size),
    )  # fmt: skip
    return measure if measure.each > replay.each or sweep.mode == "measure" else replay


@dataclass(frozen=True)
class Work:
    """FLOPs of a stage by the model that does them, forward alone or with backward (three times as many)."""

    stage: str
    role: str
    training: bool
    flops: float


def work(
    config: Config,
    target: Shape,
    drafter: Shape,
    labelled: int,
    prompts: dict[str, int],
    samples: int,
    replayed: int,
    views: int,
) -> list[Work]:
    """All work up to replay. Timed decoding is not in it: it waits for memory rather than for arithmetic.

    Args:
        labelled: sequences that the target labels.
        prompts: test prompts by the name of their context, over all data sets.
        samples: how often the target continues a prompt by sampling, besides its greedy continuation.
        replayed, views: drafters that are replayed, and the views of all of them, once a text.
    """
    data, train, length = config.data, config.train, config.data.sequence_tokens
    done: list[Work] = []
    for role, spec, shape in (("target", config.target, target), ("drafter", config.drafter, drafter)):
        if isinstance(spec, ScratchModel):
            pretrain = spec.pretrain
            piece = pretrain.sequence_tokens or length
            tokens = pretrain.steps * pretrain.batch_sequences * piece
            done.append(Work(f"pretrain {role}", role, True, 3 * shape.forward_flops(tokens, piece / 2)))
    texts = [(c.tokens, prompts[c.name]) for c in data.contexts]
    reading = target.forward_flops(labelled * length * (1 + config.labels.on_policy_fraction), length / 2)
    for tokens, number in texts:
        read = number * (1 + samples) * (tokens + data.max_new_tokens)
        reading += target.forward_flops(read, tokens / 2)
    done.append(Work("teach", "target", False, reading))

    for variant in train.drafters:
        steps = train.steps if variant.steps is None else variant.steps
        if not steps:
            continue
        sequences = steps * train.batch_sequences
        window_tokens = sequences * train.windows * train.window_tokens
        attended = [length / 2] if variant.full_weight else []
        if variant.sparse_weight:
            attended += [float(max(variant.budgets))] * min(variant.num_views, len(variant.budgets))
        windows = sum(3 * drafter.forward_flops(window_tokens, entries) for entries in attended)
        prefill = drafter.forward_flops(sequences * length, length / 2)
        done.append(Work("train", "drafter", False, prefill))
        done.append(Work("train", "drafter", True, windows))
    once = config.sweep.mode != "measure"
    for tokens, number in texts:
        each = drafter.forward_flops(replayed * tokens, tokens / 2)
        each += drafter.forward_flops(views * data.max_new_tokens, tokens / 2)
        done.append(Work("sweep (replay)", "drafter", False, once * number * each))
    return done
