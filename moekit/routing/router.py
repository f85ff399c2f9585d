"""The router protocol: a spec that builds a module that maps hidden states to a Routing."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from moekit.autocast import without_autocast
from moekit.errors import SignalError, SpecError
from moekit.routing.routing import Load, Routing, Signals
from moekit.spec import Spec

# What an expert does with a row; "feed_forward" stands for every expert with a matrix product.
ZERO_COMPUTATION = ("zero", "copy", "constant")


@dataclass(frozen=True)
class Site:
    """Where a router stands: all that it may need to know to be built.

    Attributes:
        width: model width D of the rows it sees.
        kinds: one entry an expert: ``feed_forward``, ``zero``, ``copy`` or ``constant``.
        previous_experts: number of experts of the nearest MoE layer below, None for the first.
        vocabulary: number of token ids, None outside language models.
    """

    width: int
    kinds: tuple[str, ...]
    previous_experts: int | None = None
    vocabulary: int | None = None

    @property
    def experts(self) -> int:
        """Number of experts E."""
        return len(self.kinds)


@dataclass(frozen=True)
class RouterSpec(Spec):
    """Base of every router spec.

    ``causal`` tells whether a token's routing is independent of later tokens, ``fixed_k`` whether
    every token takes the same number of experts, ``settles`` whether one whose number is free comes
    to at most ``k`` of its own accord, so that a capacity limit knows for how many to make room,
    and ``scores`` what ``Routing.scores_NE`` holds: probabilities that sum to 1, free non-negative
    gates, or nothing.

    ``per_scope`` tells whether all rows of a scope (sequence, chunk, task) share one decision,
    ``bidirectional`` whether the router is for models that see whole sequences, so that a causal
    language model refuses it, and ``needs_past`` whether it looks at earlier rows of the sequence,
    which a KV cache does not keep.
    """

    abstract: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    fixed_k: ClassVar[bool] = True
    settles: ClassVar[bool] = False
    scores: ClassVar[Literal["probabilities", "gates", "nothing"]] = "probabilities"
    per_scope: ClassVar[bool] = False
    bidirectional: ClassVar[bool] = False
    needs_past: ClassVar[bool] = False

    def build(self, site: Site) -> Router:
        """The router module for a place in a model."""
        raise NotImplementedError

    def check_experts(self, kinds: tuple[str, ...]) -> None:
        """Refuse a bank that this router cannot serve."""

    def expected_load(self, share_E: tuple[float, ...], counted_E: tuple[bool, ...]) -> float:
        """Experts a token among those ``counted_E``, if expert loads settle at ``share_E``.

        ``share_E`` is each expert's share of all assignments and sums to 1.
        """
        raise NotImplementedError


class Router(nn.Module):
    """Base of every router. Subclasses implement ``route``.

    ``requires`` names the fields of :class:`Signals` without which the router cannot run; a
    missing one is refused by name. Rows that ``signals.valid_N`` marks as padding get no expert.
    """

    requires: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site

    @property
    def loss_weights(self) -> dict[str, float]:
        """Coefficient of each loss that this router puts into ``Routing.losses``."""
        return {}

    def forward(self, x_ND: Tensor, signals: Signals | None = None) -> Routing:
        """Route each row of ``x_ND``.

        Under ``torch.autograd.set_detect_anomaly`` the logits and ids are checked too.

        Raises:
            SignalError: a required signal is missing or has the wrong shape or dtype.
        """
        signals = Signals() if signals is None else signals
        self._check(x_ND, signals)
        routing = self.route(x_ND, signals)
        if not torch.compiler.is_compiling() and torch.is_anomaly_enabled():
            self._check_values(routing)
        return routing.without_padding(signals.valid_N)

    def route(self, x_ND: Tensor, signals: Signals) -> Routing:
        """Decide the experts of each row; padding is removed afterwards by ``forward``."""
        raise NotImplementedError

    def update(self, load: Load) -> None:
        """Change state without gradient; called once an optimiser step with that step's load."""

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw the parameters anew from torch's default generator."""

    def _check(self, x_ND: Tensor, signals: Signals) -> None:
        name = type(self).__name__
        for signal in sorted(self.requires):
            if getattr(signals, signal) is None:
                raise SignalError(f"{name} needs the signal {signal}, which was not passed")
        for signal in ("valid_N", "token_id_N", "scope_N", "modality_N"):
            value = getattr(signals, signal)
            if value is not None and value.shape != x_ND.shape[:1]:
                raise SignalError(
                    f"{name}: signal {signal} has shape {tuple(value.shape)}; "
                    f"wanted ({x_ND.shape[0]},), one entry a row"
                )
        if signals.valid_N is not None and signals.valid_N.dtype != torch.bool:
            raise SignalError(
                f"{name}: signal valid_N has dtype {signals.valid_N.dtype}; wanted torch.bool, "
                "True where a row is a token (attention_mask.bool().flatten())"
            )

    def _check_values(self, routing: Routing) -> None:
        """Look at the values themselves, which waits for the device: in anomaly mode only."""
        name, logits_NE, expert_NK = type(self).__name__, routing.logits_NE, routing.expert_NK
        if logits_NE is not None and not bool(torch.isfinite(logits_NE).all()):
            raise SignalError(
                f"{name} produced logits that are not finite; "
                "its input or its weights hold NaN or infinity"
            )
        if not bool(((expert_NK >= -1) & (expert_NK < routing.experts)).all()):
            raise SpecError(
                f"{name} produced expert ids outside 0 to {routing.experts - 1}, "
                "the experts of its bank (-1 for an unused slot)"
            )


def routing_dtype(x: Tensor) -> torch.dtype:
    """Routers compute in float32 whatever the model's dtype, and in float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def linear_logits(x_ND: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """``x Wᵀ + b`` in at least float32, also under autocast."""
    dtype = routing_dtype(x_ND)
    with without_autocast(x_ND):
        bias = None if bias_E is None else bias_E.to(dtype)
        return torch.nn.functional.linear(x_ND.to(dtype), weight_ED.to(dtype), bias)


def ranges_of(kinds: tuple[str, ...], kind: str) -> list[tuple[int, int]]:
    """The runs ``[start, stop)`` of consecutive experts of one kind.

    Comparing ids with a few bounds needs no table on the device and none in the checkpoint.
    """
    ranges, position = [], 0
    for name, run in itertools.groupby(kinds):
        length = len(list(run))
        if name == kind:
            ranges.append((position, position + length))
        position += length
    return ranges
