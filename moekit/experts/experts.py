"""The expert bank protocol, and the bank made of banks."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from moekit.errors import SpecError
from moekit.experts.activation import Activation
from moekit.experts.direct import Direct
from moekit.experts.groups import RowGroups
from moekit.experts.mixtures import Mixtures
from moekit.spec import Spec

Run = Callable[[Tensor, RowGroups], Tensor]
"""Outputs of rows that are sorted by expert."""


@dataclass(frozen=True)
class ExpertsSpec(Spec):
    """Base of every bank spec."""

    abstract: ClassVar[bool] = True

    def expert_kinds(self) -> tuple[str, ...]:
        """One entry an expert: ``feed_forward``, ``zero``, ``copy`` or ``constant``."""
        raise NotImplementedError

    def build(self, width: int) -> Experts:
        """The bank module for rows of ``width``."""
        raise NotImplementedError

    def out_width(self, width: int) -> int:
        """Width of the rows that the bank returns."""
        return width

    def parameters_E(self, width: int) -> tuple[int, ...]:
        """Number of parameters of each expert."""
        raise NotImplementedError

    def check_merging(self) -> None:
        """Refuse a bank whose dispatched experts cannot be merged, for want of a common shape."""


class FeedForward(NamedTuple):
    """Feed-forward experts as tensors, for kernels that run more than one step at once.

    Attributes:
        up_EJD: first projection; J is the width before the activation, 2 H for gated experts.
        down_EOH: second projection.
        up_bias_EJ, down_bias_EO: biases, or None.
        activation: what stands between the projections.
    """

    up_EJD: Tensor
    down_EOH: Tensor
    up_bias_EJ: Tensor | None
    down_bias_EO: Tensor | None
    activation: Activation

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Weights and biases, in the order of the fields."""
        return self.up_EJD, self.down_EOH, self.up_bias_EJ, self.down_bias_EO

    @property
    def out_width(self) -> int:
        """Width O of the rows that come out."""
        return self.down_EOH.shape[1]


class Experts(nn.Module):
    """Base of every expert bank.

    A bank is run in two ways, and an expert belongs to one of them. Experts with matrix products
    are *dispatched*: ``forward`` gets their rows sorted by expert. Zero-computation experts are
    *direct*: ``direct`` says what their weighted outputs are, by elementwise algebra on the whole
    token matrix; their rows are never gathered.

    Attributes:
        kinds: one entry an expert, see :meth:`ExpertsSpec.expert_kinds`.
        width, out_width: widths of the rows in and out.
    """

    def __init__(self, kinds: tuple[str, ...], width: int, out_width: int) -> None:
        super().__init__()
        self.kinds = kinds
        self.width = width
        self.out_width = out_width

    @property
    def dispatched_ranges(self) -> list[tuple[int, int]]:
        """The ranges ``[start, stop)`` of expert ids whose rows ``forward`` wants, in order."""
        return [(0, len(self.kinds))]

    @property
    def dispatched(self) -> int:
        """Number of experts whose rows ``forward`` wants."""
        return sum(stop - start for start, stop in self.dispatched_ranges)

    def forward(self, rows_RD: Tensor, groups: RowGroups) -> Tensor:
        """Outputs (R, out_width) of the dispatched experts for their rows."""
        raise NotImplementedError

    def merged(self, mixtures: Mixtures) -> Run:
        """The dispatched experts merged into one a mixture, run over rows sorted by mixture.

        Every parameter is merged along its first dimension, which counts the experts.

        Args:
            mixtures: weights of this bank's experts in each of S mixtures.

        Returns:
            ``forward`` of a bank of S experts.
        """
        parameters = {name: mixtures.of(value) for name, value in self.named_parameters()}

        def run(rows_RD: Tensor, groups: RowGroups) -> Tensor:
            y_RO: Tensor = functional_call(self, parameters, (rows_RD, groups))
            return y_RO

        return run

    def map(self, rows_RD: Tensor, groups: RowGroups) -> Tensor:
        """Inner rows (R, I) of a bank that is run around another operation.

        Such a bank computes ``reduce(operation(map(rows)))``; see :class:`AttentionHeads`.
        """
        raise NotImplementedError(f"{type(self).__name__} is no map and reduce")

    def reduce(self, rows_RI: Tensor, groups: RowGroups) -> Tensor:
        """Outputs (R, out_width) for inner rows that the other operation has changed."""
        raise NotImplementedError(f"{type(self).__name__} is no map and reduce")

    def feed_forward(self) -> FeedForward | None:
        """All dispatched experts as tensors, if ``forward`` does just what they say; else None."""
        return None

    def runs_as(self, kind: type[Experts]) -> bool:
        """Whether a call of this module is ``kind.forward`` and nothing else: no hook, no patch."""
        hooked = (
            self._forward_hooks
            or self._forward_pre_hooks
            or self._backward_hooks
            or self._backward_pre_hooks
        )
        return not hooked and "forward" not in vars(self) and type(self).forward is kind.forward

    def direct(self, weight_NE: Tensor) -> Direct | None:
        """The weighted sum of the direct experts' outputs; None where it is nothing.

        Args:
            weight_NE: combine weights over this bank's own experts; 0 where one is not chosen.
        """
        return None

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw the parameters anew from torch's default generator."""


