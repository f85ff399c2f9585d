"""What becomes of the experts of a block: which are kept, merged, and who takes their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.errors import SpecError
from moekit.surgery.view_architecture import RoutingRule
from moekit.surgery.weights import ExpertWeights, RouterWeights, stacked


@dataclass(frozen=True)
class BlockPlan:
    """E experts of a block become K.

    Pruning, merging, aliasing and recombining are choices of the fields.

    Attributes:
        keep: the old expert that each new one descends from (K), in ascending order.
        transfer_EK: share of each old expert's part that passes to each new one; a row sums to at
            most 1, and to less where something is dropped.
        rows_KE: each new row of the router as a sum of old rows. None leaves the router its E rows:
            tokens choose among the old experts, and their weights pass on by ``transfer_EK``.
        merge_KE: each new expert as a weighted mean of old ones. None keeps those of ``keep``.
        order_EH: order in which each old expert's hidden neurons are taken before they are merged;
            None leaves them as they are.
        experts: new experts, in place of merged ones.
    """

    keep: tuple[int, ...]
    transfer_EK: Tensor
    rows_KE: Tensor | None = None
    merge_KE: Tensor | None = None
    order_EH: Tensor | None = None
    experts: ExpertWeights | None = None

    @property
    def count(self) -> int:
        """Number of new experts K."""
        return len(self.keep)

    @property
    def removed(self) -> list[int]:
        """The old experts that no new one descends from."""
        return [e for e in range(self.transfer_EK.shape[0]) if e not in set(self.keep)]

    def new_bank(self, bank: ExpertWeights) -> ExpertWeights:
        """The new experts. One that is an old expert alone is its copy, bit for bit."""
        if self.experts is not None:
            return self.experts
        if self.merge_KE is None:
            return bank[torch.tensor(self.keep)]
        return stacked([self._merged(bank, weight_E) for weight_E in self.merge_KE])

    def new_router(self, router: RouterWeights) -> RouterWeights:
        """The new router; a correction belongs to an expert, so it is kept and never summed.

        A row that is an old row alone is its copy, bit for bit.
        """
        if self.rows_KE is None:
            return router
        kept = torch.tensor(self.keep)
        return RouterWeights(
            weight=_summed(self.rows_KE, router.weight),
            bias=None if router.bias is None else _summed(self.rows_KE, router.bias),
            correction=None if router.correction is None else router.correction[kept],
        )

    def check(self, rule: RoutingRule) -> None:
        """Refuse a plan that the block's rule of routing cannot follow.

        Raises:
            SpecError: fewer experts than a token needs, or groups of unequal size.
        """
        experts, count = self.transfer_EK.shape
        _require(
            list(self.keep) == sorted(set(self.keep)), f"keep is {self.keep}; wanted ascending"
        )
        _require(count == len(self.keep) >= 1, f"{count} columns of transfer for {self.keep}")
        _require(self.keep[0] >= 0 and self.keep[-1] < experts, f"keep is {self.keep} of {experts}")
        total_E = self.transfer_EK.sum(1)
        _require(bool((total_E < 1 + 1e-6).all()), "an expert passes on more than all of itself")
        if self.rows_KE is None:
            return
        _require(
            count >= rule.smallest,
            f"{count} experts are too few: a token takes {rule.top_k}, and this block works with "
            f"{rule.smallest} or more",
        )
        size = experts // rule.groups
        in_group = [sum(e // size == group for e in self.keep) for group in range(rule.groups)]
        _require(
            len(set(in_group)) == 1,
            f"the router splits its experts into {rule.groups} equal groups, and the plan keeps "
            f"{in_group} of them",
        )

    def _merged(self, bank: ExpertWeights, weight_E: Tensor) -> ExpertWeights:
        members = weight_E.nonzero().flatten().tolist()
        if len(members) == 1:
            return bank[members[0]]
        total: dict[str, Tensor] = {}
        for e in members:
            expert = bank[e] if self.order_EH is None else bank[e].reordered(self.order_EH[e])
            for name, value in expert.items():
                part = value.double() * weight_E[e].double().to(value.device)
                total[name] = part if name not in total else total[name] + part
        return ExpertWeights(**{n: v.to(getattr(bank, n).dtype) for n, v in total.items()})


def kept(keep: Sequence[int], experts: int) -> BlockPlan:
    """The plan that keeps some experts as they are and drops the others with their router rows."""
    ids = tuple(sorted(keep))
    rows_KE = torch.eye(experts, dtype=torch.float64)[list(ids)]
    return BlockPlan(ids, transfer_EK=rows_KE.T, rows_KE=rows_KE)


def clustered(
    clusters: Sequence[Sequence[int]],
    heads: Sequence[int],
    weight_E: Tensor,
    router: str,
    order_EH: Tensor | None = None,
) -> BlockPlan:
    """The plan that merges each cluster of experts into one.

    Args:
        clusters: a partition of the experts.
        heads: a member of each cluster, which the new expert descends from.
        weight_E: how much each expert counts in the mean; a cluster of zeros counts all alike.
        router: ``alias`` keeps E rows, and a token's weight for any member goes to the merged
            expert; ``average`` takes the weighted mean of the members' rows; ``dominant`` takes
            the head's.
        order_EH: hidden neurons of each expert in the order of its head's.
    """
    experts = weight_E.numel()
    pairs = sorted(zip(heads, clusters, strict=True))
    member_KE = torch.zeros(len(pairs), experts, dtype=torch.float64)
    for place, (_, cluster) in enumerate(pairs):
        member_KE[place, list(cluster)] = 1.0
    merge_KE = member_KE * weight_E.double()
    empty_K1 = merge_KE.sum(1, keepdim=True) == 0
    merge_KE = torch.where(empty_K1, member_KE, merge_KE)
    merge_KE = merge_KE / merge_KE.sum(1, keepdim=True)
    keep = tuple(head for head, _ in pairs)
    rows = {
        "alias": None,
        "average": merge_KE,
        "dominant": torch.eye(experts, dtype=torch.float64)[list(keep)],
    }
    return BlockPlan(keep, member_KE.T, rows[router], merge_KE, order_EH)


def _summed(rows_KE: Tensor, value: Tensor) -> Tensor:
    """``rows_KE @ value`` in float64, where a row of a single 1 copies."""
    rows_KE = rows_KE.to(value.device)
    total = (rows_KE.double() @ value.double()).to(value.dtype)
    is_copy_K = ((rows_KE != 0).sum(1) == 1) & ((rows_KE == 1).sum(1) == 1)
    source_K = rows_KE.argmax(1)
    total[is_copy_K] = value[source_K[is_copy_K]]
    return total


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise SpecError(f"the plan does not fit the block: {sentence}")
