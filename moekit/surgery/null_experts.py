"""Grafting null experts on a trained top-k model, as AdaMoE does."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moekit.errors import SpecError
from moekit.experts import Bank, FeedForwardSpec, Zero
from moekit.layer import MoESpec
from moekit.models.language import MoEDecoderConfig, MoEDecoderForCausalLM
from moekit.routing import LossSpec, NullAwareBalance, SwitchBalance, TopK
from moekit.surgery.grafted import (
    GRAFTABLE,
    GraftedMoEConfig,
    GraftedMoEForCausalLM,
    Normalize,
)
from moekit.surgery.view import block_views
from moekit.surgery.wrapped import settings_of

TIE_BREAKING = 1e-4


@overload
def add_null_experts(
    model: MoEDecoderForCausalLM,
    count: int,
    k: int,
    loss: LossSpec | None = None,
    seed: int = 0,
    normalize: Normalize = "true",
) -> MoEDecoderForCausalLM: ...
@overload
def add_null_experts(
    model: PreTrainedModel,
    count: int,
    k: int,
    loss: LossSpec | None = None,
    seed: int = 0,
    normalize: Normalize = "true",
) -> PreTrainedModel: ...
def add_null_experts(
    model: PreTrainedModel,
    count: int,
    k: int,
    loss: LossSpec | None = None,
    seed: int = 0,
    normalize: Normalize = "true",
) -> PreTrainedModel:
    """A copy of ``model`` with ``count`` null experts in every MoE layer and ``k`` picks a token.

    The router grows by rows copied from its own, each ``count / E`` times, so that at first every
    expert has null twins of equal logits and the load starts near ``k E / (E + count)`` whatever
    the router prefers (AdaMoE, sec. 3.3). Twins are told apart by noise of relative size 1e-4,
    since ties would be broken by position.

    Args:
        model: a decoder of moekit's whose MoE layers are plain top-k over one feed-forward bank,
            or a Mixtral, Qwen2-MoE, Qwen3-MoE or OLMoE of transformers, which becomes a
            :class:`~moekit.surgery.grafted.GraftedMoEForCausalLM`.
        count: number m of null experts, a multiple of the number of experts.
        k: picks a token, null experts included.
        loss: the balance loss of the result, in place of the model's Switch loss; null-aware and of
            weight 0.02 by default.
        seed: seed of the noise.
        normalize: what a token's weights are divided by: the sum over its ``true`` picks, as the
            paper advises, or over ``all``; models of transformers only.

    Raises:
        SpecError: a layer is of another kind, ``count`` is no multiple of its experts, or ``k`` is
            out of range.

    Example:
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> model = MixtralForCausalLM(MixtralConfig(
        ...     vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
        ...     num_attention_heads=2, num_key_value_heads=2, num_local_experts=4,
        ... ))
        >>> grafted = add_null_experts(model, count=4, k=3)
        >>> _ = grafted(input_ids=torch.tensor([[1, 2, 3]]))
        >>> len(grafted.true_experts_per_token())
        1
    """
    loss = NullAwareBalance(weight=0.02) if loss is None else loss
    if isinstance(model, MoEDecoderForCausalLM):
        return _own_decoder(model, count, k, loss, seed)
    return _of_transformers(model, count, k, loss, seed, normalize)


@torch.no_grad()
def _of_transformers(
    model: PreTrainedModel, count: int, k: int, loss: LossSpec, seed: int, normalize: Normalize
) -> PreTrainedModel:
    if model.config.model_type not in GRAFTABLE:
        raise SpecError(
            f"null experts cannot be grafted on {model.config.model_type!r}; supported: "
            f"{', '.join(GRAFTABLE)}, and moekit's own decoder"
        )
    views = block_views(model)
    experts = views[0].experts
    _require(experts, count, k)
    if not isinstance(loss, NullAwareBalance) or loss.then or loss.scope != "layer":
        raise SpecError(
            f"the loss is {loss}; on models of transformers it is NullAwareBalance over layers "
            "with a constant weight (config.balance_weight can be changed between runs)"
        )
    if normalize not in ("true", "all"):
        raise SpecError(f"normalize is {normalize!r}; wanted 'true' or 'all'")
    config = GraftedMoEConfig(
        **settings_of(model.config),
        null_experts=count,
        k=k,
        normalize=normalize,
        balance_weight=loss.weight,
        architectures=[GraftedMoEForCausalLM.__name__],
    )
    grown = GraftedMoEForCausalLM(config).to(device=model.device, dtype=model.dtype)  # type: ignore[call-arg]
    state = {f"inner.{name}": value for name, value in model.state_dict().items()}
    missing = grown.load_state_dict(state, strict=False).missing_keys
    assert all(name.endswith("null_weight") for name in missing)
    generator = torch.Generator().manual_seed(seed)
    for router, view in zip(grown.routers, views, strict=True):
        both_ED = _told_apart(_with_twins(view.router.weight, count), count, generator)
        router.null_weight.copy_(both_ED[experts:])
    grown.generation_config = model.generation_config
    return grown.eval()


def _require(experts: int, count: int, k: int) -> None:
    if count < 0 or count % experts != 0:
        raise SpecError(
            f"{count} null experts for {experts} experts: copying the router's rows needs a "
            "multiple"
        )
    if not 1 <= k <= experts + count:
        raise SpecError(
            f"k is {k}; wanted 1 to {experts + count}, the experts and the null experts"
        )


def _own_decoder(
    model: MoEDecoderForCausalLM, count: int, k: int, loss: LossSpec, seed: int
) -> MoEDecoderForCausalLM:
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
