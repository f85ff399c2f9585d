"""The decoder: blocks of attention and a feed-forward part, each of them dense or a mixture."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_masks_for_generate
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from moekit.errors import SpecError
from moekit.experts import Adapter, Experts
from moekit.models.language.attention import MoEDecoderAttention, MoEDecoderRotaryEmbedding
from moekit.models.language.attention_mixture import AttentionMixture
from moekit.models.language.block import MoEDecoderLayer
from moekit.models.language.config import MoEDecoderConfig
from moekit.models.language.output import MoEDecoderOutput
from moekit.models.language.routing_signals import AS_SDPA, is_readable, visible_keys
from moekit.routing import Carry, Loss, Router, Sequences, Signals

AttentionMask = Tensor | dict[str, Tensor | None] | None


class MoEDecoderPreTrainedModel(PreTrainedModel):
    """How decoders are initialised, loaded and checkpointed."""

    config: MoEDecoderConfig
    config_class = MoEDecoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MoEDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False  # the number of rows an expert gets is read back to the host
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": MoEDecoderLayer,
        "attentions": [MoEDecoderAttention, AttentionMixture],
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise ``module``, but nothing in it that a checkpoint has filled already."""
        if not isinstance(module, Router | Experts | Loss | Adapter):
            super()._init_weights(module)  # type: ignore[no-untyped-call]
            return
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        loaded = [t for t in tensors if getattr(t, "_is_hf_initialized", False)]
        if len(loaded) == len(tensors):
            return
        values = [t.clone() for t in loaded]
        module.reset_parameters(self.config.initializer_range)
        for tensor, value in zip(loaded, values, strict=True):
            tensor.copy_(value)

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        keywords = getattr(gradient_checkpointing_func, "keywords", {})
        if enable and keywords.get("use_reentrant"):
            raise SpecError(
                "gradient checkpointing with use_reentrant=True loses the gradients of routing "
                "losses and of gating residuals; leave use_reentrant out or set it to False"
            )
        function = partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, function, every_n_layers)

    @staticmethod
    def create_masks_for_generate(
        config: MoEDecoderConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor | None]:
        """Masks that ``generate`` prepares for static caches, with the padding that routers need.

        A prepared causal mask no longer tells which of its queries are padding, and not every
        attention implementation has one that routers can read.
        """
        given = (inputs_embeds, attention_mask, past_key_values, position_ids)
        mask = visible = create_masks_for_generate(config, *given, **kwargs)
        if not is_readable(config):
            visible = create_masks_for_generate(AS_SDPA, *given, **kwargs)
        valid_BT = valid_tokens(attention_mask, inputs_embeds.shape[1])
        return {"full_attention": mask, "visible": visible, "valid": valid_BT}


