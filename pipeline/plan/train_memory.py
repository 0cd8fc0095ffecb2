"""Peak memory of pretraining and training, by formula."""

from __future__ import annotations

from dataclasses import replace

from kernels.distill_tiles import SCRATCH_BYTES
from pipeline.config.models import Role
from pipeline.config.schema import Config
from pipeline.config.train import Variant
from pipeline.hardware import Device
from pipeline.models.shape import Shape
from pipeline.plan.peaks import FP32, Memory, reading_bytes
from pipeline.train.batches import start_phases
from pipeline.train.sharding import Sharding

# On a CPU oneDNN compiles a bfloat16 product for every new shape and keeps the last 1024 of them. Measured on
# drafters of 64 and 128 channels: about ten new products a micro-batch until each prefix length that windows
# have was met, three products a length, .76 and 1.05 MiB each; none in fp32.
PRODUCT_BYTES, MOST_PRODUCTS, NEW_PRODUCTS, PRODUCTS_A_LENGTH = int(0.9 * 2**20), 1024, 10, 3

LOSS_COPIES = 3  # of fp32 logits: log-softmax and, in backward, the gradients before and behind it


def pretrain_memory(config: Config, role: Role, shape: Shape, sharding: Sharding, device: Device) -> Memory:
    """Next-token training: the activations of all layers of a micro-batch, and its logits in fp32."""
    length = config.scratch[role].pretrain.sequence_tokens or config.data.sequence_tokens
    tokens = config.train.micro_batch_sequences * length
    activations, logits = training_step(shape, tokens, config.train.dtype == "bfloat16", device)
    state = sharding.state_bytes(shape.trained, device, shape.frozen)
    return Memory(f"pretrain {role}", device.base_bytes, *state, activations, logits)


def training_step(shape: Shape, tokens: int, bfloat16: bool, device: Device) -> tuple[int, int]:
    """Activations and logits of a forward and backward pass.

    One layer at a time also has its gradients: two of the MLP's width, two of the model's.
    """
    wide, narrow = FP32 * tokens * shape.intermediate, FP32 * tokens * shape.hidden
    mlp = shape.layers * 4 * wide // (2 if bfloat16 else 1)
    rest = shape.layers * tokens * training_bytes(shape, bfloat16) - mlp
    activations = device.held(mlp + 2 * wide, wide) + device.held(rest + 2 * narrow, narrow)
    logits = FP32 * tokens * shape.logits
    return activations, device.held(LOSS_COPIES * logits + (logits // 2 if bfloat16 else 0), logits)


def training_bytes(shape: Shape, bfloat16: bool) -> int:
    """What one token leaves in one layer for its backward pass.

    Of each norm: its input, the normalised input and the result, which the projections keep. Of the
    attention: rotated queries and keys, values, its result. Of the MLP: gate, its activation, up, their
    product. Under autocast the norms' fp32 stays and what projections read is kept in bfloat16.
    """
    norms, rest = 6 * shape.hidden, 2 * shape.query + 2 * shape.kv + 4 * shape.intermediate
    return 20 * shape.hidden + 2 * rest if bfloat16 else FP32 * (norms + rest)


def train_memory(
    config: Config, variant: Variant, steps: int, shape: Shape, sharding: Sharding, device: Device
) -> Memory:
    """The two-branch loss: one prefill, the views of every window, one forward of all windows behind them.

    A window starts as late as it can, and the budgets drawn are the largest. The full view of a prefix is
    the prefill's own KV; other views are copies; the cache copies each once more, and backward makes the
    gradients of one layer of it twice. HEAP_FACTOR is not applied to these: windows that all start so late
    are rare.

    Args:
        steps: of all variants that one process trains, one after another.
    """
    train, length, shape = config.train, config.data.sequence_tokens, replace(shape, itemsize=FP32)
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
    if FP32 * tokens * shape.logits > train.max_logits_mib * 2**20 and sharding.stage != 3:
        logits = min(logits, SCRATCH_BYTES)
    reading = micro * starts[0] * reading_bytes(shape)
    lengths = len(start_phases(train, length)) * (length - train.min_prefix_tokens) // train.window_tokens
    products = min(
        NEW_PRODUCTS * steps * train.batch_sequences // micro, PRODUCTS_A_LENGTH * lengths, MOST_PRODUCTS
    )
    compiled = PRODUCT_BYTES * products if bfloat16 and device.kind == "cpu" else 0
    return Memory(
        f"train {variant.name}",
        device.base_bytes + compiled,
        *sharding.state_bytes(shape.trained, device, shape.frozen),
        activations=max(activations, device.held(reading, FP32 * micro * starts[0] * shape.intermediate)),
        logits=logits,
        kv=behind_bytes,
    )
