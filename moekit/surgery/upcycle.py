"""Sparse upcycling: a mixture whose experts all start as copies of a dense feed-forward part."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from moekit.errors import SpecError
from moekit.experts import FeedForwardSpec
from moekit.layer import MoESpec
from moekit.models.language import MoEDecoderConfig, MoEDecoderForCausalLM

EXPERTS = ".mlp.experts."


def upcycle(model: MoEDecoderForCausalLM, layer: MoESpec, seed: int = 0) -> MoEDecoderForCausalLM:
    """A copy of a dense ``model`` with the mixture ``layer`` in place of every feed-forward part.

    Each expert is a copy of its block's feed-forward part (Komatsuzaki et al. 2022,
    arXiv 2212.05055); routers start at random and everything else is kept. While a token's combine
    weights sum to 1 (``TopK(normalize="selected")`` without a capacity limit, or rectified with
    ``intra_device``), the result computes what the dense model does, up to rounding.

    Args:
        model: a decoder whose blocks are all dense.
        layer: its bank is one of feed-forward experts of the kind, hidden width and biases of the
            model's own feed-forward parts, and any number of them.
        seed: seed of the routers.

    Raises:
        SpecError: a block is a mixture already, or ``layer`` has other experts than copies of the
            feed-forward parts.

    Example:
        >>> from moekit import SwiGLU, TopK
        >>> dense = MoEDecoderForCausalLM(MoEDecoderConfig(
        ...     vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        ...     layers=SwiGLU(count=1, hidden=32),
        ... ))
        >>> grown = upcycle(dense, MoESpec(TopK(k=2), SwiGLU(count=8, hidden=32)))
        >>> [layer.experts.spec.count for layer in grown.moe_layers]
        [8, 8]
    """
    for index, part in enumerate(model.config.layer_specs):
        _check_block(index, part, layer)
    settings = model.config.to_dict() | {"layers": [layer.to_dict()]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        grown = MoEDecoderForCausalLM(MoEDecoderConfig.from_dict(settings))
    grown.to(device=model.device, dtype=model.dtype)  # type: ignore[call-arg]
    # Its frequencies are in no state dict and may be of a higher precision than the weights.
    grown.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)
    old = model.state_dict()
    state = {
        name: _copied(name, old[name], value) if name in old else value
        for name, value in grown.state_dict().items()
    }
    grown.load_state_dict(state)
    return grown


def _check_block(index: int, part: MoESpec | FeedForwardSpec, layer: MoESpec) -> None:
    if not isinstance(part, FeedForwardSpec):
        raise SpecError(
            f"layer {index} is a mixture of experts already; upcycling starts from a dense model"
        )
    if layer.shared is not None:
        raise SpecError(
            "an upcycled layer has no shared expert, which would add to what the dense layer "
            "computes; leave shared out"
        )
    bank = layer.experts
    if not isinstance(bank, FeedForwardSpec) or bank.replace(count=1) != part:
        raise SpecError(
            f"experts that are copies of layer {index} are {part.replace(count=8)} or any other "
            f"count of them; got {bank}"
        )


def _copied(name: str, dense: Tensor, sparse: Tensor) -> Tensor:
    """The dense tensor, once an expert if it belongs to a bank."""
    return dense.expand_as(sparse) if EXPERTS in name else dense
