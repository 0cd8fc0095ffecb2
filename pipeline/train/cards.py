"""Model cards of what was trained."""

from __future__ import annotations

from pipeline.config.models import ScratchModel
from pipeline.config.schema import Config
from pipeline.config.train import Variant
from pipeline.markdown import table


def describe_data(config: Config) -> str:
    sources = [f"{s.name} ({s.kind})" for s in config.data.sources if "train" in s.use]
    return ", ".join(sources)


def scratch_card(config: Config, spec: ScratchModel, name: str, steps: int) -> str:
    """The model card of a pretrained model; `steps` are those that its weights have seen."""
    return (
        f"# Scratch {name}\n\nA {spec.layers}-layer, {spec.hidden}-wide Llama, pretrained by next-token "
        f"prediction for {steps} steps of {spec.pretrain.batch_sequences} sequences of "
        f"{spec.pretrain.sequence_tokens or config.data.sequence_tokens} tokens. "
        f"Data: {describe_data(config)}.\n"
    )


def drafter_card(
    config: Config, variant: Variant, steps: int, scores: dict[str, float], kl_steps: int | None = None
) -> str:
    """The model card of a drafter: budgets, target, data, validation acceptance.

    Args:
        kl_steps: of one that learned from served rounds, the steps by KL; None for all others.
    """
    target = config.target.path if config.target.kind == "pretrained" else "scratch target of the same run"
    layers = ""
    if config.drafter.kind == "first_layers":
        names = ", ".join(map(str, config.drafter.layers))
        layers = f"- Layers of the target: {names}; its embedding, norm and head are as they were\n"
    loads = "Loads with plain `AutoModelForCausalLM.from_pretrained`."
    if config.drafter.kind == "head":
        names = ", ".join(map(str, config.drafter.feature_layers or ())) or "2, the middle, the third last"
        layers = f"- One layer over the target's hidden states, the inputs of its layers {names}\n"
        loads = "It needs the target beside it, whose hidden states it reads."
    full_loss: str = variant.full_loss
    sparse_loss, begun = str(variant.sparse_loss), ""
    if kl_steps is not None:
        full_loss = sparse_loss = f"KL for {kl_steps} steps, then reward-masked cross entropy"
        begun = "- Begun as a trained drafter; learned from rounds that it served itself\n"
    size = config.train.draft_vocabulary
    proposable = "" if size is None else f"- Draft vocabulary: {size} tokens, in `draft_vocabulary.json`\n"
    path = ""
    if (term := variant.path) is not None:
        path = f" + {term.weight:g}·path ({term.paths} of {term.length} tokens, every {term.every} steps)"
    if scores:
        rows = [(budget, f"{value:.3f}") for budget, value in scores.items()]
        acceptance = (
            f"{table(('budget', 'acceptance'), rows)}\n\nReplayed on the validation prompts at "
            f"γ = {config.train.validation_gamma}, greedy."
        )
    else:
        why = "the config has no validation prompts" if steps else "exported as it was, untrained"
        acceptance = f"No validation curve: {why}."
    return (
        "---\nlibrary_name: transformers\ntags: [speculative-decoding, budgetdraft]\n---\n"
        f"# BudgetDraft drafter `{variant.name}`\n\n"
        f"A drafter for speculative decoding behind a sparse KV cache. {loads}\n\n"
        f"- Target: {target}\n{layers}{proposable}"
        f"- Loss: {variant.full_weight:g}·L_A ({full_loss}) + "
        f"{variant.sparse_weight:g}·L_C ({sparse_loss}){path}\n"
        f"{begun}"
        f"- Budgets (sampling weights): {variant.budgets or 'none, full cache only'}; "
        f"policy {variant.policy}; positions {variant.positions}\n"
        f"- Steps: {steps} of {config.train.batch_sequences} sequences of "
        f"{config.data.sequence_tokens} tokens\n"
        f"- Training data: {describe_data(config)}\n\n{acceptance}\n"
    )
