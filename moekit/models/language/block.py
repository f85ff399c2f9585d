"""One block: attention, and a dense or mixture-of-experts feed-forward part."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from moekit.errors import SignalError
from moekit.experts import FeedForwardSpec
from moekit.layer import MoE, MoEOutput
from moekit.models.language.attention import MoEDecoderAttention, Rotation
from moekit.models.language.config import LayerSpec, MoEDecoderConfig
from moekit.models.language.routing_signals import with_attention
from moekit.residual import Plain
from moekit.routing import Carry, Signals


class DenseFeedForward(nn.Module):
    """A bank of one feed-forward expert that every token passes: an ordinary dense layer."""

    def __init__(self, spec: FeedForwardSpec, width: int) -> None:
        super().__init__()
        self.experts = spec.build(width)

    def forward(self, x: Tensor) -> Tensor:
        """The output, of the shape of ``x`` (..., D)."""
        bank = self.experts
        inner = F.linear(x, bank.up_weight[0], _only(bank.up_bias))
        return F.linear(bank.activate(inner), bank.down_proj[0], _only(bank.down_bias))


class MoEDecoderLayer(GradientCheckpointingLayer):
    """One block: ``x += attention(norm(x))``, then ``x += feed_forward(norm(x))``.

    The second sum of an MoE block follows the spec's residual rule.
    """

    def __init__(
        self,
        config: MoEDecoderConfig,
        index: int,
        spec: LayerSpec,
        previous_experts: int | None,
        continues_momentum: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.self_attn = MoEDecoderAttention(config, index)
        self.mlp = _feed_forward(spec, config, previous_experts)
        self.residual = Plain() if isinstance(spec, FeedForwardSpec) else spec.residual
        self.needs_momentum = continues_momentum and self.residual.tensors > 0
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, x_BTD: Tensor, carry: Carry, signals: Signals, rotation: Rotation, **kwargs: Any
    ) -> tuple[Tensor, Carry, MoEOutput | None]:
        """The block's output, what the next block is handed, and the MoE layer's record.

        A dense block hands ``carry`` on as it is and has no record.

        Raises:
            SignalError: ``carry`` lacks the momentum that a block below has handed on.
        """
        if self.needs_momentum and not carry.momentum:
            raise SignalError(
                f"{type(self.residual).__name__} starts without momentum at the first MoE layer "
                "only, and this is a later one; pass the carry that the block below returned"
            )
        attended, _, heads = self.self_attn(self.input_layernorm(x_BTD), rotation, **kwargs)
        x_BTD = x_BTD + attended
        if not isinstance(self.mlp, MoE):
            return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)), carry, None
        signals = with_attention(
            signals, self.mlp.router.requires, self.self_attn, heads, kwargs.get("past_key_values")
        )
        ahead_BTD = self.residual.look_ahead(x_BTD, carry.momentum)
        output: MoEOutput = self.mlp(self.post_attention_layernorm(ahead_BTD), signals, carry)
        delta_BTD, momentum = self.residual.increment(x_BTD, output.y, carry.momentum)
        return x_BTD + delta_BTD, output.carry.replace(momentum=momentum), _record(output)


def _feed_forward(
    spec: LayerSpec, config: MoEDecoderConfig, previous_experts: int | None
) -> MoE | DenseFeedForward:
    if isinstance(spec, FeedForwardSpec):
        return DenseFeedForward(spec, config.hidden_size)
    return spec.build(config.hidden_size, previous_experts, config.vocab_size)


def _record(output: MoEOutput) -> MoEOutput:
    """The output without the tensors of the hidden states' size, which would pile up."""
    return replace(output, y=output.y.new_empty(0, output.y.shape[-1]), carry=Carry())


def _only(bias_EO: Tensor | None) -> Tensor | None:
    return None if bias_EO is None else bias_EO[0]
