"""A model of transformers whose MoE blocks have numbers of experts of their own.

A config of transformers has one number of experts for all layers, and a router as many rows as
experts. Where pruning left another number in each layer, or a router with the rows of experts that
were merged, the model is this one: the original class with its blocks resized.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from moekit.surgery.plan import BlockPlan
from moekit.surgery.view import block_views
from moekit.surgery.view_architectures import architecture_of
from moekit.surgery.wrapped import WrappedConfig, WrappedForCausalLM, settings_of


class PrunedMoEConfig(WrappedConfig):  # type: ignore[no-untyped-call]
    """Configuration of :class:`PrunedMoEForCausalLM`.

    Attributes:
        experts: experts of each MoE block, from the first to the last.
        router_rows: rows of each block's router; more than its experts where tokens choose among
            the old ones.
        slots: experts a token of each block whose router has other rows; 0 elsewhere.
    """

    model_type = "moekit_pruned"

    experts: list[int] | None = None
    router_rows: list[int] | None = None
    slots: list[int] | None = None

    @classmethod
    def of(cls, config: PreTrainedConfig, plans: Sequence[BlockPlan]) -> PrunedMoEConfig:
        """The config of a model after a plan for each of its MoE blocks."""
        return cls(
            **settings_of(config),
            experts=[plan.count for plan in plans],
            router_rows=[
                plan.count if plan.rows_KE is not None else plan.transfer_EK.shape[0]
                for plan in plans
            ],
            slots=[0 if p.rows_KE is not None else _slots(p, config) for p in plans],
            architectures=[PrunedMoEForCausalLM.__name__],
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
        self.register_buffer("transfer_EK", torch.zeros(experts, count, dtype=torch.float32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (N, E) over the old experts, weights (N, K) and ids (N, K) of the new ones."""
        logits_NE, weight_NK, expert_NK = self.router(x)
        dense_NE = weight_NK.new_zeros(logits_NE.shape).scatter_add_(1, expert_NK, weight_NK)
        passed = dense_NE.float() @ self.transfer_EK.float()
        best = passed.topk(self.top_k, dim=-1)
        return logits_NE, best.values.to(weight_NK.dtype), best.indices


class PrunedMoEForCausalLM(WrappedForCausalLM):  # type: ignore[no-untyped-call]
    """The causal language model.

    Attributes:
        inner: the model of transformers with its blocks resized.
    """

    config: PrunedMoEConfig
    config_class = PrunedMoEConfig
    balance_in_words = "a pruned model has no balance loss"
    _keep_in_fp32_modules_strict = {"transfer_EK"}  # noqa: RUF012  (shares, which rounding changes)

    def change(self) -> None:
        """Resize the blocks, and put routers over old experts in."""
        config = self.config
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


def _slots(plan: BlockPlan, config: PreTrainedConfig) -> int:
    """Most new experts that the choice of a token can pass on to."""
    most = int((plan.transfer_EK != 0).sum(1).max())
    return min(plan.count, config.num_experts_per_tok * most)


AutoConfig.register(PrunedMoEConfig.model_type, PrunedMoEConfig, exist_ok=True)
AutoModelForCausalLM.register(PrunedMoEConfig, PrunedMoEForCausalLM, exist_ok=True)