class MoEDecoderModel(MoEDecoderPreTrainedModel):  # type: ignore[no-untyped-call]
    """The decoder without its output projection."""

    def __init__(self, config: MoEDecoderConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(_layers(config))
        self.has_dense_attention = any(spec is None for spec in config.attention_specs)
        self.has_attention_mixture = any(spec is not None for spec in config.attention_specs)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MoEDecoderRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()  # type: ignore[no-untyped-call]

    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: AttentionMask = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> MoEDecoderOutput:
        """Hidden states of the last block, normalised.

        Args:
            input_ids: token ids (B, T).
            attention_mask: (B, past + T), 0 for padding. Padding takes part in nothing: not in
                attention, not in routing, capacity, losses or statistics. Without a mask every
                row is a token; all-ones masks cost a little, so leave them out.
            position_ids: (B, T); None counts on from the cache. Positions that start again at 0
                within a row, without mask and cache, mark packed sequences, which do not attend
                to each other.
            past_key_values: the KV cache of earlier tokens.
            inputs_embeds: (B, T, D) in place of ``input_ids``; routers by token id refuse it.
            use_cache: whether to return a KV cache; None for the config's choice.
            task_ids: (B,), the task of each sequence, for routers that decide by task.

        Raises:
            SpecError: the cache holds earlier tokens, and a router needs their hidden states.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, and not both")
        self._check_cache(past_key_values)
        x_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        given = (x_BTD, attention_mask, past_key_values, position_ids)
        shared = self._attention_inputs(*given)
        signals = _signals(x_BTD, input_ids, attention_mask, task_ids)
        if self._needs_sequences:
            sequences = Sequences(len(x_BTD), shared["visible_BTS"])
            signals = signals.replace(sequences=sequences)
        shared |= {"signals": signals, **kwargs}
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        shared["past_key_values"] = past_key_values
        carry, records = Carry(), []
        for layer in self.layers:
            x_BTD, carry, found = layer(x_BTD, carry, **shared)
            records += found
        return MoEDecoderOutput(
            last_hidden_state=self.norm(x_BTD),
            past_key_values=past_key_values if use_cache else None,
            moe=tuple(records),
        )

    @property
    def _needs_sequences(self) -> bool:
        """Whether a router looks at other tokens of its sequence."""
        blocks = (layer for layer in self.layers if isinstance(layer, MoEDecoderLayer))
        mixtures = (mixture for block in blocks for mixture in block.mixtures)
        return any("sequences" in mixture.router.requires for mixture in mixtures)

    def _check_cache(self, cache: Cache | None) -> None:
        if cache is None or not self.config.routing_needs_past:
            return
        if cache.get_seq_length() > 0:
            raise SpecError(
                "a router of this model looks at the hidden states of earlier tokens, which a KV "
                "cache does not keep; pass use_cache=False"
            )

    def _attention_inputs(
        self,
        x_BTD: Tensor,
        attention_mask: AttentionMask,
        cache: Cache | None,
        positions: Tensor | None,
    ) -> dict[str, Any]:
        """What attention of the kinds that this model has is given, made once for all blocks."""
        given = (x_BTD, attention_mask, cache, positions)
        position_ids = _positions(x_BTD, cache) if positions is None else positions
        mask = self._causal_mask(*given)
        read = self.has_attention_mixture or self._needs_sequences
        dense = self.has_dense_attention
        return {
            "attention_mask": mask,
            "visible_BTS": visible_keys(self.config, *given, mask) if read else None,
            "position_ids": position_ids,
            "rotation": self.rotary_emb(x_BTD, position_ids) if dense else None,
        }

    def _causal_mask(
        self,
        x_BTD: Tensor,
        attention_mask: AttentionMask,
        cache: Cache | None,
        positions: Tensor | None,
    ) -> Any:
        """What the attention implementation takes as its mask.

        Only the caller's own positions can mark packed sequences, and looking for those reads a
        flag back to the host, so positions that merely count on are not passed.
        """
        if isinstance(attention_mask, dict):  # prepared by ``create_masks_for_generate``
            return attention_mask["full_attention"]
        if not x_BTD.numel():
            return None
        return create_causal_mask(
            config=self.config,
            inputs_embeds=x_BTD,
            attention_mask=attention_mask,
            past_key_values=cache,
            position_ids=positions,
        )


def _layers(config: MoEDecoderConfig) -> Iterable[MoEDecoderLayer]:
    previous: int | None = None
    momentum = False
    for index, spec in enumerate(config.block_specs):
        yield MoEDecoderLayer(config, index, spec, previous, momentum)
        previous = spec.handed_on(previous)
        momentum = momentum or any(part.residual.tensors > 0 for part in spec.mixtures)


def _positions(x_BTD: Tensor, cache: Cache | None) -> Tensor:
    seen = 0 if cache is None else cache.get_seq_length()
    return (torch.arange(x_BTD.shape[1], device=x_BTD.device) + seen)[None]


def _signals(
    x_BTD: Tensor,
    input_ids: Tensor | None,
    attention_mask: AttentionMask,
    task_ids: Tensor | None,
) -> Signals:
    batch, length = x_BTD.shape[:2]
    valid_BT = valid_tokens(attention_mask, length)
    scope_B1 = torch.arange(batch, device=x_BTD.device)[:, None]
    return Signals(
        valid_N=None if valid_BT is None else valid_BT.flatten(),
        token_id_N=None if input_ids is None else input_ids.flatten(),
        scope_N=scope_B1.expand(batch, length).flatten(),
        scopes=batch,
        task_S=task_ids,
    )


def valid_tokens(attention_mask: AttentionMask, length: int) -> Tensor | None:
    """Which of the last ``length`` positions (B, T) are tokens, where the mask tells."""
    if isinstance(attention_mask, dict):
        return attention_mask.get("valid")
    if attention_mask is None or attention_mask.dim() != 2:
        return None
    return attention_mask[:, attention_mask.shape[1] - length :].bool()
