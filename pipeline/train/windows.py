"""The forward pass of training: windows of a text behind several views of what comes before each.

And of texts that the drafter samples itself from where windows start. It knows no config, so that it can be
timed on a machine that has torch and transformers alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.axes import View
from pipeline.decode.sampling import Rule
from pipeline.kv.guides import UNGUIDED, Guides
from pipeline.kv.view_cache import ViewCache, read_continuation, read_hidden, read_prefix
from pipeline.models.draft_vocabulary import draft_tokens
from pipeline.models.head import plain_head
from pipeline.train.losses import States

PREFIX_MULTIPLE = 64  # tokens


def read_for(starts: Sequence[int]) -> int:
    """Tokens of the prefixes of these windows that are read.

    A little more than is kept, so that training has few shapes: for every new one a backend may compile, and
    keep what it compiled.
    """
    return -(-max(starts) // PREFIX_MULTIPLE) * PREFIX_MULTIPLE


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
    kept, _ = read_prefix(model, tokens_BS[:, : read_for(starts)], cuts, offset, guides)
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


def sampled_paths(
    model: PreTrainedModel,
    tokens_BS: Tensor,
    starts: Sequence[int],
    view: View,
    rule: Rule,
    uniforms_TR: Tensor,
    offset: int = 0,
    guides: Guides = UNGUIDED,
) -> tuple[Tensor, Tensor]:
    """T tokens that a drafter samples behind the first token of each window, and its logits of them.

    From every start equally many paths, R in all: paths outermost, then windows, then rows. They are sampled
    token by token without gradients; one more forward pass over all of them has the gradients.

    Args:
        view: what is kept of the prefix of each window.
        uniforms_TR: in [0, 1), one for each token.

    Returns:
        The sampled tokens [R, T], by their number among those that the model can propose, and the logits
        [R, T, D] that each came from.
    """
    cuts = [(start, view) for start in starts]
    kept, _ = read_prefix(model, tokens_BS[:, : read_for(starts)], cuts, offset, guides)
    T, R = uniforms_TR.shape
    num_paths = R // (len(starts) * len(tokens_BS))
    tokens_D = draft_tokens(model)
    first_R1 = torch.cat([tokens_BS[:, start : start + 1] for start in starts]).repeat(num_paths, 1)
    position_R1 = torch.tensor(starts, device=tokens_BS.device).repeat_interleave(len(tokens_BS))
    position_R1 = position_R1.repeat(num_paths).unsqueeze(1)
    read, chosen = [first_R1], list[Tensor]()
    with torch.no_grad():
        cache = ViewCache(kept * num_paths, capacity=T)
        for step, uniform_R in enumerate(uniforms_TR):
            logits_R1D = read_continuation(model, cache, read[-1], position_R1 + step)
            place_R1 = rule.choose(logits_R1D[:, -1], uniform_R)[0].unsqueeze(1)
            chosen.append(place_R1)
            read.append(place_R1 if tokens_D is None else tokens_D[place_R1])
    cache = ViewCache(kept * num_paths, capacity=T)
    positions_RT = position_R1 + torch.arange(T, device=tokens_BS.device)
    logits_RTD = read_continuation(model, cache, torch.cat(read[:-1], 1), positions_RT)
    return torch.cat(chosen, 1), logits_RTD
