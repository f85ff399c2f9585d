"""The algorithms: what is pushed up on the forget text, and what holds the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from moekit.errors import SpecError
from moekit.spec import Spec
from moekit.surgery.batch import Batch
from moekit.surgery.unlearn.losses import npo_loss, rmu_forget_loss, rmu_retain_loss
from moekit.surgery.unlearn.run import Runner, Seen

_NORMS = 10.0


class Objective(Protocol):
    """The losses of a run; what is minimised is forget + retain_weight · retain + anchor."""

    @property
    def retain_weight(self) -> float:
        """λ."""

    def forget(self, run: Runner, batch: Batch) -> tuple[Seen, Tensor]:
        """A pass over forget text, and its loss ()."""

    def retain(self, run: Runner, batch: Batch) -> Tensor:
        """The loss of retain text ()."""


@dataclass(frozen=True)
class Start:
    """What an algorithm may need to know before the first step.

    Attributes:
        run: runs the model.
        batch: the first forget batch.
        layers: decoder layers with something trained, in order; the experts that are trained alone
            are in ``selected``.
        selected: decoder layers of the experts that are trained alone.
        seed: of what is random.
    """

    run: Runner
    batch: Batch
    layers: tuple[int, ...]
    selected: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Algorithm(Spec):
    """Base of every algorithm. A new one implements ``start``."""

    abstract: ClassVar[bool] = True
    name: ClassVar[str]

    @property
    def retain_weight(self) -> float:
        """λ; more than 0 needs retain text."""
        return 0.0

    def start(self, given: Start) -> Objective:
        """The objective of one run.

        Raises:
            SpecError: the algorithm does not fit what is trained.
        """
        raise NotImplementedError

    @classmethod
    def named(cls, name: str, /, **settings: object) -> Algorithm:
        """The algorithm of this name.

        Raises:
            SpecError: there is none, or a setting does not fit it.
        """
        if "kind" in settings:
            raise SpecError(f"kind is no setting of {name}; name the algorithm itself")
        found = {kind.name: kind for kind in cls.kinds().values()}
        if name not in found:
            raise SpecError(f"there is no algorithm {name!r}; known: {', '.join(sorted(found))}")
        return cls.from_dict({"kind": found[name].__name__, **settings})


@dataclass(frozen=True)
class _Likelihood(Algorithm):
    """Algorithms whose retain loss is the cross-entropy of retain text."""

    abstract: ClassVar[bool] = True

    def start(self, given: Start) -> Objective:
        return self

    def forget(self, run: Runner, batch: Batch) -> tuple[Seen, Tensor]:
        """Gradient ascent: the cross-entropy with its sign turned."""
        seen = run(batch)
        return seen, -seen.nats

    def retain(self, run: Runner, batch: Batch) -> Tensor:
        """The cross-entropy."""
        return run(batch).nats


@dataclass(frozen=True)
class GA(_Likelihood):
    """Gradient ascent on the cross-entropy of forget text; nothing holds the rest."""

    abstract: ClassVar[bool] = False
    name: ClassVar[str] = "ga"


@dataclass(frozen=True)
class GDiff(_Likelihood):
    """Gradient difference: ascent on forget text, descent on retain text.

    Attributes:
        weight: λ of the retain text.
    """

    abstract: ClassVar[bool] = False
    name: ClassVar[str] = "gdiff"
    weight: float = 1.0

    def check(self) -> None:
        self.require(self.weight >= 0, f"weight is {self.weight}; wanted 0 or more")

    @property
    def retain_weight(self) -> float:
        return self.weight


@dataclass(frozen=True)
class NPO(_Likelihood):
    """Negative preference optimisation against the model before (Zhang et al. 2024).

    Attributes:
        beta: inverse temperature; towards 0 it is gradient ascent.
        weight: λ of the retain text.
    """

    abstract: ClassVar[bool] = False
    name: ClassVar[str] = "npo"
    beta: float = 0.001
    weight: float = 1.0

    def check(self) -> None:
        self.require(self.beta > 0, f"beta is {self.beta}; wanted more than 0")
        self.require(self.weight >= 0, f"weight is {self.weight}; wanted 0 or more")

    @property
    def retain_weight(self) -> float:
        return self.weight

    def forget(self, run: Runner, batch: Batch) -> tuple[Seen, Tensor]:
        reference_B = run.before(batch).nats_B
        seen = run(batch)
        return seen, npo_loss(seen.nats_B, reference_B, self.beta)


@dataclass(frozen=True)
class RMU(Algorithm):
    """Representation misdirection: hidden states of forget text go to one random direction.

    Those of retain text stay where they were (Li et al. 2024, arXiv 2403.03218).

    Attributes:
        layer: decoder layer whose output is steered; None for the last with a selected expert.
        coefficient: length of the random vector; None for 10 times the mean norm of the hidden
            states of the first forget batch.
        weight: of the retain loss.
    """

    name: ClassVar[str] = "rmu"
    layer: int | None = None
    coefficient: float | None = None
    weight: float = 1200.0

    def check(self) -> None:
        self.require(self.weight >= 0, f"weight is {self.weight}; wanted 0 or more")
        self.require(
            self.coefficient is None or self.coefficient > 0,
            f"coefficient is {self.coefficient}; wanted more than 0",
        )

    @property
    def retain_weight(self) -> float:
        return self.weight

    def start(self, given: Start) -> Objective:
        layer = self._layer(given)
        hidden_ND = given.run.before(given.batch, hidden_after=layer).hidden_ND
        assert hidden_ND is not None
        length = self.coefficient
        if length is None:
            length = _NORMS * float(hidden_ND.float().norm(dim=-1).mean())
        generator = torch.Generator().manual_seed(given.seed)
        direction_D = torch.rand(hidden_ND.shape[-1], generator=generator)
        target_D = length * direction_D / direction_D.norm()
        return _Misdirection(layer, target_D.to(hidden_ND.device), self.weight)

    def _layer(self, given: Start) -> int:
        if self.layer is None:
            if not given.selected:
                raise SpecError(
                    "RMU steers the output of one layer; name it with layer=N, since no single "
                    "expert is selected here"
                )
            return max(given.selected)
        highest = max(given.selected, default=min(given.layers))
        if self.layer < highest:
            raise SpecError(
                f"RMU after layer {self.layer} gives no gradient to layer {highest}, which is "
                f"above it; wanted layer={highest} or higher"
            )
        if self.layer >= given.run.layers:
            raise SpecError(
                f"the model has no layer {self.layer}; it has 0 to {given.run.layers - 1}"
            )
        return self.layer


@dataclass(frozen=True)
class _Misdirection:
    """RMU with its layer and target settled."""

    layer: int
    target_D: Tensor
    retain_weight: float

    def forget(self, run: Runner, batch: Batch) -> tuple[Seen, Tensor]:
        seen = run(batch, hidden_after=self.layer)
        assert seen.hidden_ND is not None
        return seen, rmu_forget_loss(seen.hidden_ND, self.target_D)

    def retain(self, run: Runner, batch: Batch) -> Tensor:
        reference_ND = run.before(batch, hidden_after=self.layer).hidden_ND
        hidden_ND = run(batch, hidden_after=self.layer).hidden_ND
        assert hidden_ND is not None
        return rmu_retain_loss(hidden_ND, reference_ND)
