"""All routing losses of a model: which layers share one, their values, their sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moekit.errors import SpecError
from moekit.routing.losses import Batch, Loss, LossSpec
from moekit.routing.router import Router, Site
from moekit.routing.routing import Load, Routing


@dataclass(frozen=True)
class LossSite:
    """A layer as its losses see it: their specs, where its router stands, and the router."""

    specs: tuple[LossSpec, ...]
    router: Router

    @property
    def site(self) -> Site:
        """Where the router stands."""
        return self.router.site


class RoutingLosses(nn.Module):
    """The routing losses of a stack of layers.

    Layers with equal loss specs and equal banks share one loss module, hence one controller.
    Values of the same name add up, so a log holds one line a kind of loss.
    """

    def __init__(self, layers: Sequence[LossSite]) -> None:
        super().__init__()
        self._router_weights = [layer.router.loss_weights for layer in layers]
        self._members: list[list[int]] = []
        self.losses = nn.ModuleList()
        for (spec, _), members in _shared(layers).items():
            self._members.append(members)
            self.losses.append(spec.build(layers[members[0]].site))

    def forward(self, routings: Sequence[Routing]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of all losses, and their detached, unscaled values by name.

        ``routings`` holds the routing of each layer in the order the losses were built with.
        """
        values: dict[str, Tensor] = {}
        batches = self._batches(routings)
        total = torch.zeros((), device=routings[0].weight_NK.device if routings else None)
        for loss, members in self._modules_and_members():
            value = self._value(loss, [batches[i] for i in members])
            total = total + loss.coefficient() * value
            values[loss.name] = values.get(loss.name, 0) + value.detach()
        for weights, routing in zip(self._router_weights, routings, strict=True):
            part = self._part(routing) if routing.losses else 1.0
            for name, value in routing.losses.items():
                total = total + weights[name] * part * value
                values[name] = values.get(name, 0) + part * value.detach()
        return total, values

    def mean_over_ranks(self, share: Tensor | float) -> Tensor | float:
        """The weight of this forward pass's losses in a step of which each rank has a ``share``.

        A loss here is a rank's part of one over all ranks. Weighing it by the rank's own share of
        the targets would count an uneven division of the tokens twice.
        """
        ranks = self._ranks()
        if ranks == 1 or not isinstance(share, Tensor):
            return share
        total = share.detach().clone()
        dist.all_reduce(total)
        return total / ranks

    def update(self, loads: Sequence[Load]) -> None:
        """Let every controller see each layer's load of the optimiser step."""
        for loss, members in self._modules_and_members():
            loss.update([loads[i] for i in members])

    def coefficients(self) -> Mapping[str, Tensor]:
        """Coefficients that change during training, by the name of their loss."""
        found = ((loss.name, loss.coefficient()) for loss, _ in self._modules_and_members())
        return {name: value for name, value in found if isinstance(value, Tensor)}

    def _modules_and_members(self) -> list[tuple[Loss, list[int]]]:
        return list(zip(self.losses, self._members, strict=True))  # type: ignore[arg-type]

    def _value(self, loss: Loss, batches: Sequence[Batch]) -> Tensor:
        if loss.spec.scope == "global":
            return loss(_pooled(batches))
        return loss.reduce(torch.stack([loss(batch) for batch in batches]))

    def _batches(self, routings: Sequence[Routing]) -> dict[int, Batch]:
        wanted = sorted({i for members in self._members for i in members})
        if not wanted:
            return {}
        loads = [Load.of(routings[i]) for i in wanted]
        ranks = self._ranks()
        if ranks > 1:
            loads = all_reduce_loads(loads)
        return {i: _batch(routings[i], load, ranks) for i, load in zip(wanted, loads, strict=True)}

    def _part(self, routing: Routing) -> Tensor | float:
        """This rank's share of the tokens of all ranks, times their number.

        The mean over ranks of a mean over tokens, so weighed, is that over all tokens.
        """
        ranks = self._ranks()
        if ranks == 1:
            return 1.0
        tokens = routing.valid_tokens().to(routing.weight_NK.dtype)
        total = tokens.clone()
        dist.all_reduce(total)
        return tokens * ranks / total.clamp_min(1)

    def _ranks(self) -> int:
        if self.training and dist.is_available() and dist.is_initialized():
            return dist.get_world_size()
        return 1


def all_reduce_loads(loads: Sequence[Load]) -> list[Load]:
    """Sum the loads of several layers over all ranks with one collective."""
    flat = torch.cat([part for load in loads for part in (load.assignments_E, load.tokens[None])])
    dist.all_reduce(flat)
    sizes = [size for load in loads for size in (load.assignments_E.numel(), 1)]
    parts = flat.split(sizes)
    return [Load(a, t[0]) for a, t in zip(parts[::2], parts[1::2], strict=True)]


def _shared(
    layers: Sequence[LossSite],
) -> dict[tuple[LossSpec, tuple[str, ...]], list[int]]:
    """The indices of the layers that share each loss."""
    groups: dict[tuple[LossSpec, tuple[str, ...]], list[int]] = {}
    for index, layer in enumerate(layers):
        for spec in layer.specs:
            groups.setdefault((spec, layer.site.kinds), []).append(index)
    pooled = [spec for spec, _ in groups if spec.scope == "global"]
    for spec in pooled:
        if pooled.count(spec) > 1:
            raise SpecError(
                f"{type(spec).__name__} with scope global pools layers, but their banks differ; "
                "use scope layer"
            )
    return groups


def _batch(routing: Routing, load: Load, ranks: int) -> Batch:
    assert routing.logits_NE is not None  # losses refuse routers without scores
    assert routing.scores_NE is not None
    valid_N1 = None if routing.valid_N is None else routing.valid_N[:, None]
    return Batch(
        load.assignments_E, load.tokens, routing.logits_NE, routing.scores_NE, valid_N1, ranks
    )


def _pooled(batches: Sequence[Batch]) -> Batch:
    return Batch(
        load_E=torch.stack([b.load_E for b in batches]).sum(0),
        tokens=torch.stack([b.tokens for b in batches]).sum(),
        logits_NE=torch.cat([b.logits_NE for b in batches]),
        scores_NE=torch.cat([b.scores_NE for b in batches]),
        valid_N1=_pooled_mask(batches),
        ranks=batches[0].ranks,
    )


def _pooled_mask(batches: Sequence[Batch]) -> Tensor | None:
    """The layers' masks on end, where a layer without a mask has no padding."""
    if all(b.valid_N1 is None for b in batches):
        return None
    masks = [
        b.logits_NE.new_ones(len(b.logits_NE), 1, dtype=torch.bool)
        if b.valid_N1 is None
        else b.valid_N1
        for b in batches
    ]
    return torch.cat(masks)
