"""Residual rules with momentum on Hugging Face MoE models, put on and taken off again."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from moekit.errors import SignalError, SpecError
from moekit.residual import ResidualSpec, State

SUPPORTED = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
"""Values of ``model_type`` whose decoder layers end in ``x + mlp(post_attention_layernorm(x))``."""

_ARGUMENT = "moekit_momentum"


class AttachedMomentum:
    """A rule on a model; ``detach`` takes it off, as does leaving a ``with`` block.

    Attributes:
        rule: the rule.
        layers: number of MoE layers that follow it.
    """

    def __init__(self, rule: ResidualSpec, layers: int, hooks: Sequence[RemovableHandle]) -> None:
        self.rule = rule
        self.layers = layers
        self._hooks = list(hooks)

    def detach(self) -> None:
        """Give the model its own residual back; harmless when done before."""
        while self._hooks:
            self._hooks.pop().remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()


def attach_momentum(model: PreTrainedModel, rule: ResidualSpec) -> AttachedMomentum:
    """Let the MoE layers of a transformers model follow a residual rule over depth.

    The model's own code runs: hooks put the look-ahead before the norm of each MoE layer, and turn
    the layer's output into the rule's increment. The momentum travels as an argument through the
    decoder's layers, so gradients flow through it, also under gradient checkpointing, and no module
    keeps it. Weights and config are untouched: a saved model is the original one, and the rule is
    attached again after loading. With :class:`~moekit.residual.Plain`, or ``HeavyBall(mu=0)``,
    outputs are those of the model, bit for bit.

    Args:
        model: a model of one of the ``SUPPORTED`` architectures, with any head.
        rule: the rule of every MoE layer. Dense layers hand the momentum on.

    Raises:
        SpecError: the architecture is not supported, the model has no MoE layer, or a rule is
            attached already.

    Example::

        with attach_momentum(model, HeavyBall(mu=0.3)):
            model.generate(**inputs)
    """
    base = _decoder(model)
    layers = [layer for layer in base.layers if _is_moe(layer)]
    if not layers:
        raise SpecError("the model has no MoE layer, so momentum over them means nothing")
    hooks = [base.register_forward_pre_hook(_Start(), with_kwargs=True)]
    for layer in base.layers:
        step = _Layer(rule) if _is_moe(layer) else None
        hooks.append(layer.self_attn.register_forward_pre_hook(_Take(step), with_kwargs=True))
        if step is not None:
            hooks.append(layer.register_forward_pre_hook(_hand_over, with_kwargs=True))
            hooks.append(layer.post_attention_layernorm.register_forward_pre_hook(step.look_ahead))
            hooks.append(layer.mlp.register_forward_hook(step.increment))
    return AttachedMomentum(rule, len(layers), hooks)


def _decoder(model: PreTrainedModel) -> Any:
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in SUPPORTED:
        raise SpecError(
            f"momentum cannot be attached to {kind!r}; supported: {', '.join(SUPPORTED)}"
        )
    base = model.base_model
    if any(isinstance(hook, _Start) for hook in base._forward_pre_hooks.values()):
        raise SpecError("a residual rule is attached to this model already; detach it first")
    return base


def _is_moe(layer: Any) -> bool:
    return hasattr(layer.mlp, "experts")


@dataclass(eq=False)
class _Pass:
    """One forward pass of the decoder.

    Attributes:
        state: what the last MoE layer handed on.
    """

    state: State = ()


@dataclass(eq=False)
class _Step:
    """One MoE layer in one pass: an argument of the layer, alive as long as its call.

    A checkpointed layer is run again with this same argument, and so from the same state.

    Attributes:
        whole: the pass, which is told the state after the layer.
        before: the state before the layer.
        x_BTD: the hidden state between attention and experts.
    """

    whole: _Pass
    before: State
    x_BTD: Tensor | None = None


class _Start:
    """Starts every forward pass of the decoder without momentum."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, _ARGUMENT: _Pass()}


def _hand_over(
    layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Gives an MoE layer the state of the one below.

    This runs outside of checkpointing, so what it gives is the same when the layer runs again.
    """
    whole = kwargs.get(_ARGUMENT)
    if not isinstance(whole, _Pass):
        raise SignalError(
            "a layer with a residual rule was called on its own; call the whole model, which hands "
            "the momentum from layer to layer"
        )
    _require_graph(layer)
    return args, {**kwargs, _ARGUMENT: _Step(whole, whole.state)}


def _require_graph(layer: Any) -> None:
    if not (layer.training and getattr(layer, "gradient_checkpointing", False)):
        return
    function = getattr(layer, "_gradient_checkpointing_func", None)
    if getattr(function, "keywords", {}).get("use_reentrant"):
        raise SpecError(
            "gradient checkpointing with use_reentrant=True loses the gradients of the momentum; "
            "leave use_reentrant out or set it to False"
        )


class _Take:
    """Takes the momentum out of the arguments of attention, which does not know it."""

    def __init__(self, layer: _Layer | None) -> None:
        self.layer = layer

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        step = kwargs.get(_ARGUMENT)
        if self.layer is not None and isinstance(step, _Step):
            self.layer.begin(step)
        return args, {name: value for name, value in kwargs.items() if name != _ARGUMENT}


class _Layer:
    """The rule at one MoE layer, between its norm and the sum.

    Holds no tensor: only a weak reference, one a thread, to the argument of the running call.
    """

    def __init__(self, rule: ResidualSpec) -> None:
        self.rule = rule
        self._running: dict[int, weakref.ref[_Step]] = {}

    def begin(self, step: _Step) -> None:
        self._running[threading.get_ident()] = weakref.ref(step)

    def look_ahead(self, norm: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Moves the input of the norm, but not what the layer's sum adds to."""
        step, x_BTD = self._step(), args[0]
        step.x_BTD = x_BTD
        return (self.rule.look_ahead(x_BTD, _on_device(step.before, x_BTD)), *args[1:])

    def increment(self, mlp: nn.Module, args: tuple[Any, ...], y_BTD: Tensor) -> Tensor:
        """Replaces the output that the layer's sum adds."""
        step = self._step()
        x_BTD, step.x_BTD = step.x_BTD, None
        assert x_BTD is not None
        before = _on_device(step.before, x_BTD)
        delta_BTD, step.whole.state = self.rule.increment(x_BTD, y_BTD, before)
        return delta_BTD

    def _step(self) -> _Step:
        running = self._running.get(threading.get_ident())
        step = None if running is None else running()
        if step is None:
            raise SignalError(
                "a part of a layer with a residual rule was called on its own; call the whole model"
            )
        return step


def _on_device(state: State, x: Tensor) -> State:
    """Layers may lie on different devices."""
    return tuple(tensor.to(x.device) for tensor in state)
