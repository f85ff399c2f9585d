"""The decoder with an output projection, its losses, and generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerationMixin
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from moekit.errors import SpecError
from moekit.layer import MoE
from moekit.models.language.block import DenseFeedForward
from moekit.models.language.config import MoEDecoderConfig, check_causal_model
from moekit.models.language.decoder import (
    AttentionMask,
    MoEDecoderModel,
    MoEDecoderPreTrainedModel,
    valid_tokens,
)
from moekit.models.language.output import MoECausalLMOutput, MoEDecoderOutput
from moekit.routing import Load, LossSite, RoutingLosses

logger = logging.get_logger(__name__)

IGNORED = -100
"""Label of positions that are no target, as everywhere in transformers."""


class MoEDecoderForCausalLM(MoEDecoderPreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """A causal language model whose every part is dense or a mixture of experts.

    Checkpoints are ordinary ones of transformers. ``generate`` works with every option; a model
    with a router that is not causal generates too, but routes otherwise than in training. Routers
    that decide for whole sequences are refused.

    Attributes:
        model: the decoder.
        lm_head: the output projection.
        routing_losses: the routing losses of all MoE layers.

    Example:
        >>> from moekit import MoESpec, SwiGLU, TopK
        >>> config = MoEDecoderConfig(
        ...     vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        ...     layers=MoESpec(TopK(k=2), SwiGLU(count=4, hidden=32)),
        ... )
        >>> model = MoEDecoderForCausalLM(config)
        >>> ids = torch.randint(0, 100, (1, 8))
        >>> model(ids, labels=ids).logits.shape
        torch.Size([1, 8, 100])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MoEDecoderConfig) -> None:
        check_causal_model(config.mixture_specs)
        super().__init__(config)
        self.model = MoEDecoderModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        layers = zip(config.mixture_specs, self.moe_layers, strict=True)
        self.routing_losses = RoutingLosses(
            [LossSite(spec.losses, layer.router) for spec, layer in layers]
        )
        _warn_if_not_causal(config)
        self.post_init()  # type: ignore[no-untyped-call]

    @property
    def moe_layers(self) -> list[MoE]:
        """The MoE layers, from the first to the last; attention comes before feed-forward parts."""
        return [mixture for layer in self.model.layers for mixture in layer.mixtures]

    @property
    def dense_layers(self) -> list[DenseFeedForward]:
        """The dense feed-forward layers, from the first to the last."""
        parts = [layer.mlp for layer in self.model.layers]
        return [part for part in parts if isinstance(part, DenseFeedForward)]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: AttentionMask = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> MoECausalLMOutput:
        """Next-token logits, and losses when ``labels`` are given.

        Args:
            labels: (B, T), usually equal to ``input_ids``; shifted here. -100 is no target.
            logits_to_keep: compute the logits of the last so many positions alone, or of the
                positions in this index tensor; 0 for all.
            num_items_in_batch: number of targets in the whole optimiser step, when this batch is
                one of several that are accumulated. The loss is then this batch's share of the
                step's mean loss, routing losses included.

        The other arguments are those of :meth:`MoEDecoderModel.forward`.
        """
        outputs: MoEDecoderOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            task_ids=task_ids,
            **kwargs,
        )
        assert outputs.last_hidden_state is not None
        assert outputs.moe is not None
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = cross_entropy = None
        values: dict[str, Tensor] = {}
        if labels is not None:
            routings = [record.routing for record in outputs.moe]
            routing_loss, values = self.routing_losses(routings)
            targets = _targets(labels, kwargs.pop("shift_labels", None), attention_mask)
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                shift_labels=targets,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
                **kwargs,
            )
            share = _share(targets, num_items_in_batch)
            cross_entropy = loss / share
            if self.training:
                loss = loss + self.routing_losses.mean_over_ranks(share) * routing_loss
        return MoECausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_entropy=cross_entropy,
            routing_losses=values,
            moe=outputs.moe,
        )

    @torch.no_grad()
    def update_routing(self, loads: Sequence[Load]) -> None:
        """Let routers and loss controllers change their state; once an optimiser step.

        Args:
            loads: the load of each MoE layer in order, summed over the step's micro-batches and
                ranks; :meth:`moekit.routing.Load.of` counts one routing.

        Raises:
            SpecError: there is not one load for each MoE layer.
        """
        layers = self.moe_layers
        if len(loads) != len(layers):
            raise SpecError(
                f"update_routing got {len(loads)} loads for {len(layers)} MoE layers; "
                "give one for each, in order"
            )
        for layer, load in zip(layers, loads, strict=True):
            layer.router.update(load)
        self.routing_losses.update(loads)


def _targets(labels: Tensor, shift_labels: Tensor | None, attention_mask: AttentionMask) -> Tensor:
    """The label (B, T) that each position predicts; padding predicts nothing.

    Left padding comes before the first token, which without padding is nobody's target.
    """
    targets = shift_labels
    if targets is None:
        targets = nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORED)
    valid_BT = valid_tokens(attention_mask, targets.shape[-1])
    return targets if valid_BT is None else targets.masked_fill(~valid_BT, IGNORED)


def _share(targets: Tensor, step_targets: Tensor | int | None) -> Tensor | float:
    """This batch's share of the targets of the optimiser step."""
    if step_targets is None:
        return 1.0
    return (targets != IGNORED).sum() / step_targets


def _warn_if_not_causal(config: MoEDecoderConfig) -> None:
    if not config.is_causal_routing:
        logger.warning(
            "A router of this model looks at later tokens: its loss on text is flattered, and "
            "generation, which sees no later tokens, routes differently from training."
        )
