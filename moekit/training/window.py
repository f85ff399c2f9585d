"""What the model's outputs say between two log rows, summed on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moekit.layer import MoE, MoEOutput
from moekit.measure.statistics import ModelStatistics
from moekit.routing import Load, RoutingLosses, all_reduce_loads
from moekit.training.evaluation import predicted_tokens

_NATS, _TARGETS, _PASSES = "nats", "targets", "passes"  # no loss spec can be named like these


class MoEModelOutput(Protocol):
    """What training reads from a model's output.

    Attributes:
        loss: the training loss: cross-entropy plus the weighted routing losses.
        cross_entropy: mean nats a predicted token.
        routing_losses: unscaled routing losses by name.
        moe: what each MoE layer returned.
    """

    loss: Tensor
    cross_entropy: Tensor
    routing_losses: Mapping[str, Tensor]
    moe: Sequence[MoEOutput]


class MoEModel(Protocol):
    """What training needs of a model beside ``transformers.PreTrainedModel``."""

    @property
    def moe_layers(self) -> Sequence[MoE]:
        """The MoE layers in order."""

    @property
    def routing_losses(self) -> RoutingLosses:
        """Their losses."""

    def update_routing(self, loads: Sequence[Load]) -> None:
        """Let routers and controllers see the loads of one optimiser step."""


class RoutingWindow:
    """Sums the routing of steps, and hands each step's loads to the model's controllers."""

    def __init__(self, model: MoEModel) -> None:
        self._model = model
        self._kinds = [layer.experts.kinds for layer in model.moe_layers]
        self._step: ModelStatistics | None = None
        self._closed: ModelStatistics | None = None
        self._sums: dict[str, Tensor] = {}

    def add(self, output: MoEModelOutput, batch: Mapping[str, Tensor]) -> None:
        """Count one forward pass of a training step on ``batch``."""
        found = ModelStatistics.of(output.moe, self._kinds)
        self._step = found if self._step is None else self._step + found
        targets = predicted_tokens(batch)
        nats = torch.where(targets > 0, output.cross_entropy.detach() * targets, 0.0)
        counted = {_NATS: nats, _TARGETS: targets, _PASSES: torch.ones_like(targets)}
        for name, value in {**counted, **output.routing_losses}.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().double()

    def close_step(self) -> None:
        """End an optimiser step: controllers see its loads over all micro-batches and ranks."""
        if self._step is None:
            return
        step, self._step = self._step, None
        self._closed = step if self._closed is None else self._closed + step
        loads = step.loads
        if loads and _ranks() > 1:
            loads = all_reduce_loads(loads)
        self._model.update_routing(loads)

    def take(self) -> dict[str, Any]:
        """The window as plain numbers over all ranks; the next one begins empty.

        Returns:
            ``cross_entropy``; ``routing``: the summary of
            :class:`~moekit.measure.ModelStatistics`, with ``losses``, the mean of each unscaled
            routing loss, and ``coefficients``, the present value of those that change (ReMoE's
            λ). Empty if nothing was counted.
        """
        if self._closed is None:
            return {}
        routing = self._closed.all_reduce().summary()
        sums = self._reduced_sums()
        nats, targets, passes = (sums.pop(name) for name in (_NATS, _TARGETS, _PASSES))
        coefficients = self._model.routing_losses.coefficients()
        routing["losses"] = {name: value / passes for name, value in sums.items()}
        routing["coefficients"] = {name: float(value) for name, value in coefficients.items()}
        self._closed, self._sums = None, {}
        return {"cross_entropy": nats / max(targets, 1), "routing": routing}

    def _reduced_sums(self) -> dict[str, float]:
        """The sums over all ranks; a loss on a rank is its share times the number of ranks."""
        total = torch.stack(list(self._sums.values()))
        if _ranks() > 1:
            dist.all_reduce(total)
        return dict(zip(self._sums, total.tolist(), strict=True))


def _ranks() -> int:
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return 1
