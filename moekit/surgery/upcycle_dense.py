"""Sparse upcycling of dense models of transformers: Llama, Mistral and Qwen3 become mixtures.

Each feed-forward part becomes experts that are copies of it (Komatsuzaki et al. 2022, arXiv
2212.05055); the combine weights of the chosen experts sum to 1, so that the mixture computes what
the dense model does, up to rounding, until it is trained. Copies all learn the same from the same
tokens; a part of each can be drawn anew (Drop-Upcycling, Nakamura et al. 2025, arXiv 2502.19261),
or noise be added.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from moekit.errors import CheckpointError, SpecError
from moekit.spec import Spec
from moekit.surgery.view import BlockView, block_views
from moekit.surgery.weights import ExpertWeights, RouterWeights

_CAUSAL: Any = AutoModelForCausalLM  # whose methods carry no types


@dataclass(frozen=True)
class Upcycling(Spec):
    """How a dense model becomes a mixture.

    Attributes:
        experts: experts of each mixture, E.
        k: experts a token.
        layers: which layers: ``all``, ``every-other`` (the second, the fourth, ...) or
            ``last-half``. Mixtral's architecture, which Llama and Mistral become, knows ``all``.
        router_std: standard deviation of the routers' weights.
        reinit: share of each expert's hidden neurons that is drawn anew, from the normal
            distribution of each weight's own mean and standard deviation; another part in each
            expert. More than 0 and the model no longer starts as the dense one.
        noise: standard deviation of noise on every expert weight, in those of the weight itself.
        seed: draws routers, neurons and noise.
    """

    experts: int = 8
    k: int = 2
    layers: Literal["all", "every-other", "last-half"] = "all"
    router_std: float = 0.02
    reinit: float = 0.0
    noise: float = 0.0
    seed: int = 0

    def check(self) -> None:
        self.require(self.experts >= 1, f"experts is {self.experts}; wanted at least 1")
        self.require(
            1 <= self.k <= self.experts, f"k is {self.k}; wanted 1 to {self.experts}, the experts"
        )
        self.require(self.router_std >= 0, f"router_std is {self.router_std}; wanted 0 or more")
        self.require(0 <= self.reinit <= 1, f"reinit is {self.reinit}; wanted a share, 0 to 1")
        self.require(self.noise >= 0, f"noise is {self.noise}; wanted 0 or more")

    def chosen(self, depth: int) -> list[int]:
        """The layers that become mixtures."""
        if self.layers == "every-other":
            return list(range(1, depth, 2))
        return list(range(depth // 2 if self.layers == "last-half" else 0, depth))


def upcycle_dense(model: PreTrainedModel, spec: Upcycling) -> PreTrainedModel:
    """A mixture made of a dense model, which is left as it is.

    Args:
        model: a causal language model of transformers: Llama and Mistral become Mixtral, Qwen3
            becomes Qwen3-MoE.
        spec: how.

    Raises:
        SpecError: the architecture has no counterpart that computes the same, or the spec asks for
            what the counterpart cannot express.
        CheckpointError: a weight is not finite; the message names it.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> dense = LlamaForCausalLM(LlamaConfig(
        ...     vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=2,
        ...     num_attention_heads=2, num_key_value_heads=2,
        ... ))
        >>> type(upcycle_dense(dense, Upcycling(experts=4))).__name__
        'MixtralForCausalLM'
    """
    kind = model.config.model_type
    if kind not in _FAMILIES:
        raise SpecError(
            f"{type(model).__name__} cannot be upcycled; wanted a dense model of "
            f"{', '.join(_FAMILIES)}"
        )
    _require_finite(model)
    config = _FAMILIES[kind](model.config, spec)
    with torch.device("meta"):
        grown = _CAUSAL.from_config(config, dtype=model.dtype)
    grown.to_empty(device="cpu")
    _copy_dense(model, grown)
    grown.tie_weights()
    generator = torch.Generator().manual_seed(spec.seed)
    layers = model.get_submodule(f"{model.base_model_prefix}.layers")
    for view in block_views(grown):
        _fill(view, layers.get_submodule(f"{view.index}.mlp"), spec, generator)
    grown.generation_config = model.generation_config
    grown.eval()
    return grown


def _require_finite(model: PreTrainedModel) -> None:
    for name, value in model.named_parameters():
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f"{name} of the dense model holds NaN or infinite values; start from a sound one"
            )


def _copy_dense(model: PreTrainedModel, grown: PreTrainedModel) -> None:
    """Every tensor that both models have; buffers too, which hold the rotary frequencies."""
    old = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, value in (*grown.named_parameters(), *grown.named_buffers()):
            if name in old:
                value.copy_(old[name])


@torch.no_grad()
def _fill(view: BlockView, part: Any, spec: Upcycling, generator: torch.Generator) -> None:
    """Copies of a feed-forward part in place of a block's experts, and a router."""
    projections = (part.gate_proj.weight, part.up_proj.weight, part.down_proj.weight.T)
    hidden = part.gate_proj.weight.shape[0]
    for expert in range(spec.experts):
        weights = [weight.detach().cpu().clone() for weight in projections]  # rows are neurons
        if spec.reinit:
            drawn = torch.randperm(hidden, generator=generator)[: round(spec.reinit * hidden)]
            for weight in weights:
                weight[drawn] = _normal(weight[drawn], weight, generator)
        if spec.noise:
            weights = [_noisy(weight, spec.noise, generator) for weight in weights]
        gate, up, down = weights
        view.set_expert(expert, ExpertWeights(gate=gate, up=up, down=down.T))
    own = view.router
    drawn_ED = spec.router_std * torch.randn(own.weight.shape, generator=generator)
    view.set_router(RouterWeights(drawn_ED.to(own.weight.dtype)))


