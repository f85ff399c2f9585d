"""What one run of unlearning does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moekit.spec import Spec
from moekit.surgery.unlearn.algorithms import NPO, Algorithm
from moekit.surgery.unlearn.targets import Attributed, Targets


@dataclass(frozen=True)
class UnlearnSpec(Spec):
    """Algorithm, what is trained, and when it ends.

    Attributes:
        algorithm: the losses.
        targets: what is trained.
        anchor: α of the router anchor, at the routers of selected experts; 0 for none.
        anchor_reduction: see :class:`RouterAnchorLoss`.
        steps: most optimiser steps.
        until: the run ends once perplexity on held-out forget text is so many times what it was;
            None to take all steps.
        check_every: steps from one look at the held-out text to the next.
        learning_rate, weight_decay: of AdamW, constant.
        max_grad_norm: gradients are cut to this norm.
        batch_size: sequences that run together.
        accumulate: such batches an optimiser step.
        attribution_tokens: tokens of forget text that experts are attributed with; None for all.
        seed: of everything random.
    """

    algorithm: Algorithm = NPO()
    targets: Targets = Attributed()
    anchor: float = 1.0
    anchor_reduction: Literal["sum", "mean"] = "sum"
    steps: int = 300
    until: float | None = 4.0
    check_every: int = 10
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    batch_size: int = 4
    accumulate: int = 4
    attribution_tokens: int | None = 100_000
    seed: int = 0

    def check(self) -> None:
        for name in ("anchor", "weight_decay"):
            value = getattr(self, name)
            self.require(value >= 0, f"{name} is {value}; wanted 0 or more")
        for name in ("learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            self.require(value > 0, f"{name} is {value}; wanted more than 0")
        for name in ("steps", "check_every", "batch_size", "accumulate"):
            value = getattr(self, name)
            self.require(value >= 1, f"{name} is {value}; wanted at least 1")
        self.require(
            self.until is None or self.until > 1,
            f"until is {self.until}; wanted more than 1, as a multiple of the perplexity before",
        )
        self.require(
            self.attribution_tokens is None or self.attribution_tokens >= 1,
            f"attribution_tokens is {self.attribution_tokens}; wanted at least 1, or None for all",
        )
        self.require(0 <= self.seed < 2**63, f"seed is {self.seed}; wanted 0 or more")

    @property
    def sequences(self) -> int:
        """Sequences an optimiser step."""
        return self.batch_size * self.accumulate
