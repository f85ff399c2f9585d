"""Dense architectures, and the mixtures that compute the same with their experts all alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from transformers import (
    MixtralConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from moekit.errors import SpecError
from moekit.spec import Spec


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


def mixture_config(config: PreTrainedConfig, spec: Upcycling) -> PreTrainedConfig:
    """The config of the mixture that a dense model with ``config`` becomes.

    Raises:
        SpecError: the architecture has no counterpart that computes the same, or the spec asks for
            what the counterpart cannot express.
    """
    kind = config.model_type
    if kind not in FAMILIES:
        raise SpecError(
            f"a {kind!r} model cannot be upcycled; wanted a dense model of {', '.join(FAMILIES)}, "
            "or a decoder of moekit's"
        )
    made = FAMILIES[kind](config, spec)
    made.dtype = config.dtype
    return made


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


def _qwen2_moe(config: Any, spec: Upcycling) -> PreTrainedConfig:
    """Its shared expert starts at zero: what it adds is learned."""
    return Qwen2MoeConfig(
        **_common(config),
        **_qwen_mixture(config, spec),
        shared_expert_intermediate_size=config.intermediate_size,
    )


def _qwen3_moe(config: Any, spec: Upcycling) -> PreTrainedConfig:
    return Qwen3MoeConfig(
        **_common(config), **_qwen_mixture(config, spec), attention_bias=config.attention_bias
    )


def _qwen_mixture(config: Any, spec: Upcycling) -> dict[str, Any]:
    if getattr(config, "use_sliding_window", False):
        raise SpecError("the model has sliding windows in some layers, which its mixture has not")
    depth = config.num_hidden_layers
    chosen = spec.chosen(depth)
    if not chosen:
        raise SpecError(f"layers is {spec.layers!r}, which is none of {depth}")
    return {
        "num_experts": spec.experts,
        "num_experts_per_tok": spec.k,
        "moe_intermediate_size": config.intermediate_size,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [index for index in range(depth) if index not in chosen],
    }


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


FAMILIES: dict[str, Callable[[Any, Upcycling], PreTrainedConfig]] = {
    "llama": _mixtral,
    "mistral": _mixtral,
    "qwen2": _qwen2_moe,
    "qwen3": _qwen3_moe,
}