def _noisy(weight: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    values = weight.float()
    drawn = torch.randn(values.shape, generator=generator)
    return (values + noise * values.std() * drawn).to(weight.dtype)


def _normal(like: Tensor, of: Tensor, generator: torch.Generator) -> Tensor:
    """Draws of the shape of one tensor from the normal distribution of another one's entries."""
    values = of.float()
    found = torch.randn(like.shape, generator=generator) * values.std() + values.mean()
    return found.to(like.dtype)


def _mixtral(config: Any, spec: Upcycling) -> PreTrainedConfig:
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False):
            raise SpecError(f"the model has {name}, which Mixtral's architecture has not")
    if spec.layers != "all":
        raise SpecError(f"layers is {spec.layers!r}; every layer of Mixtral is a mixture: all")
    return MixtralConfig(
        **_common(config),
        sliding_window=getattr(config, "sliding_window", None),
        num_local_experts=spec.experts,
        num_experts_per_tok=spec.k,
    )


def _qwen3_moe(config: Any, spec: Upcycling) -> PreTrainedConfig:
    if getattr(config, "use_sliding_window", False):
        raise SpecError("the model has sliding windows in some layers, which Qwen3-MoE has not")
    depth = config.num_hidden_layers
    chosen = spec.chosen(depth)
    if not chosen:
        raise SpecError(f"layers is {spec.layers!r}, which is none of {depth}")
    return Qwen3MoeConfig(
        **_common(config),
        attention_bias=config.attention_bias,
        num_experts=spec.experts,
        num_experts_per_tok=spec.k,
        moe_intermediate_size=config.intermediate_size,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[index for index in range(depth) if index not in chosen],
    )


_SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
)


def _common(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in _SHARED if hasattr(config, name)}


_FAMILIES: dict[str, Callable[[Any, Upcycling], PreTrainedConfig]] = {
    "llama": _mixtral,
    "mistral": _mixtral,
    "qwen3": _qwen3_moe,
}
