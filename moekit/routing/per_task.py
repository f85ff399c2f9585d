"""One decision for all rows of a task, from a description of the task and not from the rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moekit.errors import SignalError
from moekit.routing.router import Site, linear_logits
from moekit.routing.routing import Routing, Signals
from moekit.routing.scoped import ScopedRouter, ScopedSpec


@dataclass(frozen=True)
class PerTask(ScopedSpec):
    """Every task is routed by the description of the task (MEO's task level).

    The tokens of a description are embedded with a table of the router's own, averaged and
    projected; the result is what ``router`` sees. The decision does not depend on the rows at all,
    so the router is causal, works with a KV cache, and its merged experts can be folded into
    dense layers (:func:`moekit.surgery.fold_tasks`).

    With one task, every row belongs to it. With several, ``Signals.task_S`` tells the task of each
    scope: ``task_ids`` in a call of the language model or of its ``generate``.

    He et al. 2023, arXiv 2310.09832.

    Attributes:
        descriptions: token ids of the description of each task, from any tokenizer.
        embedding: width of the table.
        projected: width that ``router`` sees; the released code takes ``embedding / 64``.

    Example:
        >>> from moekit import PerTask, TopK
        >>> translate, summarise = (17, 4, 92), (17, 33)
        >>> spec = PerTask(TopK(k=2), descriptions=(translate, summarise))
    """

    descriptions: tuple[tuple[int, ...], ...] = ((0,),)
    embedding: int = 128
    projected: int = 2

    def check(self) -> None:
        super().check()
        self.require(len(self.descriptions) > 0, "there is no task; describe at least one")
        for index, tokens in enumerate(self.descriptions):
            self.require(len(tokens) > 0, f"the description of task {index} has no tokens")
        for name in ("embedding", "projected"):
            value = getattr(self, name)
            self.require(value >= 1, f"{name} is {value}; wanted a positive width")

    def build(self, site: Site) -> PerTaskRouter:
        return PerTaskRouter(self, site)


class PerTaskRouter(ScopedRouter):
    """The module of :class:`PerTask`.

    ``table_UC`` has a row for each of the U ids that occur in a description, which is the part of
    a whole table that is ever used.
    """

    share_TU: Tensor

    def __init__(self, spec: PerTask, site: Site) -> None:
        super().__init__(spec, site, Site(spec.projected, site.kinds))
        self.descriptions = spec.descriptions
        ids = len({token for tokens in spec.descriptions for token in tokens})
        self.table_UC = nn.Parameter(torch.empty(ids, spec.embedding))
        self.weight = nn.Parameter(torch.empty(spec.projected, spec.embedding))
        self.bias = nn.Parameter(torch.empty(spec.projected))
        self.register_buffer("share_TU", torch.empty(self.tasks, ids))
        self._reset_descriptions()

    @property
    def tasks(self) -> int:
        """Number of tasks T."""
        return len(self.descriptions)

    @property
    def requires(self) -> frozenset[str]:  # type: ignore[override]
        """The task of each scope, unless there is one task."""
        tells_task = {"scope_N", "task_S"} if self.tasks > 1 else set()
        return self.router.requires | tells_task

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        super().reset_parameters(std)
        self._reset_descriptions()

    def route(self, x_ND: Tensor, signals: Signals) -> Routing:
        return self._to_rows(self.decisions(signals), x_ND, signals)

    def decisions(self, signals: Signals) -> Routing:
        """The routing of every task (T, K)."""
        task_S, present_T = signals.task_S, None
        if self.tasks > 1 and task_S is not None:  # a batch need not hold every task
            present_T = self.share_TU.new_zeros(self.tasks).index_fill(0, task_S, 1.0) > 0
        described_TC = linear_logits(self.share_TU, self.table_UC.T)
        seen = Signals(valid_N=present_T, experts=signals.experts)
        return self.router.route(linear_logits(described_TC, self.weight, self.bias), seen)

    def _to_rows(self, decisions: Routing, x_ND: Tensor, signals: Signals) -> Routing:
        """The decisions broadcast to the rows, through whichever scopes are fewer."""
        if self.tasks == 1:
            return decisions.take(torch.zeros(len(x_ND), dtype=torch.int64, device=x_ND.device))
        assert signals.task_S is not None  # ``requires`` has seen to it
        assert signals.scope_N is not None
        if self.tasks <= len(signals.task_S):
            return decisions.take(signals.task_S[signals.scope_N])
        return decisions.take(signals.task_S).take(signals.scope_N)

    def _check(self, x_ND: Tensor, signals: Signals) -> None:
        super()._check(x_ND, signals)
        task_S = signals.task_S
        if self.tasks == 1 or task_S is None:
            return
        if task_S.dim() != 1 or task_S.dtype not in (torch.int64, torch.int32):
            raise SignalError(
                f"{type(self).__name__}: signal task_S has shape {tuple(task_S.shape)} and dtype "
                f"{task_S.dtype}; wanted one integer a scope"
            )
        if torch.compiler.is_compiling() or task_S.device.type != "cpu":
            return  # reading values would wait for the device or end the graph
        if bool(((task_S < 0) | (task_S >= self.tasks)).any()):
            raise SignalError(
                f"{type(self).__name__}: signal task_S holds tasks outside 0 to {self.tasks - 1}, "
                "those that have a description"
            )

    @torch.no_grad()
    def _reset_descriptions(self) -> None:
        """A table as of ``nn.Embedding`` and a map as of ``nn.Linear``, as released."""
        nn.init.normal_(self.table_UC)
        bound = self.table_UC.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)
        self.share_TU.copy_(_shares(self.descriptions))


def _shares(descriptions: tuple[tuple[int, ...], ...]) -> Tensor:
    """How often each id occurs in each description (T, U), divided by the description's length."""
    ids = sorted({token for tokens in descriptions for token in tokens})
    counts = [[tokens.count(i) / len(tokens) for i in ids] for tokens in descriptions]
    return torch.tensor(counts)
