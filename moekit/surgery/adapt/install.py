"""Putting an adapter on a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from moekit.errors import SpecError
from moekit.surgery.adapt.balance import mole_loss
from moekit.surgery.adapt.mixture import LoRAExperts, MixtureRouter, sizes_of
from moekit.surgery.adapt.own_experts import is_own, update_experts
from moekit.surgery.adapt.parts import parts_of
from moekit.surgery.adapt.peft_parts import inject
from moekit.surgery.adapt.spec import AdaptSpec
from moekit.surgery.added_loss import with_loss_added

ROUTER = "mole_router"  # its name in a feed-forward part
_INSTALLED = "moekit_adapter"


def install_adapter(model: PreTrainedModel, spec: AdaptSpec) -> PreTrainedModel:
    """Put an adapter on a model, where it is; its own weights are frozen.

    The model computes the same until the adapter is trained. In training, its loss gets
    ``spec.balance`` times the balance loss added, padding of ``attention_mask`` left out; so
    ``transformers.Trainer`` and any loop that uses the model's loss train the routers as they
    should.

    Args:
        model: any causal or vision-language model of transformers whose decoder layers have their
            feed-forward part in a module; only its language model is adapted.
        spec: the adapter.

    Returns:
        The model.

    Raises:
        SpecError: the model has no such layers, or has an adapter already.
        MissingExtraError: peft is needed and not installed.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(
        ...     vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
        ...     num_attention_heads=2, num_key_value_heads=2,
        ... ))
        >>> _ = install_adapter(model, AdaptSpec(experts=2, rank=2, attention=False))
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        322
    """
    _require_plain(model)
    parts = parts_of(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    linears = [name for part in parts for name in part.attention] if spec.attention else []
    attention = [] if spec.everywhere else linears
    fused = [name for part in parts for name in part.fused] if spec.feed_forward else []
    own = [path for path in fused if is_own(model, path)]
    others = [path for path in fused if path not in own]
    if attention or others:
        inject(model, attention, others, spec)
    for path in own:
        update_experts(model, path, spec)
    for path in linears if spec.everywhere else []:
        owner, _, name = path.rpartition(".")
        install_mixture(model.get_submodule(owner), [name], spec)
    for part in parts if spec.feed_forward else []:
        inside = [p.removeprefix(f"{part.feed_forward}.") for p in part.projections]
        install_mixture(model.get_submodule(part.feed_forward), inside, spec)
    mixed = any(isinstance(module, MixtureRouter) for module in model.modules())
    hook = model.register_forward_hook(_add_balance, with_kwargs=True) if mixed else None
    setattr(model, _INSTALLED, (spec, hook))
    return model


def adapter_of(model: nn.Module) -> AdaptSpec:
    """The adapter that a model has.

    Raises:
        SpecError: it has none.
    """
    found = getattr(model, _INSTALLED, None)
    if found is None:
        raise SpecError(f"{type(model).__name__} has no adapter; install one first")
    spec: AdaptSpec = found[0]
    return spec


def has_adapter(model: nn.Module) -> bool:
    """Whether a model has an adapter."""
    return hasattr(model, _INSTALLED)


def forget_adapter(model: nn.Module) -> None:
    """Take off what :func:`install_adapter` left on the model beside modules."""
    hook = getattr(model, _INSTALLED)[1]
    if hook is not None:
        hook.remove()
    delattr(model, _INSTALLED)


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's own parameters, by name."""
    adapter_of(model)
    wanted = (".lora_", f".{ROUTER}.")
    return {n: p for n, p in model.named_parameters() if any(part in n for part in wanted)}


def _require_plain(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, LoRAExperts) or hasattr(module, "lora_A"):
            raise SpecError(f"{path} has an adapter already; merge it or load the model anew")


def install_mixture(part: nn.Module, projections: Sequence[str], spec: AdaptSpec) -> None:
    """Put LoRA experts on the projections of one part, with a router for all or one for each.

    Args:
        part: called with tokens (..., D) alone, where one router is for all.
        projections: paths in ``part``; the first one takes tokens.
        spec: sizes and combination.
    """
    router = None
    if spec.routed and spec.routers == "part" and projections:
        router = _add_router(part, part.get_submodule(projections[0]), spec)
    for path in projections:
        linear = part.get_submodule(path)
        experts = LoRAExperts(linear, router, spec)
        if spec.routed and spec.routers == "linear":
            experts.follow(_add_router(experts, linear, spec))
        part.set_submodule(path, experts)


def _add_router(owner: nn.Module, linear: nn.Module, spec: AdaptSpec) -> MixtureRouter:
    """A router that decides whenever ``owner`` is called, from what ``linear`` takes as well."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    router = MixtureRouter(sizes_of(linear)[1], spec, weight)
    owner.add_module(ROUTER, router)
    owner.register_forward_pre_hook(_route, with_kwargs=True)
    return router


def _route(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    module.get_submodule(ROUTER)(x)


def _add_balance(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    spec = adapter_of(model)
    if not (spec.balance and model.training):
        return output
    return with_loss_added(
        output,
        model.forward,
        args,
        kwargs,
        lambda mask_BT: spec.balance * mole_loss(model, mask_BT, spec.pooled),
    )
