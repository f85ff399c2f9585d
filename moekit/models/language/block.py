"""One block: attention and a feed-forward part, each of them dense or a mixture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from moekit.experts import FeedForwardSpec
from moekit.layer import MoE, MoEOutput, MoESpec
from moekit.models.language.attention import MoEDecoderAttention, Rotation
from moekit.models.language.attention_mixture import AttentionMixture
from moekit.models.language.config import BlockSpec, LayerSpec, MoEDecoderConfig
from moekit.residual import Plain, ResidualSpec
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


Records = tuple[MoEOutput, ...]
"""The records of a block's mixtures: that of attention, then that of the feed-forward part."""


class MoEDecoderLayer(GradientCheckpointingLayer):
    """One block: ``x += attention(norm(x))``, then ``x += feed_forward(norm(x))``.

    The sum after a mixture follows the residual rule of its spec.
    """

    def __init__(
        self, config: MoEDecoderConfig, index: int, spec: BlockSpec, previous_experts: int | None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.self_attn = _attention(config, index, spec.attention, previous_experts)
        below = spec.after_attention(previous_experts)
        self.mlp = _feed_forward(spec.feed_forward, config, below)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self._residuals = [_residual(part) for part in (spec.attention, spec.feed_forward)]

    @property
    def mixtures(self) -> list[MoE]:
        """The block's MoE layers: that of attention, then that of the feed-forward part."""
        attention = [self.self_attn.mixture] if isinstance(self.self_attn, AttentionMixture) else []
        return attention + ([self.mlp] if isinstance(self.mlp, MoE) else [])

    def forward(
        self,
        x_BTD: Tensor,
        carry: Carry,
        signals: Signals,
        rotation: Rotation | None,
        allowed: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Carry, Records]:
        """The block's output, what the next block is handed, and the records of its mixtures.

        A dense part hands ``carry`` on as it is and has no record.
        """
        x_BTD, carry, first = self._attend(x_BTD, carry, signals, rotation, allowed, **kwargs)
        x_BTD, carry, second = self._feed_forward(x_BTD, carry, signals)
        return x_BTD, carry, first + second

    def _attend(
        self,
        x_BTD: Tensor,
        carry: Carry,
        signals: Signals,
        rotation: Rotation | None,
        allowed: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Carry, Records]:
        attention, norm = self.self_attn, self.input_layernorm
        if not isinstance(attention, AttentionMixture):
            attended, _ = attention(norm(x_BTD), rotation, **kwargs)
            return x_BTD + attended, carry, ()
        return _mixed(
            x_BTD,
            carry,
            self._residuals[0],
            lambda ahead: attention(norm(ahead), signals, carry, allowed, **kwargs)[0],
        )

    def _feed_forward(
        self, x_BTD: Tensor, carry: Carry, signals: Signals
    ) -> tuple[Tensor, Carry, Records]:
        part, norm = self.mlp, self.post_attention_layernorm
        if not isinstance(part, MoE):
            return x_BTD + part(norm(x_BTD)), carry, ()
        return _mixed(
            x_BTD, carry, self._residuals[1], lambda ahead: part(norm(ahead), signals, carry)
        )


def _mixed(
    x_BTD: Tensor, carry: Carry, residual: ResidualSpec, run: Callable[[Tensor], MoEOutput]
) -> tuple[Tensor, Carry, Records]:
    """Add a mixture's output to the hidden state by its residual rule."""
    output = run(residual.look_ahead(x_BTD, carry.momentum))
    delta_BTD, momentum = residual.increment(x_BTD, output.y, carry.momentum)
    return x_BTD + delta_BTD, output.carry.replace(momentum=momentum), (_record(output),)


def _attention(
    config: MoEDecoderConfig, index: int, spec: MoESpec | None, previous_experts: int | None
) -> MoEDecoderAttention | AttentionMixture:
    if spec is None:
        return MoEDecoderAttention(config, index)
    return AttentionMixture(config, index, spec, previous_experts)


def _feed_forward(
    spec: LayerSpec, config: MoEDecoderConfig, previous_experts: int | None
) -> MoE | DenseFeedForward:
    if isinstance(spec, FeedForwardSpec):
        return DenseFeedForward(spec, config.hidden_size)
    return spec.build(config.hidden_size, previous_experts, config.vocab_size)


def _residual(part: LayerSpec | None) -> ResidualSpec:
    return part.residual if isinstance(part, MoESpec) else Plain()


def _record(output: MoEOutput) -> MoEOutput:
    """The output without the tensors of the hidden states' size, which would pile up."""
    return replace(output, y=output.y.new_empty(0, output.y.shape[-1]), carry=Carry())


def _only(bias_EO: Tensor | None) -> Tensor | None:
    return None if bias_EO is None else bias_EO[0]
