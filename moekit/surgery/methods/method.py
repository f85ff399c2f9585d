"""What every method of reducing experts implements."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moekit.errors import SpecError
from moekit.spec import Spec
from moekit.surgery.plan import BlockPlan, kept
from moekit.surgery.statistics import BlockStatistics, Needs
from moekit.surgery.view import BlockView


@dataclass(frozen=True)
class Method(Spec):
    """Base of every method.

    Attributes:
        allocation: ``uniform`` gives every block the same number of experts. ``global`` gives the
            same number in total, and more of them to blocks where more experts matter: the experts
            of all blocks are ranked together by their share of their block's importance.
    """

    abstract: ClassVar[bool] = True
    name: ClassVar[str]
    allocation: Literal["uniform", "global"] = "uniform"

    @property
    def needs(self) -> Needs:
        """What must be recorded."""
        return Needs()

    @property
    def reroutes(self) -> bool:
        """Whether routers keep the rows of experts that are gone."""
        return False

    def importance(self, statistics: BlockStatistics) -> Tensor:
        """How much each expert of a block matters (E,), never negative.

        Raises:
            SpecError: the method does not rank experts.
        """
        raise SpecError(
            f"{self.name} ranks no experts and so cannot spread them over blocks; set allocation "
            "to uniform"
        )

    def plan(self, view: BlockView, statistics: BlockStatistics, count: int) -> BlockPlan:
        """What becomes of a block's experts when ``count`` of them are left.

        Args:
            view: the block, with its weights in memory.
            statistics: what was recorded of it.
            count: fewer than the block has, and at least one.

        Raises:
            SpecError: the method cannot do that with this block.
        """
        raise NotImplementedError

    def require_block(self, view: BlockView) -> None:
        """Refuse a block that the method cannot work on, from its shapes alone.

        Raises:
            SpecError: it cannot.
        """

    @classmethod
    def named(cls, name: str, /, **settings: object) -> Method:
        """The method of this name; a single word is a list of itself where a list is wanted.

        Raises:
            SpecError: there is none, or a setting does not fit it.
        """
        if "kind" in settings:
            raise SpecError(f"kind is no setting of {name}; name the method itself")
        found = {kind.name: kind for kind in cls.kinds().values()}
        if name not in found:
            raise SpecError(f"there is no method {name!r}; known: {', '.join(sorted(found))}")
        lists = {f.name for f in fields(found[name]) if isinstance(f.default, tuple)}
        given = {
            setting: [value] if setting in lists and isinstance(value, str) else value
            for setting, value in settings.items()
        }
        return cls.from_dict({"kind": found[name].__name__, **given})


@dataclass(frozen=True)
class ScoreMethod(Method):
    """Base of the methods that keep the experts with the highest scores as they are."""

    abstract: ClassVar[bool] = True

    def plan(self, view: BlockView, statistics: BlockStatistics, count: int) -> BlockPlan:
        score_E = self.importance(statistics)
        return kept(best_in_groups(score_E, count, view.rule.groups), score_E.numel())


def best_in_groups(score_E: Tensor, count: int, groups: int) -> list[int]:
    """The ids of the ``count`` highest scores, as many of each of the equal groups, ascending.

    Of equal scores the first is taken.

    Raises:
        SpecError: a score is not finite, or the groups cannot be of equal size.
    """
    if not bool(torch.isfinite(score_E).all()):
        raise SpecError("the scores of the experts are not finite")
    require_equal_groups(count, groups)
    size = score_E.numel() // groups
    order = score_E.view(groups, size).argsort(dim=1, descending=True, stable=True)
    ids = order[:, : count // groups] + torch.arange(groups)[:, None] * size
    return sorted(ids.flatten().tolist())


def require_equal_groups(count: int, groups: int) -> None:
    """Refuse a number of experts that the router's groups cannot share equally."""
    if count % groups:
        raise SpecError(
            f"{count} experts cannot be split into the router's {groups} equal groups; keep a "
            f"multiple of {groups}"
        )
