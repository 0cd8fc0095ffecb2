"""The forward pass of training: windows of a text behind several views of what comes before each.

It knows no config, so that it can be timed on a machine that has torch and transformers alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.axes import View
from pipeline.kv.guides import UNGUIDED, Guides
from pipeline.kv.view_cache import ViewCache, read_continuation, read_hidden, read_prefix
from pipeline.models.head import plain_head
from pipeline.train.losses import States

PREFIX_MULTIPLE = 64  # tokens


def window_scores(
    model: PreTrainedModel,
    tokens_BS: Tensor,
    starts: Sequence[int],
    length: int,
    views: Sequence[View],
    max_logits_bytes: int,
    offset: int = 0,
    guides: Guides = UNGUIDED,
) -> Sequence[Tensor | States]:
    """Logits of every window behind every view, from one prefill and one forward with gradients.

    A window with start s reads tokens s .. s+length-1 at their true positions, behind the views of the
    prefix [0, s); its logits predict tokens s+1 .. s+length. The sinks of every view are moved back by
    `offset` positions. `guides` are those of the prefixes.

    Returns:
        Per view, logits [len(starts) · B · length, V] (windows outermost); where all of them together would
        exceed `max_logits_bytes` in fp32 and the model allows it, the states that they would be made of.
    """
    cuts = [(start, view) for view in views for start in starts]
    # The prefix is read a little further than it is kept, so that training has few shapes: for every new one
    # a backend may compile, and keep what it compiled.
    read = -(-max(starts) // PREFIX_MULTIPLE) * PREFIX_MULTIPLE
    kept, _ = read_prefix(model, tokens_BS[:, :read], cuts, offset, guides)
    windows_RQ = torch.cat([tokens_BS[:, start : start + length] for start in starts]).repeat(len(views), 1)
    offsets = torch.arange(length, device=tokens_BS.device)
    positions_RQ = torch.cat([(start + offsets).expand(tokens_BS.shape[0], -1) for start in starts])
    positions_RQ = positions_RQ.repeat(len(views), 1)
    cache = ViewCache(kept, capacity=length)
    if 4 * windows_RQ.numel() * model.num_tokens > max_logits_bytes:
        whole = getattr(model, "module", model)  # DeepSpeed's engine wraps it
        head = plain_head(whole)
        if head is not None:
            hidden_RQH = read_hidden(whole, cache, windows_RQ, positions_RQ)
            return [States(hidden.flatten(0, 1), head) for hidden in hidden_RQH.chunk(len(views))]
    logits_RQV = read_continuation(model, cache, windows_RQ, positions_RQ)
    return [logits.flatten(0, 1) for logits in logits_RQV.chunk(len(views))]
