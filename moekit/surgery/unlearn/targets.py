"""What unlearning trains: one attributed expert and its router, or any of the baselines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moekit.errors import SpecError
from moekit.spec import Spec
from moekit.surgery.unlearn.attribution import select_experts
from moekit.surgery.view import BlockView, block_views

_TRAINABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Choice:
    """What is trained of a model.

    Attributes:
        experts: (block, expert) of those that are trained alone.
        banks: blocks whose experts are all trained.
        routers: blocks whose router is trained.
        shared: blocks whose shared expert is trained.
        everything: all parameters are.
    """

    experts: tuple[tuple[int, int], ...] = ()
    banks: tuple[int, ...] = ()
    routers: tuple[int, ...] = ()
    shared: tuple[int, ...] = ()
    everything: bool = False

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks with something trained, unless everything is."""
        found = {block for block, _ in self.experts}
        return tuple(sorted(found.union(self.banks, self.routers, self.shared)))

    def anchored(self) -> dict[int, list[int]]:
        """The selected experts of each block, for the anchor."""
        found: dict[int, list[int]] = {}
        for block, expert in self.experts:
            found.setdefault(block, []).append(expert)
        return found


Scores = Callable[[], Tensor]
"""Gives the affinities (L, E), which take a pass over the forget text."""


@dataclass(frozen=True)
class Targets(Spec):
    """Base of every choice of what to train."""

    abstract: ClassVar[bool] = True
    name: ClassVar[str]

    def choose(self, views: Sequence[BlockView], scores: Scores) -> Choice:
        """The choice for a model with these MoE blocks.

        Raises:
            SpecError: there is no such part in the model.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class _Selected(Targets):
    """A few experts with the routers of their blocks.

    Attributes:
        router: whether those routers are trained, with all of their rows.
        shared: whether the shared experts of those blocks are trained too.
    """

    abstract: ClassVar[bool] = True
    router: bool = True
    shared: bool = False

    def _choice(self, views: Sequence[BlockView], experts: Sequence[tuple[int, int]]) -> Choice:
        blocks = tuple(sorted({block for block, _ in experts}))
        if self.shared:
            self._require_shared(views, blocks)
        return Choice(
            experts=tuple(experts),
            routers=blocks if self.router else (),
            shared=blocks if self.shared else (),
        )

    def _require_shared(self, views: Sequence[BlockView], blocks: Sequence[int]) -> None:
        for block in blocks:
            if views[block].shared is None:
                raise SpecError(f"{views[block].name} has no shared expert; leave shared out")


@dataclass(frozen=True)
class Attributed(_Selected):
    """The experts with the highest affinity to the forget text (UOE, SEUF).

    Attributes:
        count: how many, the paper's M.
        scope: ``global`` takes them from all blocks, ``layer`` from that of the best one.
    """

    abstract: ClassVar[bool] = False
    name: ClassVar[str] = "expert"
    count: int = 1
    scope: Literal["global", "layer"] = "global"

    def check(self) -> None:
        self.require(self.count >= 1, f"count is {self.count}; wanted at least 1 expert")

    def choose(self, views: Sequence[BlockView], scores: Scores) -> Choice:
        return self._choice(views, select_experts(scores(), self.count, self.scope))


@dataclass(frozen=True)
class Named(_Selected):
    """Experts by their numbers.

    Attributes:
        experts: pairs of a decoder layer's number and an expert's.
    """

    abstract: ClassVar[bool] = False
    name: ClassVar[str] = "named"
    experts: tuple[tuple[int, int], ...] = field(default=())

    def check(self) -> None:
        self.require(bool(self.experts), "no expert is named; wanted pairs (layer, expert)")
        self.require(len(set(self.experts)) == len(self.experts), "an expert is named twice")

    def choose(self, views: Sequence[BlockView], scores: Scores) -> Choice:
        block_of = {view.index: block for block, view in enumerate(views)}
        for layer, expert in self.experts:
            if layer not in block_of:
                known = ", ".join(map(str, block_of))
                raise SpecError(f"layer {layer} has no MoE block; those that have: {known}")
            view = views[block_of[layer]]
            if not 0 <= expert < view.experts:
                raise SpecError(
                    f"layer {layer} has no routed expert {expert}; it has 0 to "
                    f"{view.experts - 1}, and its shared expert is trained with shared=True only"
                )
        return self._choice(views, [(block_of[layer], e) for layer, e in self.experts])


@dataclass(frozen=True)
class RandomExperts(_Selected):
    """Experts drawn by chance, a baseline.

    Attributes:
        count: how many.
        seed: of the draw.
    """

    abstract: ClassVar[bool] = False
    name: ClassVar[str] = "random"
    count: int = 1
    seed: int = 0

    def check(self) -> None:
        self.require(self.count >= 1, f"count is {self.count}; wanted at least 1 expert")

    def choose(self, views: Sequence[BlockView], scores: Scores) -> Choice:
        every = [(block, e) for block, view in enumerate(views) for e in range(view.experts)]
        if self.count > len(every):
            raise SpecError(f"{self.count} experts cannot be drawn of {len(every)}")
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randperm(len(every), generator=generator)[: self.count].tolist()
        return self._choice(views, [every[index] for index in drawn])


@dataclass(frozen=True)
class AllExperts(Targets):
    """Every routed expert of every block, or of some layers, a baseline.

    Attributes:
        router: whether the routers are trained too.
        layers: numbers of decoder layers; None for all.
    """

    name: ClassVar[str] = "experts"
    router: bool = True
    layers: tuple[int, ...] | None = None

    def choose(self, views: Sequence[BlockView], scores: Scores) -> Choice:
        known = [view.index for view in views]
        for layer in self.layers or ():
            if layer not in known:
                raise SpecError(
                    f"layer {layer} has no MoE block; those that have: "
                    + ", ".join(map(str, known))
                )
        wanted = known if self.layers is None else self.layers
        blocks = tuple(block for block, layer in enumerate(known) if layer in wanted)
        if not blocks:
            raise SpecError("layers is empty; name one, or leave it out for all")
        return Choice(banks=blocks, routers=blocks if self.router else ())


@dataclass(frozen=True)
class Routers(Targets):
    """Every router and nothing else, a baseline."""

    name: ClassVar[str] = "routers"

    def choose(self, views: Sequence[BlockView], scores: Scores) -> Choice:
        return Choice(routers=tuple(range(len(views))))


@dataclass(frozen=True)
class Everything(Targets):
    """Every parameter of the model: ordinary unlearning, a baseline."""

    name: ClassVar[str] = "all"

    def choose(self, views: Sequence[BlockView], scores: Scores) -> Choice:
        return Choice(everything=True)


def choice_of(model: PreTrainedModel, targets: Targets, scores: Scores) -> Choice:
    """What ``targets`` trains of a model.

    Raises:
        SpecError: there is no such part, or the experts are quantised.
    """
    views = block_views(model)
    quantised = getattr(model.config, "quantization_config", None) is not None
    for view in views:
        weights = (*(w for _, w in view.bank.items()), view.router.weight)
        packed = [weight.dtype for weight in weights if weight.dtype not in _TRAINABLE]
        if packed or quantised:
            raise SpecError(
                f"the experts of {view.name} are {packed[0] if packed else 'quantised'}, a packed "
                "type; load the model in full precision"
            )
    return targets.choose(views, scores)
