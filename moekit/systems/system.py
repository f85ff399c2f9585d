"""What a system is to the rest of moekit: its parts, a design at a given size, an experiment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moekit.compare import Design
from moekit.spec import Spec
from moekit.systems.experiment import Experiment


@dataclass(frozen=True)
class Shape(Spec):
    """Size at which a named design is built.

    Attributes:
        experts: feed-forward experts.
        hidden: hidden width of each before matching; a dense design gets ``k`` times that.
        k: feed-forward experts a token of a plain top-k design.
    """

    experts: int = 8
    hidden: int = 256
    k: int = 2

    def check(self) -> None:
        self.require(self.experts >= 2, f"experts is {self.experts}; a mixture needs at least two")
        self.require(self.hidden >= 8, f"hidden is {self.hidden}; wanted at least 8")
        self.require(
            1 <= self.k <= self.experts, f"k is {self.k}; wanted 1 to {self.experts} experts"
        )


@dataclass(frozen=True)
class System:
    """One published system, or a plain baseline.

    Attributes:
        name: what commands call it.
        title: a line that says what it is.
        paper: where it was published; empty for baselines.
        parts: what it is made of here.
        use: how to use it, if it is available.
        design: the design at a size, for systems that are a layer of a language model.
        experiment: the check of its claim.
    """

    name: str
    title: str
    paper: str
    parts: str
    use: str = ""
    design: Callable[[Shape], Design] | None = None
    experiment: Experiment | None = None

    @property
    def available(self) -> bool:
        """Whether this version has it."""
        return bool(self.use)
