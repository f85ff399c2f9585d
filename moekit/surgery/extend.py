"""New modules beside those of a trained model, trained alone (ModuleFormer, arXiv 2306.04640)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from moekit.errors import SpecError
from moekit.experts import Bank, ExpertsBank, ExpertsSpec
from moekit.experts.zero_computation import ZeroComputationSpec
from moekit.layer import MoE, MoESpec
from moekit.models.language import MoEDecoderForCausalLM
from moekit.routing import ModuleRouter, ModuleRouting
from moekit.surgery.rebuild import Mixture, mixtures, rebuilt

NEUTRAL = -100.0  # exp(-100) is nothing in float32 beside the probability of any other module


def extend_modules(
    model: MoEDecoderForCausalLM,
    *,
    attention: int = 0,
    feed_forward: int = 0,
    router_init: Literal["random", "neutral"] = "random",
    seed: int = 0,
) -> MoEDecoderForCausalLM:
    """A copy of ``model`` with new modules in every mixture, and all old weights frozen.

    The new modules are a bank of their own behind the old one, and the router's last layer gets a
    block of rows for them; nothing that was there changes. Frozen weights are not marked in a
    checkpoint: call :func:`train_new_modules` again after loading one.

    Args:
        model: a decoder whose mixtures to be extended are routed by
            :class:`~moekit.routing.ModuleRouting`.
        attention, feed_forward: new modules in each mixture of attention, and in each feed-forward
            mixture.
        router_init: ``random`` rows compete with the old ones at once, so that the new modules are
            used and learn. With ``neutral`` they have a bias of -100: the copy computes what the
            model did, and its new modules are not used until something raises that bias.
        seed: seed of the new weights.

    Raises:
        SpecError: there is nothing to add, no mixture to add to, or one with another router.
    """
    counts = {"attention": attention, "feed_forward": feed_forward}
    if min(counts.values()) < 0 or not any(counts.values()):
        raise SpecError(f"{counts} new modules were asked for; wanted at least one")
    grown = [mixture for mixture in mixtures(model) if counts[mixture.part]]
    missing = [part for part, n in counts.items() if n and part not in {m.part for m in grown}]
    if missing:
        raise SpecError(f"the model has no mixture as {missing[0]} that could get new modules")
    specs = {m.name: _extended(m, counts[m.part]) for m in grown}
    weights = {name: value for m in grown for name, value in _moved(m).items()}
    copy = rebuilt(model, specs, weights, seed)
    if router_init == "neutral":
        for router in [m.layer.router for m in mixtures(copy) if m.name in specs]:
            assert isinstance(router, ModuleRouter)
            nn.init.constant_(_bias(router), NEUTRAL)
    train_new_modules(copy)
    return copy


def train_new_modules(model: MoEDecoderForCausalLM, *, whole_router: bool = False) -> None:
    """Freeze all weights but those of the modules that were added last, and their routers' rows.

    Args:
        whole_router: leave all of the routers trainable.

    Raises:
        SpecError: no modules were added to this model.
    """
    extended = [m for m in mixtures(model) if _added(m.spec)]
    if not extended:
        raise SpecError("no modules were added to this model; extend_modules adds them")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for mixture in extended:
        for learning in _new_parameters(mixture.layer, whole_router):
            learning.requires_grad_(True)


def _added(spec: MoESpec) -> bool:
    return isinstance(spec.router, ModuleRouting) and bool(spec.router.added)


def _new_parameters(layer: MoE, whole_router: bool) -> list[Tensor]:
    router, bank = layer.router, layer.experts
    assert isinstance(router, ModuleRouter)
    assert isinstance(bank, ExpertsBank)
    rows = list(router.parameters()) if whole_router else [*router.blocks[-1]]
    newest = list(bank.parts)[-1]
    return [p for p in (*rows, *newest.parameters()) if p is not None]


def _bias(router: ModuleRouter) -> Tensor:
    bias = router.blocks[-1][1]
    assert bias is not None  # every block but the first has one
    return bias


def _extended(mixture: Mixture, count: int) -> MoESpec:
    spec, router = mixture.spec, mixture.spec.router
    if not isinstance(router, ModuleRouting):
        raise SpecError(
            f"{mixture.name} is routed by {type(router).__name__}; modules are added to mixtures "
            "with ModuleRouting, whose rows can be trained apart"
        )
    parts = spec.experts.parts if isinstance(spec.experts, Bank) else (spec.experts,)
    return spec.replace(
        router=router.replace(added=(*router.added, count)),
        experts=Bank((*parts, _like(spec.experts, count))),
    )


def _like(bank: ExpertsSpec, count: int) -> ExpertsSpec:
    """So many experts like the last of ``bank`` that have matrix products."""
    if isinstance(bank, Bank):
        working = [part for part in bank.parts if not isinstance(part, ZeroComputationSpec)]
        return _like(working[-1], count)
    return replace(bank, count=count)  # type: ignore[call-arg]  # all banks but Bank have a count


@torch.no_grad()
def _moved(mixture: Mixture) -> dict[str, Tensor]:
    """The old bank's tensors under the names that they have as a part of the new one."""
    if isinstance(mixture.spec.experts, Bank):
        return {}
    start = f"{mixture.name}.experts."
    state = mixture.layer.experts.state_dict()
    return {f"{start}parts.0.{name}": value for name, value in state.items()}