@dataclass(frozen=True)
class Bank(ExpertsSpec):
    """Several banks as one: expert ids run through the parts in order.

    Example: ``Bank((SwiGLU(count=8, hidden=256), Constant(2), Copy(1), Zero(1)))`` is MoE++'s.
    """

    parts: tuple[ExpertsSpec, ...]

    def check(self) -> None:
        self.require(len(self.parts) > 0, "it has no parts; give at least one bank")

    def expert_kinds(self) -> tuple[str, ...]:
        return tuple(kind for part in self.parts for kind in part.expert_kinds())

    def build(self, width: int) -> Experts:
        return ExpertsBank(self, width)

    def out_width(self, width: int) -> int:
        widths = {part.out_width(width) for part in self.parts}
        self.require(len(widths) == 1, f"its parts return rows of different widths {widths}")
        return widths.pop()

    def parameters_E(self, width: int) -> tuple[int, ...]:
        return tuple(n for part in self.parts for n in part.parameters_E(width))

    def check_merging(self) -> None:
        working = [part for part in self.parts if "feed_forward" in part.expert_kinds()]
        self.require(
            len(working) <= 1,
            f"experts of {len(working)} parts have no common shape to be merged in; "
            "put the experts with matrix products into one part",
        )
        for part in working:
            part.check_merging()


class ExpertsBank(Experts):
    """The module of :class:`Bank`."""

    def __init__(self, spec: Bank, width: int) -> None:
        super().__init__(spec.expert_kinds(), width, spec.out_width(width))
        self.parts = nn.ModuleList(part.build(width) for part in spec.parts)

    @property
    def dispatched_ranges(self) -> list[tuple[int, int]]:
        ranges, start = [], 0
        for part in self._parts():
            ranges += [(start + a, start + b) for a, b in part.dispatched_ranges]
            start += len(part.kinds)
        return ranges

    def forward(self, rows_RD: Tensor, groups: RowGroups) -> Tensor:
        return self._each(self._working(), rows_RD, groups)

    def map(self, rows_RD: Tensor, groups: RowGroups) -> Tensor:
        return self._each([part.map for part in self._working()], rows_RD, groups)

    def reduce(self, rows_RI: Tensor, groups: RowGroups) -> Tensor:
        return self._each([part.reduce for part in self._working()], rows_RI, groups)

    def merged(self, mixtures: Mixtures) -> Run:
        start = 0
        for part in self._parts():
            stop = start + len(part.kinds)
            if part.dispatched:  # the only one, see ``check_merging``
                return part.merged(mixtures.slice(start, stop))
            start = stop
        raise SpecError("the bank has no experts with matrix products that could be merged")

    def feed_forward(self) -> FeedForward | None:
        working = self._working()
        alone = len(working) == 1 and self.runs_as(ExpertsBank)
        return working[0].feed_forward() if alone else None

    def direct(self, weight_NE: Tensor) -> Direct | None:
        parts = self._parts()
        weights = weight_NE.split([len(part.kinds) for part in parts], dim=1)
        shares = [part.direct(weight) for part, weight in zip(parts, weights, strict=True)]
        found = [share for share in shares if share is not None]
        return functools.reduce(operator.add, found) if found else None

    def reset_parameters(self, std: float = 0.02) -> None:
        for part in self._parts():
            part.reset_parameters(std)

    def _each(self, runs: Sequence[Run], rows: Tensor, groups: RowGroups) -> Tensor:
        """Let each working part run its own rows."""
        if len(runs) == 1:  # the usual case: one feed-forward bank beside cheap experts
            return runs[0](rows, groups)
        outputs, expert, row = [], 0, 0
        for part, run in zip(self._working(), runs, strict=True):
            size = sum(groups.sizes[expert : expert + part.dispatched])
            own = groups.slice(expert, expert + part.dispatched)
            outputs.append(run(rows[row : row + size], own))
            expert, row = expert + part.dispatched, row + size
        return torch.cat(outputs)

    def _working(self) -> list[Experts]:
        """The parts that have dispatched experts."""
        return [part for part in self._parts() if part.dispatched]

    def _parts(self) -> list[Experts]:
        return list(self.parts)  # type: ignore[arg-type]
