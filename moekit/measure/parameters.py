"""How many parameters a model has, and how many a token uses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from moekit.layer import MoESpec
from moekit.models.language import MoEDecoderForCausalLM
from moekit.routing.router import ZERO_COMPUTATION


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model by what they do; the parts add up to ``total``.

    Attributes:
        total: all of them, tied ones once.
        embedding: the token table and the output projection.
        router: routers, and gates of shared experts.
        experts: the banks that tokens are routed to, zero-computation experts included.
        dense: everything else: attention, norms, dense layers, shared experts.
        active: parameters that a token uses in the mean: all but those of experts with matrix
            products, and of these the share that the balance loss aims at
            (:meth:`moekit.MoESpec.expected_load`). The token table counts in full, as is usual.
        measured: the same from rows that were counted, or None.
    """

    total: int
    embedding: int
    router: int
    experts: int
    dense: int
    active: int
    measured: int | None = None


def parameter_counts(
    model: MoEDecoderForCausalLM, rows_per_token: Sequence[float] | None = None
) -> ParameterCounts:
    """Count the parameters of a model; one on the ``meta`` device will do.

    Args:
        rows_per_token: measured product rows a token of each MoE layer in order
            (``rows_per_token`` of :meth:`moekit.measure.LayerStatistics.summary`).
    """
    layers = model.moe_layers
    total = _size([model])
    embedding = _size([model.model.embed_tokens, model.lm_head])
    gates = [layer.shared_gate for layer in layers if layer.shared_gate is not None]
    router = _size([*(layer.router for layer in layers), *gates])
    experts = _size([layer.experts for layer in layers])
    specs = model.config.mixture_specs
    costs = [_dispatched(spec, model.config.hidden_size) for spec in specs]
    always = total - sum(cost.total for cost in costs)
    measured = None
    if rows_per_token is not None:
        used = zip(rows_per_token, costs, strict=True)
        measured = always + round(sum(rows * cost.mean for rows, cost in used))
    return ParameterCounts(
        total=total,
        embedding=embedding,
        router=router,
        experts=experts,
        dense=total - embedding - router - experts,
        active=always + round(sum(cost.expected * cost.mean for cost in costs)),
        measured=measured,
    )


@dataclass(frozen=True)
class _Dispatched:
    """Parameters of a layer's experts with matrix products, and how many a token expects."""

    total: int
    mean: float
    expected: float


def _dispatched(spec: MoESpec, width: int) -> _Dispatched:
    each = zip(spec.experts.parameters_E(width), spec.experts.expert_kinds(), strict=True)
    sizes = [size for size, kind in each if kind not in ZERO_COMPUTATION]
    return _Dispatched(sum(sizes), sum(sizes) / len(sizes), spec.expected_load())


def _size(modules: Iterable[nn.Module | None]) -> int:
    """Parameters of several modules, each counted once."""
    found = {id(p): p.numel() for m in modules if m is not None for p in m.parameters()}
    return sum(found.values())
