"""A decoder like another one but for some of its mixtures."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moekit.layer import MoE, MoESpec
from moekit.models.language import MoEDecoderConfig, MoEDecoderForCausalLM

Part = Literal["attention", "feed_forward"]


@dataclass(frozen=True)
class Mixture:
    """One MoE layer of a decoder.

    Attributes:
        name: its path in the model, which starts the names of its parameters.
        block: number of its block.
        part: which part of the block it is.
        layer: the module.
        spec: what it was built from.
    """

    name: str
    block: int
    part: Part
    layer: MoE
    spec: MoESpec


def mixtures(model: MoEDecoderForCausalLM) -> Iterator[Mixture]:
    """The mixtures of a decoder, in the order of ``moe_layers``."""
    name_of = {id(module): name for name, module in model.named_modules()}
    layers = iter(model.moe_layers)
    for index, block in enumerate(model.config.block_specs):
        for spec in block.mixtures:
            layer = next(layers)
            part: Part = "attention" if spec is block.attention else "feed_forward"
            yield Mixture(name_of[id(layer)], index, part, layer, spec)


def rebuilt(
    model: MoEDecoderForCausalLM,
    specs: Mapping[str, MoESpec],
    weights: Mapping[str, Tensor],
    seed: int = 0,
) -> MoEDecoderForCausalLM:
    """A copy of ``model`` with other mixtures.

    Args:
        specs: by name of a mixture, what it becomes; others stay.
        weights: what the copy's tensors of these names hold; all others are those of the same name
            in ``model``, or freshly drawn where it has none. States of losses start anew.
        seed: seed of what is drawn.
    """
    attention = [None if spec is None else spec.to_dict() for spec in model.config.attention_specs]
    layers = [spec.to_dict() for spec in model.config.layer_specs]
    for mixture in mixtures(model):
        if mixture.name in specs:
            place = attention if mixture.part == "attention" else layers
            place[mixture.block] = specs[mixture.name].to_dict()
    settings = model.config.to_dict() | {"layers": layers, "attention": attention}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        grown = MoEDecoderForCausalLM(MoEDecoderConfig.from_dict(settings))
    grown.to(device=model.device, dtype=model.dtype)  # type: ignore[call-arg]
    # Its frequencies are in no state dict and may be of a higher precision than the weights.
    grown.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)
    old = {n: v for n, v in model.state_dict().items() if not n.startswith("routing_losses")}
    state = {
        name: weights.get(name, old.get(name, value)) for name, value in grown.state_dict().items()
    }
    grown.load_state_dict(state)
    return grown.train(model.training)
