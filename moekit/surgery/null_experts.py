"""Grafting null experts on a trained top-k decoder, as AdaMoE does to pretrained models."""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.errors import SpecError
from moekit.experts import Bank, FeedForwardSpec, Zero
from moekit.layer import MoESpec
from moekit.models.language import MoEDecoderConfig, MoEDecoderForCausalLM
from moekit.routing import LossSpec, SwitchBalance, TopK

TIE_BREAKING = 1e-4


def add_null_experts(
    model: MoEDecoderForCausalLM, count: int, k: int, loss: LossSpec, seed: int = 0
) -> MoEDecoderForCausalLM:
    """A copy of ``model`` with ``count`` null experts in every MoE layer and ``k`` picks a token.

    The router grows by rows copied from its own, each ``count / E`` times, so that at first every
    expert has null twins of equal logits and the load starts near ``k E / (E + count)`` whatever
    the router prefers (AdaMoE, sec. 3.3). Twins are told apart by noise of relative size 1e-4,
    since ties would be broken by position.

    Args:
        model: a decoder whose MoE layers are plain top-k over one feed-forward bank.
        count: number m of null experts, a multiple of the number of experts.
        k: picks a token, null experts included.
        loss: the balance loss of the result, in place of the model's Switch loss.
        seed: seed of the noise.

    Raises:
        SpecError: a layer is of another kind, or ``count`` is no multiple of its experts.
    """
    specs = [_grafted(spec, count, k, loss) for spec in model.config.layer_specs]
    settings = model.config.to_dict() | {"layers": [spec.to_dict() for spec in specs]}
    grown = MoEDecoderForCausalLM(MoEDecoderConfig.from_dict(settings))
    grown.to(device=model.device, dtype=model.dtype)  # type: ignore[call-arg]
    state = _renamed(model.state_dict(), grown.state_dict())
    generator = torch.Generator().manual_seed(seed)
    for name, value in state.items():
        if ".mlp.router." in name:
            state[name] = _with_twins(value, count)
        if name.endswith(".mlp.router.weight"):
            state[name] = _told_apart(state[name], count, generator)
    grown.load_state_dict(state)
    return grown


def _grafted(
    spec: MoESpec | FeedForwardSpec, count: int, k: int, loss: LossSpec
) -> MoESpec | FeedForwardSpec:
    if isinstance(spec, FeedForwardSpec):
        return spec
    if type(spec.router) is not TopK or not isinstance(spec.experts, FeedForwardSpec):
        raise SpecError(
            "null experts are grafted on plain top-k over one feed-forward bank; this layer has "
            f"{type(spec.router).__name__} over {type(spec.experts).__name__}"
        )
    if count % spec.experts.count != 0:
        raise SpecError(
            f"{count} null experts for {spec.experts.count} experts: copying the router's rows "
            "needs a multiple"
        )
    if spec.router.groups > 1:
        raise SpecError(
            "null experts would change which experts form a group; this layer's router has "
            f"{spec.router.groups} groups"
        )
    others = tuple(x for x in spec.losses if not isinstance(x, SwitchBalance))
    return spec.replace(
        router=spec.router.replace(k=k, normalize="nonzero"),
        experts=Bank((spec.experts, Zero(count))),
        losses=(*others, loss),
    )


def _renamed(old: dict[str, Tensor], new: dict[str, Tensor]) -> dict[str, Tensor]:
    """The old tensors under the names that they have when the bank is a part of another."""
    moved = {
        name if name in new else name.replace(".experts.", ".experts.parts.0."): value
        for name, value in old.items()
    }
    kept = {name: value for name, value in new.items() if name.startswith("routing_losses")}
    return {name: value for name, value in moved.items() if name in new} | kept


def _with_twins(value_E: Tensor, count: int) -> Tensor:
    """A parameter or buffer with one entry an expert, and its twins' copies behind it."""
    repeats = [count // value_E.shape[0], *(1 for _ in value_E.shape[1:])]
    return torch.cat([value_E, value_E.repeat(repeats)])


def _told_apart(weight_ED: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The router's weight with noise on its last ``count`` rows, the twins."""
    true_ED, twin_ED = weight_ED.split([weight_ED.shape[0] - count, count])
    noise = torch.randn(twin_ED.shape, generator=generator) * TIE_BREAKING
    return torch.cat([true_ED, twin_ED + noise.to(twin_ED) * true_ED.std()])
