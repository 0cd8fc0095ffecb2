"""The one way to the kernels: `triton` or `torch`, chosen by config and device, logged once.

A process makes its choice with `choose`, as `run.kernels` has it, before it loads a model. The kernels of a
decoding step are registered as torch operators: a compiled step contains them whole, and a captured CUDA
graph replays them.

`torch` is not a degraded mode: on a CPU it is the only one, and for `verify_attention` it is
`scaled_dot_product_attention` over the whole buffer with a mask, which the caller makes once for all layers.

Shape legend: B rows, H key/value heads, G query heads per key/value head, Q query tokens, S stored tokens,
N kept entries, C = S // 8 chunks, W last tokens, D head width, T proposals, V vocabulary.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference

log = logging.getLogger(__name__)

Backend = Literal["triton", "torch"]
Choice = Literal["auto", "triton", "torch"]


ALL = 2**31 - 1  # recent tokens of a window that is none
_choice: Choice = "auto"


def choose(choice: Choice) -> None:
    """Choose for this process, from now on: `auto` is triton on CUDA and torch elsewhere."""
    global _choice
    _choice = choice


def backend(device: torch.device) -> Backend:
    """What the process's choice means on a device.

    Raises:
        ValueError: if triton was chosen and cannot run there.
    """
    return _resolve(_choice, device.type)


@cache
def _resolve(choice: Choice, device_type: str) -> Backend:
    if choice == "triton" and device_type != "cuda" and not interpreted():
        raise ValueError(
            f"run.kernels is triton, which needs a CUDA device, and this is {device_type}; set auto or torch"
        )
    resolved: Backend = (
        "triton" if choice == "triton" or (choice, device_type) == ("auto", "cuda") else "torch"
    )
    log.info("kernels: %s on %s (run.kernels: %s)", resolved, device_type, choice)
    return resolved


def interpreted() -> bool:
    """Whether Triton runs in its interpreter, as the tests do on a CPU."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def chunk_topk(keys_BHSD: Tensor, budget: int, keep_tail: bool = True) -> Tensor:
    """Indices [B, H, N] that the policy keeps; see `reference.chunk_topk`."""
    if backend(keys_BHSD.device) == "torch":
        return reference.chunk_topk(keys_BHSD, budget, keep_tail)
    from kernels import chunk_select

    return chunk_select.chunk_indices(keys_BHSD, budget, keep_tail)


def chunk_attention(queries_BHGWD: Tensor, keys_BHSD: Tensor, scaling: float) -> Tensor:
    """The share [B, C] of each chunk in the last tokens' attention; see `reference.chunk_attention`."""
    if backend(keys_BHSD.device) == "torch":
        return reference.chunk_attention(queries_BHGWD, keys_BHSD, scaling)
    from kernels import chunk_attention

    return chunk_attention.chunk_attention(queries_BHGWD, keys_BHSD, scaling)


def gather_kept(keys_BHSD: Tensor, values_BHSD: Tensor, kept_BHN: Tensor) -> tuple[Tensor, Tensor]:
    """The kept keys and values, dense [B, H, N, D]."""
    if backend(keys_BHSD.device) == "torch":
        index = kept_BHN.unsqueeze(-1).expand(-1, -1, -1, keys_BHSD.shape[-1])
        return keys_BHSD.gather(2, index), values_BHSD.gather(2, index)
    from kernels import chunk_select

    return chunk_select.gather_kept(keys_BHSD, values_BHSD, kept_BHN)


def verify_attention(
    query: Tensor,
    key_BHSD: Tensor,
    value_BHSD: Tensor,
    scaling: float,
    mask_B1MS: Tensor | None,
    length_B: Tensor | None,
    window: tuple[int, int] | None = None,
) -> Tensor:
    """Attention [B, H·G, Q, D] of the last Q of the first `length_B` stored tokens, as in `reference`.

    Args:
        mask_B1MS: additive, M = G·Q, for torch.
        length_B: for Triton, which needs no mask.
        window: for Triton; a mask has it in it.
    """
    if length_B is not None:
        sinks, recent = window or (0, ALL)
        return _verify_attention(query, key_BHSD, value_BHSD, scaling, length_B, sinks, recent)
    # The query heads of one key/value head are folded into the query length: keys are not repeated.
    folded = query.reshape(query.shape[0], key_BHSD.shape[1], -1, query.shape[-1])
    output = F.scaled_dot_product_attention(folded, key_BHSD, value_BHSD, attn_mask=mask_B1MS, scale=scaling)
    return output.reshape(query.shape)


def greedy_accept(
    draft_BT: Tensor, target_BT1: Tensor, lengths_B: Tensor, backend: Backend
) -> tuple[Tensor, Tensor]:
    """Accepted proposals [B] and next tokens [B] of greedy rounds; see `reference.greedy_accept`."""
    if backend == "torch":
        return reference.greedy_accept(draft_BT, target_BT1, lengths_B)
    return _greedy_accept(draft_BT, target_BT1, lengths_B)


def rejection_accept(
    draft_BT: Tensor,
    q_BTV: Tensor,
    p_BT1V: Tensor,
    uniforms_BT1: Tensor,
    lengths_B: Tensor,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """Accepted proposals [B] and next tokens [B] of sampled rounds; see `reference.rejection_accept`."""
    if backend == "torch":
        return reference.rejection_accept(draft_BT, q_BTV, p_BT1V, uniforms_BT1, lengths_B)
    return _rejection_accept(draft_BT, q_BTV, p_BT1V, uniforms_BT1, lengths_B)


# ── operators: of a Triton kernel, a compiler sees only the shapes ───────────────────────────────────


@torch.library.custom_op("budgetdraft::verify_attention", mutates_args=())
def _verify_attention(
    query: Tensor,
    key_BHSD: Tensor,
    value_BHSD: Tensor,
    scaling: float,
    length_B: Tensor,
    sinks: int,
    recent: int,
) -> Tensor:
    from kernels import verify_attention

    window = None if recent == ALL else (sinks, recent)
    return verify_attention.verify_attention(query, key_BHSD, value_BHSD, scaling, length_B, window=window)


@_verify_attention.register_fake
def _(
    query: Tensor,
    key_BHSD: Tensor,
    value_BHSD: Tensor,
    scaling: float,
    length_B: Tensor,
    sinks: int,
    recent: int,
) -> Tensor:
    B, heads, Q, D = query.shape
    return query.new_empty(B, Q, heads, D).transpose(1, 2)


@torch.library.custom_op("budgetdraft::greedy_accept", mutates_args=())
def _greedy_accept(draft_BT: Tensor, target_BT1: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
    from kernels import accept

    return accept.greedy_accept(draft_BT, target_BT1, lengths_B)


@_greedy_accept.register_fake
def _(draft_BT: Tensor, target_BT1: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(lengths_B), torch.empty_like(lengths_B)


@torch.library.custom_op("budgetdraft::rejection_accept", mutates_args=())
def _rejection_accept(
    draft_BT: Tensor, q_BTV: Tensor, p_BT1V: Tensor, uniforms_BT1: Tensor, lengths_B: Tensor
) -> tuple[Tensor, Tensor]:
    from kernels import accept

    return accept.rejection_accept(draft_BT, q_BTV, p_BT1V, uniforms_BT1, lengths_B)


@_rejection_accept.register_fake
def _(
    draft_BT: Tensor, q_BTV: Tensor, p_BT1V: Tensor, uniforms_BT1: Tensor, lengths_B: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(lengths_B), torch.empty_like(lengths_B)
