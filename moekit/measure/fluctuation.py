"""Routing fluctuation: how much of its routing a model changes from one checkpoint to the next."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moekit.errors import CheckpointError
from moekit.measure.observe import TokenBlocks, observe
from moekit.routing.routing import Routing


@dataclass(frozen=True)
class Fluctuation:
    """What changed in one layer, over the same tokens.

    Attributes:
        tokens: tokens compared.
        changed_tokens: share of them whose set of experts is another one.
        changed_slots: mean over tokens of ``1 - |A ∩ B| / max(|A|, |B|)`` for the sets A before and
            B after; with k experts a token, the share of slots that changed. 0 for a token without
            experts at both times.
    """

    tokens: int
    changed_tokens: float
    changed_slots: float

    @classmethod
    def of(cls, before: Routing, after: Routing) -> Fluctuation:
        """What changed between two routings of the same tokens, padding left out.

        Raises:
            CheckpointError: they are not of equally many tokens and experts.
        """
        _require_comparable((before,), (after,))
        return _Sums.of(before, after).mean()


def routing_fluctuation(
    models: Iterable[nn.Module],
    dataset: TokenBlocks,
    batch_size: int = 8,
    max_batches: int | None = None,
) -> list[tuple[Fluctuation, ...]]:
    """What changed from each model to the next, layer by layer.

    Args:
        models: states of one model in their order, such as its checkpoints; taken one at a time,
            so that a generator need never hold two of them. Of moekit or of transformers.
        dataset: equally long blocks of tokens; the same for all.
        max_batches: stop after so many batches.

    Returns:
        One entry a pair of neighbours, with one :class:`Fluctuation` for each MoE layer.

    Raises:
        CheckpointError: the models differ in their layers or experts, or have no routers.

    Example:
        >>> paths = checkpoints(Path("run"))  # doctest: +SKIP
        >>> models = (MoEDecoderForCausalLM.from_pretrained(p) for p in paths)  # doctest: +SKIP
        >>> routing_fluctuation(models, text.validation)  # doctest: +SKIP
    """
    found: list[tuple[Fluctuation, ...]] = []
    before: list[_Batch] | None = None
    for model in models:
        after = list(_batches(model, dataset, batch_size, max_batches))
        if before is not None:
            found.append(_compared(before, after))
        before = after
    return found


_Batch = tuple[Routing, ...]
"""The routing of each layer over one batch, on the host, with ids and padding alone."""


def _batches(
    model: nn.Module, dataset: TokenBlocks, batch_size: int, max_batches: int | None
) -> Iterator[_Batch]:
    for seen in observe(model, dataset, batch_size, max_batches):
        yield tuple(_kept(routing) for routing in seen.routings)


def _kept(routing: Routing) -> Routing:
    valid_N = routing.valid_N
    return Routing(
        expert_NK=routing.expert_NK.cpu(),
        weight_NK=torch.empty(routing.expert_NK.shape, device="meta"),
        experts=routing.experts,
        valid_N=None if valid_N is None else valid_N.cpu(),
    )


def _compared(before: Sequence[_Batch], after: Sequence[_Batch]) -> tuple[Fluctuation, ...]:
    sums: list[_Sums] = []
    for first, second in zip(before, after, strict=True):
        _require_comparable(first, second)
        here = [_Sums.of(a, b) for a, b in zip(first, second, strict=True)]
        sums = [a + b for a, b in zip(sums, here, strict=True)] if sums else here
    return tuple(layer.mean() for layer in sums)


def _require_comparable(before: _Batch, after: _Batch) -> None:
    shapes = [[(r.tokens, r.experts) for r in batch] for batch in (before, after)]
    if shapes[0] != shapes[1]:
        one, other = (", ".join(f"{n} x {e}" for n, e in shape) or "none" for shape in shapes)
        raise CheckpointError(
            f"routing can be compared between states of one model alone; tokens x experts of the "
            f"layers are {one} before and {other} after"
        )


@dataclass(frozen=True)
class _Sums:
    tokens: int
    changed_tokens: int
    changed_slots: float

    @classmethod
    def of(cls, before: Routing, after: Routing) -> _Sums:
        a_NE, b_NE = _chosen(before), _chosen(after)
        larger_N = torch.maximum(a_NE.sum(1), b_NE.sum(1)).clamp_min(1).double()
        common_N = (a_NE & b_NE).sum(1)
        empty_N = ~(a_NE | b_NE).any(1)
        lost_N = torch.where(empty_N, 0.0, 1 - common_N / larger_N)
        return cls(
            tokens=int(before.valid_tokens()),
            changed_tokens=int((a_NE != b_NE).any(1).sum()),
            changed_slots=float(lost_N.sum()),
        )

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(
            self.tokens + other.tokens,
            self.changed_tokens + other.changed_tokens,
            self.changed_slots + other.changed_slots,
        )

    def mean(self) -> Fluctuation:
        count = max(self.tokens, 1)
        return Fluctuation(self.tokens, self.changed_tokens / count, self.changed_slots / count)


def _chosen(routing: Routing) -> Tensor:
    """Whether each token has each expert (N, E); nothing for padding, which holds no ids."""
    index_NK = torch.where(routing.used_NK, routing.expert_NK, routing.experts)
    chosen_NE = torch.zeros(routing.tokens, routing.experts + 1, dtype=torch.bool)
    return chosen_NE.to(index_NK.device).scatter_(1, index_NK, True)[:, :-1]
