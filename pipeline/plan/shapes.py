"""Shapes of models, and the memory of pretraining, teaching and training by formula. Nothing is loaded.

Sizes are in bytes, and memory is that of one process at its peak. Prefixes are taken to be as long as they
can be, and views as many. The sums are no upper bounds all the same: what allocators and libraries hold
beside the tensors is counted only as far as the constants below say, so that a process may take more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kernels.distill_tiles import SCRATCH_BYTES
from pipeline.config.schema import Config, ScratchModel, Variant
from pipeline.train.batches import start_phases
from pipeline.train.teacher import POSITIONS

FP32 = 4
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
# glibc serves tensors below its largest mmap threshold from a heap that is never compacted, and keeps what is
# freed. Measured on training steps of Llamas of 64 to 512 channels: 1.5 to 2.1 times what is alive.
HEAP_LIMIT, HEAP_FACTOR = 32 * 2**20, 1.8
# On a CPU oneDNN compiles a bfloat16 product for every new shape and keeps the last 1024 of them. Measured on
# drafters of 64 and 128 channels: about ten new products a micro-batch until each prefix length that windows
# have was met, three products a length, .76 and 1.05 MiB each; none in fp32.
PRODUCT_BYTES, MOST_PRODUCTS, NEW_PRODUCTS, PRODUCTS_A_LENGTH = int(0.9 * 2**20), 1024, 10, 3
LOSS_COPIES = 3  # of fp32 logits: log-softmax and, in backward, the gradients before and behind it
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
        """2 a parameter for every token, and 4 a query channel for every pair of tokens that meet."""
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

        Weights and gradients take 4 B a parameter, AdamW's two moments 8 B. From stage 1 on each worker has
        moments of its share, with a master copy of them and their gradient; stage 2 also drops other
        workers' gradients, stage 3 their weights, up to what is gathered for use. Gradients travel through a
        bucket, of which a CPU touches what is filled only. On a CPU, by measurement, stage 0 reduces a copy
        of all gradients, stage 2 fills a second bucket while it reduces the first, and what stage 3 gathers
        and frees lies in the heap.
        """
        whole, part = FP32 * parameters, FP32 * parameters // self.workers
        cpu = device.kind == "cpu"
        if not self.stage:
            return whole, whole * (2 if cpu and self.workers > 1 else 1), 2 * whole
        bucket = FP32 * (min(parameters, self.bucket) if cpu else self.bucket)
        gathered = part + FP32 * min(parameters, self.live)
        weights = whole if self.stage < 3 else min(whole + part, gathered)
        gradients = (whole if self.stage == 1 else 0) + part + bucket
        if cpu and self.stage == 2:
            gradients += bucket
        if cpu and self.stage == 3:
            weights, gradients = int(HEAP_FACTOR * weights), int(HEAP_FACTOR * gradients)
        on_device = cpu or not self.offload
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
    activations, logits = training_step(shape, tokens, config.train.dtype == "bfloat16", device)
    state = sharding.state_bytes(shape.parameters, device)
    return Memory(f"pretrain {role}", device.base_bytes, *state, activations, logits)


def training_step(shape: Shape, tokens: int, bfloat16: bool, device: Device) -> tuple[int, int]:
    """Activations and logits of a forward and backward pass.

    One layer at a time also has its gradients: two of the MLP's width, two of the model's.
    """
    wide, narrow = FP32 * tokens * shape.intermediate, FP32 * tokens * shape.hidden
    mlp = shape.layers * 4 * wide // (2 if bfloat16 else 1)
    rest = shape.layers * tokens * shape.training_bytes(bfloat16) - mlp
    activations = device.held(mlp + 2 * wide, wide) + device.held(rest + 2 * narrow, narrow)
    one = FP32 * tokens * shape.vocab
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
    activations, logits = training_step(shape, tokens, bfloat16, device)
    if FP32 * tokens * shape.vocab > train.max_logits_mib * 2**20 and sharding.stage != 3:
        logits = min(logits, SCRATCH_BYTES)
    reading = micro * starts[0] * shape.reading_bytes(FP32)
    lengths = len(start_phases(train, length)) * (length - train.min_prefix_tokens) // train.window_tokens
    products = min(
        NEW_PRODUCTS * steps * train.batch_sequences // micro, PRODUCTS_A_LENGTH * lengths, MOST_PRODUCTS
    )
    compiled = PRODUCT_BYTES * products if bfloat16 and device.kind == "cpu" else 0
    return Memory(
        f"train {variant.name}",
        device.base_bytes + compiled,
        *sharding.state_bytes(shape.parameters, device),
        activations=max(activations, device.held(reading, FP32 * micro * starts[0] * shape.intermediate)),
        logits=logits,
        kv=behind_bytes,
    )


def teach_memory(config: Config, shape: Shape, prompts: int, device: Device) -> Memory:
    """The larger of labelling a batch of sequences and continuing a batch of the longest of a file's prompts.

    Labelling makes the logits of all positions, and of a slice of them the copies that labels need.
    Continuing holds the prefix KV twice while its cache is filled.
    """
    data, labels, size = config.data, config.labels, ITEMSIZE[config.target.dtype]
    batch, length, wide = labels.batch_sequences, data.sequence_tokens, size * shape.intermediate
    logits = batch * length * shape.vocab * size
    per_logit = 2 * FP32 if labels.top_k else size + 1
    copies = batch * min(length, POSITIONS) * shape.vocab * per_logit
    reading = device.held(batch * length * shape.reading_bytes(size), batch * length * wide)
    made = device.held(logits, logits) + device.held(copies, copies // 2)
    start = (device.base_bytes, shape.parameters * size)
    peaks = [Memory("teach", *start, activations=reading), Memory("teach", *start, logits=made)]

    writing = [(min(batch, prompts), max(c.tokens for c in data.contexts), data.max_new_tokens)]
    if labels.on_policy_fraction:
        count = config.train.windows * config.train.window_tokens
        writing.append((batch, length - count, count))
    for rows, prefix, count in writing:
        cache = shape.kv_bytes(rows * (prefix + count), size)
        beside = max(cache, rows * prefix * shape.reading_bytes(size))
        alive = shape.kv_bytes(rows * prefix, size) + beside
        peaks.append(Memory("teach", *start, kv=device.held(alive, rows * prefix * shape.kv * size)))
    return max(peaks, key=lambda peak: peak.each)
