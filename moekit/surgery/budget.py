"""How many experts each block keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from moekit.errors import SpecError
from moekit.spec import Spec
from moekit.surgery.blockwise import BlockwiseModel
from moekit.surgery.methods import Method
from moekit.surgery.statistics import BlockStatistics
from moekit.surgery.view import BlockView


@dataclass(frozen=True)
class Budget(Spec):
    """How much is kept; exactly one field is given.

    Attributes:
        ratio: share of the experts of every block, more than 0 and at most 1.
        experts: number of experts of every block.
        bytes: size of the tensors of the whole checkpoint, at most.
    """

    ratio: float | None = None
    experts: int | None = None
    bytes: int | None = None

    def check(self) -> None:
        given = [v for v in (self.ratio, self.experts, self.bytes) if v is not None]
        self.require(len(given) == 1, "give one of a ratio, a number of experts, and bytes")
        self.require(
            self.ratio is None or 0 < self.ratio <= 1,
            f"ratio is {self.ratio}; wanted more than 0 and at most 1",
        )
        self.require(
            self.experts is None or self.experts >= 1,
            f"experts is {self.experts}; wanted at least 1",
        )
        self.require(
            self.bytes is None or self.bytes >= 1, f"bytes is {self.bytes}; wanted at least 1"
        )

    def counts(self, model: BlockwiseModel, reroutes: bool) -> list[int]:
        """Experts of each MoE block, the same share of each.

        A ratio is rounded to the nearest number of experts, a size down; both down to what the
        router's groups can hold.

        Raises:
            SpecError: more experts than a block has, or fewer than it works with.
        """
        blocks = [view for view in model.blocks if view is not None]
        if self.experts is not None:
            counts = [self.experts] * len(blocks)
        elif self.ratio is not None:
            counts = [_whole(round(self.ratio * v.experts), v, reroutes) for v in blocks]
        else:
            counts = self._within_bytes(model, blocks, reroutes)
        for view, count in zip(blocks, counts, strict=True):
            _check_count(view, count, reroutes)
        return counts

    def allows(self, sizes: StoredSizes, reroutes: bool, counts: Sequence[int]) -> bool:
        """Whether these experts of the MoE blocks fit into the bytes, where bytes are given."""
        return self.bytes is None or sizes.after(counts, reroutes) <= self.bytes

    def _within_bytes(
        self, model: BlockwiseModel, blocks: Sequence[BlockView], reroutes: bool
    ) -> list[int]:
        assert self.bytes is not None
        sizes, have = StoredSizes.of(model), {view.experts for view in blocks}
        shares = {Fraction(count, experts) for experts in have for count in range(1, experts + 1)}
        for share in sorted(shares, reverse=True):
            counts = [max(_whole(int(share * v.experts), v, reroutes), 1) for v in blocks]
            size = sizes.after(counts, reroutes)
            if size <= self.bytes:
                return counts
        raise SpecError(
            f"{self.bytes:,} bytes cannot be reached: with one expert a block there are {size:,}"
        )


@dataclass(frozen=True)
class StoredSizes:
    """Bytes of the tensors of a checkpoint.

    Attributes:
        total: of all.
        counts: experts of each MoE block.
        experts, routers: of the experts and the router of each.
    """

    total: int
    counts: tuple[int, ...]
    experts: tuple[int, ...]
    routers: tuple[int, ...]

    @classmethod
    def of(cls, model: BlockwiseModel) -> StoredSizes:
        """Those of a checkpoint, from its headers."""
        views = [view for view in model.blocks if view is not None]
        return cls(
            total=sum(tensor.bytes for tensor in model.checkpoint.stored.values()),
            counts=tuple(view.experts for view in views),
            experts=tuple(_bytes_under(model, view, "experts") for view in views),
            routers=tuple(_bytes_under(model, v, v.architecture.router) for v in views),
        )

    def after(self, counts: Sequence[int], reroutes: bool) -> int:
        """Bytes when ``counts`` experts are left in the MoE blocks."""
        total = self.total
        for have, left, experts, router in zip(
            self.counts, counts, self.experts, self.routers, strict=True
        ):
            if left == have:
                continue
            total -= (have - left) * experts // have
            if reroutes:
                total += have * left * 4  # what passes the weights on, in float32
            else:
                total -= (have - left) * router // have
        return total


def spread(
    method: Method,
    counts: Sequence[int],
    blocks: Sequence[BlockView],
    statistics: Sequence[BlockStatistics],
    fits: Callable[[Sequence[int]], bool] = lambda _: True,
) -> list[int]:
    """The same total over the blocks as the method allocates it.

    Under ``global`` each block first gets what it cannot do without; the rest goes to the experts
    with the largest share of their block's importance, wherever they are.

    Args:
        method: whose allocation and importance.
        counts: experts of each block, which give the total.
        blocks: the blocks.
        statistics: of each block.
        fits: whether numbers of experts are allowed; the total is the largest that is. Blocks of
            several sizes may need fewer experts in total than ``counts``.

    Raises:
        SpecError: a router has groups, which such numbers do not keep equal; or nothing fits.
    """
    if method.allocation == "uniform" or all(
        count == view.experts for count, view in zip(counts, blocks, strict=True)
    ):
        return list(counts)
    require_spreadable(method, blocks)
    least = [1 if method.reroutes else view.rule.smallest for view in blocks]
    beyond = _by_importance(method, least, statistics)
    for total in range(sum(counts), sum(least) - 1, -1):
        more = Counter(beyond[: total - sum(least)])
        found = [minimum + more[place] for place, minimum in enumerate(least)]
        if fits(found):
            return found
    raise SpecError("no allocation by importance is small enough; set allocation to uniform")


def _by_importance(
    method: Method, least: Sequence[int], statistics: Sequence[BlockStatistics]
) -> list[int]:
    """The block of each expert beyond the ``least`` of its block, the most important first."""
    ranked = []
    for place, (stats, minimum) in enumerate(zip(statistics, least, strict=True)):
        score_E = method.importance(stats).double()
        share_E = score_E / score_E.sum().clamp_min(torch.finfo(torch.float64).tiny)
        rest = share_E.sort(descending=True).values[minimum:]
        ranked += [(-float(share), place) for share in rest]
    return [place for _, place in sorted(ranked)]


def require_spreadable(method: Method, blocks: Sequence[BlockView]) -> None:
    """Refuse to give blocks numbers of their own where that cannot be.

    Raises:
        SpecError: the method ranks no experts across blocks, or a router has groups.
    """
    if method.allocation == "uniform":
        return
    if any(view.rule.groups > 1 for view in blocks) and not method.reroutes:
        raise SpecError(
            "a router with groups needs as many experts of each; set allocation to uniform"
        )


def _whole(count: int, view: BlockView, reroutes: bool) -> int:
    """``count``, down to a multiple of the router's groups where its rows shrink with it."""
    return count if reroutes else count - count % view.rule.groups


def _bytes_under(model: BlockwiseModel, view: BlockView, child: str) -> int:
    """Stored bytes of the tensors of one part of a block."""
    stored, names = model.checkpoint.stored, model.checkpoint.names
    inside = view.block.get_submodule(child).state_dict(prefix=f"{view.name}.{child}.")
    return sum(
        stored[part].bytes
        for name, tensor in inside.items()
        for part, _ in names.used(name, tensor.shape, stored)
    )


def _check_count(view: BlockView, count: int, reroutes: bool) -> None:
    least, most = 1 if reroutes else view.rule.smallest, view.experts
    if count > most:
        raise SpecError(f"{count} experts cannot be kept of the {most} of {view.name}")
    if count < least:
        raise SpecError(
            f"{count} experts are too few for {view.name}: a token takes {view.rule.top_k}, and it "
            f"works with {least} or more of its {most}"
        )
    if not reroutes and count % view.rule.groups:
        raise SpecError(
            f"{count} experts cannot be split into the {view.rule.groups} equal groups of "
            f"{view.name}; keep a multiple of {view.rule.groups}"
        )
