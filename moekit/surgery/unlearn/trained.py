"""The part of a model that is trained: its tensors, what they were, and how to go back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moekit.surgery.unlearn.tap import ExpertTap, parameters_of
from moekit.surgery.unlearn.targets import Choice
from moekit.surgery.view import BlockView, block_views
from moekit.surgery.weights import ExpertWeights, RouterWeights

_Held = ExpertWeights | Tensor


class Trained:
    """What is trained of a model, frozen all but for that.

    Gradients and what an optimiser keeps exist for ``leaves`` alone, in float32 where the model is
    narrower. Of a single expert the leaves are its own slices, so that its neighbours in the fused
    tensors cannot change.

    Args:
        model: the model; its weights change in place.
        choice: what to train.

    Attributes:
        taps: the experts that are trained alone.
        whole: the parameters that are trained as they are, by name.
        leaves: what an optimiser is given.
    """

    def __init__(self, model: PreTrainedModel, choice: Choice) -> None:
        views = block_views(model)
        self.model = model
        self.taps = [ExpertTap(views[block], expert) for block, expert in choice.experts]
        self.whole = _whole(model, views, choice)
        self._masters = {name: _master(p) for name, p in self.whole.items()}
        self._flags = [p.requires_grad for p in model.parameters()]
        self._before = [_copied(tensors) for tensors in self._now()]

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors with gradients, in a fixed order."""
        slices = [leaf for tap in self.taps for _, leaf in tap.leaves.items()]
        return slices + list(self._masters.values())

    @property
    def elements(self) -> int:
        """Number of trained elements."""
        return sum(leaf.numel() for leaf in self.leaves)

    def changed(self) -> int:
        """Number of elements that are no longer what they were."""
        pairs = zip(self._before, self._now(), strict=True)
        return sum(_differing(before, now) for before, now in pairs)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Gradients for what is trained and nothing else, while the block lasts."""
        self.model.requires_grad_(False)
        for parameter in self.model.parameters():
            parameter.grad = None  # of an earlier backward pass
        for parameter in self.whole.values():
            parameter.requires_grad_(True)
        handles = [tap.attach() for tap in self.taps]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter, flag in zip(self.model.parameters(), self._flags, strict=True):
                parameter.requires_grad_(flag)
                parameter.grad = None

    def gather_gradients(self) -> None:
        """Hand the gradients of narrow parameters to their float32 copies."""
        for name, parameter in self.whole.items():
            master = self._masters[name]
            if master is not parameter and parameter.grad is not None:
                master.grad = parameter.grad.to(master.dtype)
                parameter.grad = None

    def write(self) -> None:
        """Put the leaves into the model."""
        for tap in self.taps:
            tap.write()
        with torch.no_grad():
            for name, parameter in self.whole.items():
                if self._masters[name] is not parameter:
                    parameter.copy_(self._masters[name])

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """The model as it was before training, while the block lasts.

        Not between a forward pass and its backward pass, which needs the weights of the forward.
        """
        now = [_copied(tensors) for tensors in self._now()]
        self._put(self._before)
        try:
            yield
        finally:
            self._put(now)

    def restore(self) -> None:
        """Put the weights back that the model had before training."""
        self._put(self._before)

    def _now(self) -> list[_Held]:
        slices: list[_Held] = [t.view.expert(t.expert) for t in self.taps]
        return slices + [parameter.detach() for parameter in self.whole.values()]

    def _put(self, values: list[_Held]) -> None:
        for own, value in zip(self._now(), values, strict=True):
            if isinstance(own, ExpertWeights):
                assert isinstance(value, ExpertWeights)
                own.copy_(value)
            else:
                assert isinstance(value, Tensor)
                own.copy_(value)


def _whole(
    model: PreTrainedModel, views: list[BlockView], choice: Choice
) -> dict[str, nn.Parameter]:
    names = {id(p): name for name, p in model.named_parameters()}
    if choice.everything:
        return dict(model.named_parameters())
    wanted: list[tuple[BlockView, ExpertWeights | RouterWeights | None]] = [
        *((views[block], views[block].bank) for block in choice.banks),
        *((views[block], views[block].router) for block in choice.routers),
        *((views[block], views[block].shared) for block in choice.shared),
    ]
    return {
        names[id(parameter)]: parameter
        for view, weights in wanted
        if weights is not None
        for parameter in parameters_of(view, weights)
    }


def _master(parameter: nn.Parameter) -> Tensor:
    if parameter.dtype in (torch.float32, torch.float64):
        return parameter
    return parameter.detach().float().requires_grad_()


def _copied(tensors: _Held) -> _Held:
    return tensors.map(torch.clone) if isinstance(tensors, ExpertWeights) else tensors.clone()


def _differing(before: _Held, now: _Held) -> int:
    if isinstance(before, Tensor):
        assert isinstance(now, Tensor)
        return int((before != now).sum())
    assert isinstance(now, ExpertWeights)
    own = dict(now.items())
    return sum(int((value != own[name]).sum()) for name, value in before.items())
