"""The architectures that can be operated on, each in a few lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from moekit.errors import SpecError
from moekit.experts import FeedForwardSpec
from moekit.experts.feed_forward import FeedForwardExperts
from moekit.layer import MoE, MoESpec
from moekit.models.language import MoEDecoderConfig
from moekit.routing import Routing, TopK
from moekit.surgery import stored_names as stored
from moekit.surgery.view_architecture import Architecture, RoutingRule
from moekit.surgery.weights import ExpertWeights, RouterWeights


@dataclass(frozen=True)
class DeepseekV2(Architecture):
    """Groups count only under the routing method that looks at them."""

    def groups(self, config: PreTrainedConfig) -> tuple[int, int]:
        limited = config.topk_method == "group_limited_greedy"
        return super().groups(config) if limited else (1, 1)


@dataclass(frozen=True)
class GptOss(Architecture):
    """Transposed matrices with gate and up in turns, biases, and a clamped activation."""

    def experts(self, block: Any) -> ExpertWeights:
        bank = block.experts
        both_EPD = bank.gate_up_proj.detach().transpose(1, 2)
        both_bias_EP = bank.gate_up_proj_bias.detach()
        return ExpertWeights(
            up=both_EPD[:, 1::2],
            down=bank.down_proj.detach().transpose(1, 2),
            gate=both_EPD[:, ::2],
            gate_bias=both_bias_EP[:, ::2],
            up_bias=both_bias_EP[:, 1::2],
            down_bias=bank.down_proj_bias.detach(),
        )

    def pack_experts(self, bank: ExpertWeights) -> dict[str, Tensor]:
        assert bank.gate is not None
        assert bank.gate_bias is not None
        assert bank.up_bias is not None
        assert bank.down_bias is not None
        both_EPD = torch.stack([bank.gate, bank.up], dim=2).flatten(1, 2)
        return {
            "experts.gate_up_proj": both_EPD.transpose(1, 2),
            "experts.gate_up_proj_bias": torch.stack([bank.gate_bias, bank.up_bias], dim=2).flatten(
                1, 2
            ),
            "experts.down_proj": bank.down.transpose(1, 2),
            "experts.down_proj_bias": bank.down_bias,
        }

    def activate(self, block: Any, gate: Tensor | None, up: Tensor) -> Tensor:
        assert gate is not None
        limit = block.experts.limit
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * gate * torch.sigmoid(gate * block.experts.alpha)


@dataclass(frozen=True)
class GraniteMoeShared(Architecture):
    """Granite with a shared expert of fused projections beside the block."""

    def shared_experts(self, layer: Any) -> ExpertWeights | None:
        module = layer.shared_mlp
        if module is None:
            return None
        gate_HD, up_HD = module.input_linear.weight.detach().chunk(2)
        return ExpertWeights(up=up_HD, down=module.output_linear.weight.detach(), gate=gate_HD)


@dataclass(frozen=True)
class OwnDecoder(Architecture):
    """moekit's decoder, with top-k over one feed-forward bank."""

    def is_moe(self, layer: nn.Module) -> bool:
        return isinstance(layer.mlp, MoE)

    def check(self, layer: Any) -> None:
        bank, router = layer.mlp.experts, layer.mlp.router
        spec = getattr(router, "spec", None)
        if type(spec) is not TopK or not isinstance(bank, FeedForwardExperts) or spec.noise:
            raise SpecError(
                "experts of a moekit decoder can be operated on under TopK without noise over one "
                f"feed-forward bank; this layer has {type(router).__name__} over "
                f"{type(bank).__name__}"
            )

    def rule(self, config: PreTrainedConfig, block: Any) -> RoutingRule:
        spec: TopK = block.router.spec
        room = -(-spec.k // spec.top_groups)
        per_group = 2 if spec.groups > 1 and spec.group_score == "top2" else 1
        return RoutingRule(
            top_k=spec.k,
            normalised=spec.normalize != "none",
            scale=spec.scale,
            groups=spec.groups,
            smallest=max(spec.k, spec.groups * max(room, per_group)),
            score=spec.score,
        )

    def experts(self, block: Any) -> ExpertWeights:
        return _bank_weights(block.experts)

    def pack_experts(self, bank: ExpertWeights) -> dict[str, Tensor]:
        first = {"experts.up_proj": bank.up}
        bias = bank.up_bias
        if bank.gate is not None:
            first = {"experts.gate_up_proj": torch.cat([bank.gate, bank.up], dim=1)}
        if bank.gate_bias is not None and bias is not None:
            bias = torch.cat([bank.gate_bias, bias], dim=1)
        tensors = {**first, "experts.down_proj": bank.down}
        biases = {"experts.up_bias": bias, "experts.down_bias": bank.down_bias}
        return tensors | {name: value for name, value in biases.items() if value is not None}

    def router_weights(self, block: Any) -> RouterWeights:
        router = block.router
        bias = None if router.bias is None else router.bias.detach()
        return RouterWeights(
            router.weight.detach(), bias, getattr(router, "correction_bias_E", None)
        )

    def pack_router(self, weights: RouterWeights) -> dict[str, Tensor]:
        names = {"weight": "weight", "bias": "bias", "correction": "correction_bias_E"}
        return {f"router.{names[name]}": value for name, value in weights.items()}

    def experts_module(self, block: nn.Module) -> nn.Module:
        return block.get_submodule("dispatch")

    def shared_experts(self, layer: Any) -> ExpertWeights | None:
        shared = layer.mlp.shared
        return None if shared is None else _bank_weights(shared)[0]

    def activate(self, block: Any, gate: Tensor | None, up: Tensor) -> Tensor:
        both = up if gate is None else torch.cat([gate, up], dim=-1)
        return block.experts.activate(both)

    def read(self, name: str, output: Any) -> Routing:
        assert isinstance(output, Routing)
        return output

    def resized(self, config: PreTrainedConfig, counts: Sequence[int]) -> PreTrainedConfig:
        assert isinstance(config, MoEDecoderConfig)
        remaining = iter(counts)
        layers = [
            spec if isinstance(spec, FeedForwardSpec) else _with_count(spec, next(remaining))
            for spec in config.layer_specs
        ]
        settings = config.to_dict() | {"layers": [spec.to_dict() for spec in layers]}
        return MoEDecoderConfig.from_dict(settings)

    def handed_on(self, output: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return output[: len(args)]

    def skip(self, args: tuple[Any, ...]) -> Any:
        return (*args, ())


def _bank_weights(bank: FeedForwardExperts) -> ExpertWeights:
    first = bank.up_weight.detach()
    bias, down_bias = (None if b is None else b.detach() for b in (bank.up_bias, bank.down_bias))
    if not bank.spec.gated:
        return ExpertWeights(first, bank.down_proj.detach(), up_bias=bias, down_bias=down_bias)
    gate_EHD, up_EHD = first.chunk(2, dim=1)
    gate_bias, up_bias = (None, None) if bias is None else bias.chunk(2, dim=1)
    return ExpertWeights(up_EHD, bank.down_proj.detach(), gate_EHD, gate_bias, up_bias, down_bias)


def _with_count(spec: MoESpec, count: int) -> MoESpec:
    assert isinstance(spec.experts, FeedForwardSpec)
    return spec.replace(experts=spec.experts.replace(count=count))


_DEEPSEEK_GROUPS = ("n_group", "topk_group")

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture("mixtral", "num_local_experts", stored=stored.MIXTRAL),
    Architecture(
        "qwen2_moe",
        "num_experts",
        normalised="norm_topk_prob",
        shared="mlp.shared_expert",
        shared_gate="mlp.shared_expert_gate",
    ),
    Architecture("qwen3_moe", "num_local_experts", normalised="norm_topk_prob"),
    Architecture("olmoe", "num_experts", normalised="norm_topk_prob"),
    DeepseekV2(
        "deepseek_v2",
        "n_routed_experts",
        normalised=False,
        shared="mlp.shared_experts",
        group_keys=_DEEPSEEK_GROUPS,
    ),
    Architecture(
        "deepseek_v3",
        "n_routed_experts",
        normalised="norm_topk_prob",
        shared="mlp.shared_experts",
        group_keys=_DEEPSEEK_GROUPS,
        per_group=2,
        score="sigmoid",
    ),
    GptOss("gpt_oss", "num_local_experts", router="router", stored=stored.FUSED),
    Architecture(
        "granitemoe",
        "num_local_experts",
        block="block_sparse_moe",
        router="router",
        stored=stored.GRANITE,
    ),
    GraniteMoeShared(
        "granitemoeshared",
        "num_local_experts",
        block="block_sparse_moe",
        router="router",
        stored=stored.GRANITE,
    ),
    Architecture(
        "phimoe", "num_local_experts", router="router", normalised=False, stored=stored.PHIMOE
    ),
    OwnDecoder("moekit_decoder", "layers", router="router", stored=stored.FUSED),
)
"""Every architecture that can be operated on."""


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The architecture of a model with this config.

    Raises:
        SpecError: it is none of those supported, which the message lists.
    """
    kind = config.model_type
    for architecture in ARCHITECTURES:
        if architecture.model_type == kind:
            return architecture
    known = ", ".join(architecture.model_type for architecture in ARCHITECTURES)
    raise SpecError(f"experts of {kind!r} cannot be operated on; supported: {known}")
