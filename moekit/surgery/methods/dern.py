"""DERN (Zhou et al. 2025, arXiv 2509.10377): drop experts and recombine their neurons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moekit.errors import SpecError
from moekit.surgery.methods.method import Method, best_in_groups
from moekit.surgery.methods.spherical import recluster
from moekit.surgery.plan import BlockPlan, kept
from moekit.surgery.statistics import BlockStatistics
from moekit.surgery.view import BlockView
from moekit.surgery.weights import ExpertWeights, stacked

Parts = Literal["gate", "up", "down"]


@dataclass(frozen=True)
class DERN(Method):
    """Router-statistics pruning, neuron-level reassignment, merging within the kept experts.

    1. The experts with the largest mean combine weight are kept.
    2. Each hidden neuron of a dropped expert (gate row, up row, down column) goes to the kept
       expert that has the neuron most similar to it, if the cosine is above ``alpha``.
    3. Each kept expert that received neurons is reduced to its width by weighted spherical k-means.

    Experts are gated and without biases: a bias belongs to no neuron.

    Attributes:
        alpha: cosine that a neuron must exceed to move, from -1 to 1.
        parts: what the cosine is taken over.
        router: ``rows`` adds to a kept expert's row those of the dropped ones in proportion to the
            neurons that it received, ``probability`` keeps all rows and adds their weights so,
            ``none`` drops the rows.
        canonicalize: compare neurons after scaling up and down to equal norms, and take the sign
            of both that fits better; neither changes what a neuron computes.
        weighted: count each neuron by its expert's importance in k-means.
        init: where k-means starts. ``own``: from the kept expert's own neurons, so that none of
            them loses its centre to one that came. ``gate_max``, the paper's: from the neurons
            with the largest number in their gate row.
        init_distinct: for ``gate_max``, the cosine from which a start repeats another and is
            passed over while others are left; 1 for the paper's own start, which takes near copies
            of one neuron several times.
        iterations: of k-means, at most.
    """

    name: ClassVar[str] = "dern"
    alpha: float = 0.5
    parts: tuple[Parts, ...] = ("up", "down")
    router: Literal["rows", "probability", "none"] = "rows"
    canonicalize: bool = False
    weighted: bool = True
    init: Literal["own", "gate_max"] = "own"
    init_distinct: float = 0.5
    iterations: int = 50

    def check(self) -> None:
        self.require(-1 <= self.alpha <= 1, f"alpha is {self.alpha}; wanted a cosine, -1 to 1")
        self.require(
            -1 < self.init_distinct <= 1,
            f"init_distinct is {self.init_distinct}; wanted more than -1 and at most 1",
        )
        self.require(self.iterations >= 1, f"iterations is {self.iterations}; wanted at least 1")
        self.require(
            0 < len(self.parts) == len(set(self.parts)),
            f"parts is {self.parts}; wanted some of gate, up and down, each once",
        )

    @property
    def reroutes(self) -> bool:
        return self.router == "probability"

    def importance(self, statistics: BlockStatistics) -> Tensor:
        return statistics.weight_E / statistics.tokens

    def require_block(self, view: BlockView) -> None:
        bank = view.architecture.experts(view.block)  # which need not be in memory
        if bank.gate is None or bank.has_bias:
            raise SpecError(
                f"DERN takes gated experts without biases apart into neurons; those of {view.name} "
                f"have {'biases' if bank.has_bias else 'no gate'}, so choose another method"
            )

    def plan(self, view: BlockView, statistics: BlockStatistics, count: int) -> BlockPlan:
        self.require_block(view)
        bank, importance_E = view.bank, self.importance(statistics)
        if not bool((importance_E > 0).any()):
            raise SpecError(f"no token gave any expert of {view.name} weight; give other text")
        groups = 1 if self.reroutes else view.rule.groups
        keep = best_in_groups(importance_E, count, groups)
        plan = self.recombine(bank.map(Tensor.cpu), importance_E.cpu(), keep)
        assert plan.experts is not None
        return replace(plan, experts=plan.experts.map(lambda value: value.to(bank.up.device)))

    def recombine(self, bank: ExpertWeights, importance_E: Tensor, keep: list[int]) -> BlockPlan:
        """Steps 2 and 3 for the experts to keep, ascending."""
        bare = kept(keep, importance_E.numel())
        moved = self.reassign(bank, keep)
        transfer_EK = bare.transfer_EK.clone()
        for source, (to_H, _) in moved.items():
            went_K = to_H[to_H >= 0].bincount(minlength=len(keep))
            transfer_EK[source] = went_K.double() / bank.hidden
        new = [
            self._merged(bank, importance_E, expert, place, moved)
            for place, expert in enumerate(keep)
        ]
        rows = {"rows": transfer_EK.T, "probability": None, "none": bare.rows_KE}
        return BlockPlan(bare.keep, transfer_EK, rows[self.router], experts=stacked(new))

    def reassign(self, bank: ExpertWeights, keep: list[int]) -> dict[int, tuple[Tensor, Tensor]]:
        """Where the neurons of each dropped expert go.

        Returns:
            For each dropped expert, the place in ``keep`` of the expert that each neuron goes to
            (H,), -1 for none, and the sign (H,) that its up and down are to be given.
        """
        dropped = [e for e in range(bank.up.shape[0]) if e not in set(keep)]
        found = {}
        for source in dropped:
            best_H = torch.full((bank.hidden,), -torch.inf)
            to_H, sign_H = torch.full((bank.hidden,), -1), torch.ones(bank.hidden)
            for place, expert in enumerate(keep):
                cosine_H, own_sign_H = self._nearest(bank[source], bank[expert])
                better_H = cosine_H > best_H
                best_H = torch.where(better_H, cosine_H, best_H)
                to_H = torch.where(better_H, place, to_H)
                sign_H = torch.where(better_H, own_sign_H, sign_H)
            found[source] = (torch.where(best_H > self.alpha, to_H, -1), sign_H)
        return found

    def _nearest(self, source: ExpertWeights, other: ExpertWeights) -> tuple[Tensor, Tensor]:
        """The largest cosine of each neuron of ``source`` with one of ``other``, and its sign."""
        fixed = _product(source, other, [p for p in self.parts if p == "gate"], False)
        turned = [p for p in self.parts if p != "gate"]
        free = _product(source, other, turned, self.canonicalize)
        both = fixed + (free.abs() if self.canonicalize else free)
        norms = [
            (
                _product(e, e, [p for p in self.parts if p == "gate"], False, own=True)
                + _product(e, e, turned, self.canonicalize, own=True)
            ).sqrt()
            for e in (source, other)
        ]
        cosine_HH = both / (norms[0][:, None] * norms[1]).clamp_min(1e-30)
        best = cosine_HH.clamp(-1, 1).max(1)
        sign_H = torch.ones(source.hidden)
        if self.canonicalize and turned:
            chosen_H = free.gather(1, best.indices[:, None]).flatten()
            sign_H = torch.where(chosen_H < 0, -1.0, 1.0)
        return best.values, sign_H

    def _merged(
        self,
        bank: ExpertWeights,
        importance_E: Tensor,
        expert: int,
        place: int,
        moved: dict[int, tuple[Tensor, Tensor]],
    ) -> ExpertWeights:
        own = bank[expert]
        came = [(source, to == place, sign) for source, (to, sign) in moved.items()]
        came = [(source, is_H, sign) for source, is_H, sign in came if bool(is_H.any())]
        if not came:
            return own
        pool, weights = (
            [_segments(own, None, self.canonicalize)],
            [importance_E[expert].expand(bank.hidden)],
        )
        for source, is_H, sign_H in came:
            pool.append(_segments(bank[source], sign_H, self.canonicalize)[is_H])
            weights.append(importance_E[source].expand(int(is_H.sum())))
        weight_S = torch.cat(weights) if self.weighted else torch.ones(sum(map(len, weights)))
        width = own.up.shape[1]
        centre_HP = recluster(
            torch.cat(pool),
            weight_S,
            own.hidden,
            width,
            None if self.init == "own" else self.init_distinct,
            self.iterations,
        )
        gate, up, down = centre_HP.split(width, dim=1)
        made = ExpertWeights(up=up, down=down.T, gate=gate)
        return made.map(lambda value: value.to(own.up.dtype))


def _segments(expert: ExpertWeights, sign_H: Tensor | None, canonical: bool) -> Tensor:
    """Gate row, up row and down column of every neuron, side by side (H, 3D)."""
    assert expert.gate is not None
    up, down = _scaled(expert, canonical)
    sign_H1 = torch.ones(1, 1) if sign_H is None else sign_H[:, None]
    return torch.cat([_widened(expert.gate), up * sign_H1, down * sign_H1], dim=1)


def _scaled(expert: ExpertWeights, canonical: bool) -> tuple[Tensor, Tensor]:
    """Up rows and down columns (H, D).

    Where ``canonical``, a pair has equal norms and the largest number of its up row is positive.
    """
    up, down = _widened(expert.up), _widened(expert.down).T
    if not canonical:
        return up, down
    up_H, down_H = up.norm(dim=1), down.norm(dim=1)
    is_dead_H = (up_H == 0) | (down_H == 0)
    factor_H = torch.where(is_dead_H, 1.0, (down_H / up_H.clamp_min(1e-30)).sqrt())
    largest_H = up.gather(1, up.abs().argmax(1, keepdim=True)).flatten()
    sign_H = torch.where(largest_H < 0, -1.0, 1.0)
    return up * (sign_H * factor_H)[:, None], down * (sign_H / factor_H)[:, None]


def _product(
    first: ExpertWeights,
    second: ExpertWeights,
    parts: Sequence[Parts],
    canonical: bool,
    own: bool = False,
) -> Tensor:
    """Inner products of the neurons of two experts (H, H) over some parts; ``own``: (H,)."""
    total = torch.zeros(())
    sides = []
    for expert in (first, second):
        assert expert.gate is not None
        up, down = _scaled(expert, canonical)
        sides.append({"gate": _widened(expert.gate), "up": up, "down": down})
    for part in parts:
        a, b = sides[0][part], sides[1][part]
        total = total + ((a * b).sum(1) if own else a @ b.T)
    return total


def _widened(weight: Tensor) -> Tensor:
    """In float32, or float64 where it is that."""
    return weight if weight.dtype == torch.float64 else weight.float()
