"""An adapter's weights in the model's own, where that is exact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moekit.errors import SpecError
from moekit.surgery.adapt.balance import routers_of
from moekit.surgery.adapt.install import ROUTER, adapter_of, forget_adapter
from moekit.surgery.adapt.mixture import LoRAExperts, MixtureRouter
from moekit.surgery.adapt.own_experts import merge_experts
from moekit.surgery.adapt.peft_parts import has_injected, merge_injected


@torch.no_grad()
def merge_adapter(model: PreTrainedModel, expert: int | None = None) -> PreTrainedModel:
    """The model with its adapter merged into its weights, where it is; nothing else stays on it.

    Plain LoRA and LoRA on fused experts merge exactly (in the weights' own dtype). A mixture does
    not, since each token has other experts; one of its experts can be merged for all tokens.

    Args:
        model: with an adapter.
        expert: the LoRA expert to merge, as if every token had gone to it; None where there is
            one alone.

    Raises:
        SpecError: the model has no adapter; it has a mixture and ``expert`` is None or unknown.
    """
    spec = adapter_of(model)
    adapted = {p: m for p, m in model.named_modules() if isinstance(m, LoRAExperts)}
    if adapted and spec.routed:
        if expert is None:
            raise SpecError(
                f"{next(iter(adapted))} has {spec.experts} LoRA experts, which differ from token "
                "to token and cannot be merged into one weight; keep the adapter, or name one "
                f"expert to merge for all tokens, 0 to {spec.experts - 1}"
            )
        _require_expert(expert, spec.experts)
    for path, module in adapted.items():
        base, chosen = module.base, expert if spec.routed and expert is not None else 0
        weight: Tensor = base.weight  # type: ignore[assignment]
        update_OI = module.matrix(chosen)
        update = update_OI if isinstance(base, nn.Linear) else update_OI.T
        weight.copy_(weight.to(update.dtype) + update)
        model.set_submodule(path, base)
    for path in [p for p, m in model.named_modules() if isinstance(m, MixtureRouter)]:
        _remove_router(model.get_submodule(path.rpartition(".")[0]))
    merge_experts(model)
    if has_injected(model):
        merge_injected(model)
    forget_adapter(model)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


@contextmanager
def forced_expert(model: nn.Module, expert: int) -> Iterator[None]:
    """Within the block, every token goes to one LoRA expert, with weight 1.

    Raises:
        SpecError: the model has no mixture, or not so many experts.
    """
    routers = routers_of(model)
    _require_expert(expert, adapter_of(model).experts)
    for router in routers.values():
        router.forced = expert
    try:
        yield
    finally:
        for router in routers.values():
            router.forced = None


def _require_expert(expert: int, experts: int) -> None:
    if not 0 <= expert < experts:
        raise SpecError(f"expert is {expert}; wanted 0 to {experts - 1}")


def _remove_router(part: nn.Module) -> None:
    """The router and the hook that ran it; a feed-forward part has no other hook of ours."""
    delattr(part, ROUTER)
    hooks = part._forward_pre_hooks
    for key in [k for k, hook in hooks.items() if getattr(hook, "__name__", "") == "_route"]:
        del hooks[key]
        part._forward_pre_hooks_with_kwargs.pop(key, None)
