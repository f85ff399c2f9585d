"""A model of transformers whose MoE blocks have numbers of experts of their own.

A config of transformers has one number of experts for all layers, and a router as many rows as
experts. Where pruning left another number in each layer, or a router with the rows of experts that
were merged, the model is this one: the original class with its blocks resized.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerationMixin

from moekit.errors import SpecError
from moekit.surgery.plan import BlockPlan
from moekit.surgery.view import block_views
from moekit.surgery.view_architectures import architecture_of


class PrunedMoEConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Configuration of :class:`PrunedMoEForCausalLM`.

    Attributes:
        text_config: the config of the model before, or its JSON.
        experts: experts of each MoE block, from the first to the last.
        router_rows: rows of each block's router; more than its experts where tokens choose among
            the old ones.
        slots: experts a token of each block whose router has other rows; 0 elsewhere.
    """

    model_type = "moekit_pruned"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012

    text_config: Any = None
    experts: list[int] | None = None
    router_rows: list[int] | None = None
    slots: list[int] | None = None
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.text_config, dict):
            settings = dict(self.text_config)
            kind = settings.pop("model_type")
            self.text_config = AutoConfig.for_model(kind, **settings)
        if self.text_config is not None:
            self.tie_word_embeddings = bool(self.text_config.tie_word_embeddings)
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    @classmethod
    def of(cls, config: PreTrainedConfig, plans: Sequence[BlockPlan]) -> PrunedMoEConfig:
        """The config of a model after a plan for each of its MoE blocks."""
        return cls(
            text_config=copy.deepcopy(config),
            experts=[plan.count for plan in plans],
            router_rows=[
                plan.count if plan.rows_KE is not None else plan.transfer_EK.shape[0]
                for plan in plans
            ],
            slots=[0 if p.rows_KE is not None else _slots(p, config) for p in plans],
            architectures=[PrunedMoEForCausalLM.__name__],
            dtype=config.dtype,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )


class TransferRouter(nn.Module):
    """A router over E experts whose weights pass on to K that stand for them.

    A token's weight for an old expert is split over the new ones by ``transfer_EK``; what two old
    experts give to one new one adds up. Nothing is normalised anew.

    Attributes:
        router: the router over the old experts, as it was.
        transfer_EK: shares.
        top_k: experts a token.
    """

    transfer_EK: Tensor

    def __init__(self, router: nn.Module, experts: int, count: int, slots: int) -> None:
        super().__init__()
        self.router = router
        self.top_k = slots
        self.register_buffer("transfer_EK", torch.zeros(experts, count))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (N, E) over the old experts, weights (N, K) and ids (N, K) of the new ones."""
        logits_NE, weight_NK, expert_NK = self.router(x)
        dense_NE = weight_NK.new_zeros(logits_NE.shape).scatter_add_(1, expert_NK, weight_NK)
        passed = dense_NE.float() @ self.transfer_EK.float()
        best = passed.topk(self.top_k, dim=-1)
        return logits_NE, best.values.to(weight_NK.dtype), best.indices


class PrunedMoEForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """The causal language model.

    Attributes:
        inner: the model of transformers with its blocks resized.
    """

    config: PrunedMoEConfig
    config_class = PrunedMoEConfig
    base_model_prefix = "inner"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: PrunedMoEConfig) -> None:
        super().__init__(config)
        text_config = copy.deepcopy(config.text_config)
        text_config._attn_implementation_internal = None  # each architecture has its own default
        self.inner: Any = AutoModelForCausalLM.from_config(text_config)  # type: ignore[no-untyped-call]
        self._resize(config)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        self.inner._init_weights(module)

    def _resize(self, config: PrunedMoEConfig) -> None:
        architecture = architecture_of(config.text_config)
        views = block_views(self.inner)
        rows, slots = config.router_rows or [], config.slots or []
        for view, count, row, slot in zip(views, config.experts or [], rows, slots, strict=True):
            resized: Any = architecture.resized(self.inner.config, [count])
            block = type(view.block)(resized)
            if row != count:
                whole = type(view.block)(architecture.resized(self.inner.config, [row]))
                router = TransferRouter(architecture.router_module(whole), row, count, slot)
                setattr(block, architecture.router, router)
            for module in block.modules():
                if hasattr(module, "config"):  # so that later changes to the model's reach it
                    module.config = self.inner.config
            view.layer.add_module(architecture.block, block)

    def get_input_embeddings(self) -> nn.Module:
        return self.inner.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.get_output_embeddings()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """As the original model.

        Raises:
            SpecError: router logits are asked for: transformers' balance loss over them takes every
                layer to have the same number of experts.
        """
        if kwargs.get("output_router_logits"):
            raise SpecError("a pruned model has no balance loss; leave output_router_logits out")
        return self.inner(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )


def _slots(plan: BlockPlan, config: PreTrainedConfig) -> int:
    """Most new experts that the choice of a token can pass on to."""
    most = int((plan.transfer_EK != 0).sum(1).max())
    return min(plan.count, config.num_experts_per_tok * most)


AutoConfig.register(PrunedMoEConfig.model_type, PrunedMoEConfig, exist_ok=True)
AutoModelForCausalLM.register(PrunedMoEConfig, PrunedMoEForCausalLM, exist_ok=True)
