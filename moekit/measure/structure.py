"""What the parameters of a model do, of moekit or of transformers."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from moekit.layer import MoE, MoESpec
from moekit.measure.gates import expert_blocks
from moekit.measure.parameters import parameter_counts
from moekit.models.language import MoEDecoderForCausalLM
from moekit.routing.router import ZERO_COMPUTATION

PARTS = (
    "embedding",
    "attention",
    "router",
    "experts",
    "shared experts",
    "dense feed-forward",
    "norm",
    "head",
    "other",
)
"""What parameters are counted under; an output projection tied to the embedding is not counted."""


@dataclass(frozen=True)
class LayerStructure:
    """One MoE layer.

    Attributes:
        name: path of its block in the model.
        experts: number of experts, zero-computation ones included.
        top_k: experts a token, of those with matrix products; a mean where it varies.
        expert_parameters: parameters of one expert with matrix products, in the mean.
        shared_parameters: parameters of experts that every token passes.
    """

    name: str
    experts: int
    top_k: float
    expert_parameters: float
    shared_parameters: int


def moe_layers(model: PreTrainedModel) -> tuple[LayerStructure, ...]:
    """The MoE layers of a model in order."""
    if isinstance(model, MoEDecoderForCausalLM):
        return _own_layers(model)
    layers = []
    for name, block in expert_blocks(model).items():
        experts = block.number_of_experts()
        layers.append(
            LayerStructure(
                name=name,
                experts=experts,
                top_k=block.top_k(model.config.get_text_config()),
                expert_parameters=_size(block.experts) / experts,
                shared_parameters=sum(_size(m) for m in _shared(block.module)),
            )
        )
    return tuple(layers)


def _own_layers(model: MoEDecoderForCausalLM) -> tuple[LayerStructure, ...]:
    name_of = {id(module): name for name, module in model.named_modules()}
    pairs = zip(model.moe_layers, model.config.mixture_specs, strict=True)
    return tuple(_own_layer(name_of[id(layer)], layer, spec) for layer, spec in pairs)


def _own_layer(name: str, layer: MoE, spec: MoESpec) -> LayerStructure:
    kinds = spec.experts.expert_kinds()
    sizes = zip(spec.experts.parameters_E(layer.experts.width), kinds, strict=True)
    computing = [size for size, kind in sizes if kind not in ZERO_COMPUTATION]
    return LayerStructure(
        name=name,
        experts=len(kinds),
        top_k=spec.expected_load(),
        expert_parameters=sum(computing) / len(computing),
        shared_parameters=sum(_size(m) for m in _shared(layer)),
    )


def active_parameters(model: PreTrainedModel) -> int:
    """Parameters that one token uses: all but experts, and top-k of the experts."""
    if isinstance(model, MoEDecoderForCausalLM):
        return parameter_counts(model).active
    layers = moe_layers(model)
    unused = sum((layer.experts - layer.top_k) * layer.expert_parameters for layer in layers)
    return _size(model) - round(unused)


def parameters_by_part(model: PreTrainedModel) -> dict[str, int]:
    """Parameters by part; a tied one counts where it comes first."""
    heads = {id(p) for p in _parameters(model.get_output_embeddings())}  # type: ignore[no-untyped-call]
    embeddings = {id(p) for p in _parameters(model.get_input_embeddings())}
    blocks = expert_blocks(model)
    routers = {id(p) for block in blocks.values() for p in block.gate.parameters()}
    experts = {id(p) for block in blocks.values() for p in block.experts.parameters()}
    known = [
        ("embedding", embeddings), ("head", heads), ("router", routers), ("experts", experts)
    ]  # fmt: skip
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        part = next((part for part, members in known if id(parameter) in members), None)
        counts[part or _part_by_name(model, name)] += parameter.numel()
    return counts


_NAMED = (
    ("shared experts", re.compile(r"shared")),
    ("attention", re.compile(r"attn|attention")),
    ("dense feed-forward", re.compile(r"mlp|feed_forward|ffn|fc\d|\bwi\b|\bwo\b|moe")),
)


def _part_by_name(model: nn.Module, name: str) -> str:
    owner, _, _ = name.rpartition(".")
    if "Norm" in type(model.get_submodule(owner)).__name__:
        return "norm"
    return next((part for part, pattern in _NAMED if pattern.search(name)), "other")


def _shared(block: nn.Module) -> list[nn.Module]:
    return [child for name, child in block.named_children() if "shared" in name]


def _parameters(module: nn.Module | None) -> list[nn.Parameter]:
    return [] if module is None else list(module.parameters())


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
