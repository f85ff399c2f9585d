"""What a token costs in a block of a design, at the loads where its balance loss settles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch

from moekit.compare.model import ModelSpec
from moekit.dispatch import Capacity
from moekit.experts import Bank, ExpertsSpec, FeedForwardSpec, attention_heads
from moekit.layer import MoESpec
from moekit.models.language.config import BlockSpec, LayerSpec
from moekit.routing import Site
from moekit.routing.router import ZERO_COMPUTATION

E = TypeVar("E", bound=ExpertsSpec)


def expected_parameters(blocks: Sequence[BlockSpec], model: ModelSpec) -> Iterator[float]:
    """Expected parameters of each block that one token uses.

    They differ from those of :func:`moekit.measure.parameter_counts` by what all designs share.
    """
    previous: int | None = None
    for block in blocks:
        projections = _shared_projections(block, model)
        biases = 0 if block.attention is None else 2 * _inner(block.attention, model)
        yield (
            projections
            + biases
            + sum(_parameters(spec, model.width, below) for spec, below in _parts(block, previous))
        )
        previous = block.handed_on(previous)


def expected_flops(blocks: Sequence[BlockSpec], model: ModelSpec, length: int) -> Iterator[float]:
    """Expected floating-point operations of each block for one token, forward.

    Attention counts the whole square of positions, as :func:`moekit.measure.count_flops` does.
    """
    previous: int | None = None
    for block in blocks:
        attending = 4 * length * _attended(block, model)
        yield (
            attending
            + 2 * _shared_projections(block, model)
            + sum(_flops(spec, model.width, below) for spec, below in _parts(block, previous))
        )
        previous = block.handed_on(previous)


def _parts(block: BlockSpec, previous: int | None) -> Iterator[tuple[LayerSpec, int | None]]:
    """The parts whose cost depends on routing or width, with what each is handed."""
    if block.attention is not None:
        yield block.attention, previous
    yield block.feed_forward, block.after_attention(previous)


def _shared_projections(block: BlockSpec, model: ModelSpec) -> int:
    """Matrix entries of attention that every token meets."""
    if block.attention is not None:  # keys and values
        return 2 * model.width * _inner(block.attention, model)
    return 2 * model.width * (model.width + model.width // model.heads * model.kv_heads)


def _attended(block: BlockSpec, model: ModelSpec) -> float:
    """Width of all queries of a token; of free routing the mean, which it may exceed."""
    if block.attention is None:
        return model.width
    return block.attention.expected_load() * _inner(block.attention, model)


def _inner(spec: MoESpec, model: ModelSpec) -> int:
    modules = attention_heads(spec.experts)
    assert modules is not None  # a design has no other mixtures as attention
    return modules.inner_width(model.width)


def _parameters(spec: LayerSpec, width: int, previous: int | None) -> float:
    """Expected parameters of a part that one token uses."""
    if isinstance(spec, FeedForwardSpec):
        return spec.parameters_E(width)[0]
    shared = 0 if spec.shared is None else spec.shared.parameters_E(width)[0]
    always = shared + _unconditional(spec, width, previous)
    return always + spec.expected_load() * _mean_expert(spec.experts, width)


def _flops(spec: LayerSpec, width: int, previous: int | None) -> float:
    """Expected operations of a part: two for each matrix entry that the token meets."""
    if isinstance(spec, FeedForwardSpec):
        return 2 * _without_bias(spec).parameters_E(width)[0]
    shared = 0 if spec.shared is None else _without_bias(spec.shared).parameters_E(width)[0]
    always = shared + _unconditional(spec, width, previous)
    return 2 * (always + _rows(spec) * _mean_expert(_without_bias(spec.experts), width))


def _unconditional(spec: MoESpec, width: int, previous: int | None) -> int:
    """Parameters of an MoE layer that every token meets.

    They are those of the router, the adapter, the gate and the zero-computation experts.
    """
    kinds = spec.experts.expert_kinds()
    with torch.device("meta"):
        router = spec.router.build(Site(width, kinds, previous, vocabulary=1))
        adapter = None if spec.adapter is None else spec.adapter.build(width)
    sizes = zip(spec.experts.parameters_E(width), kinds, strict=True)
    cheap = sum(size for size, kind in sizes if kind in ZERO_COMPUTATION)
    gate = width if spec.shared_gate else 0
    always = [p for m in (router, adapter) if m is not None for p in m.parameters()]
    return sum(p.numel() for p in always) + cheap + gate


def _without_bias(experts: E) -> E:
    if isinstance(experts, Bank):
        return experts.replace(parts=tuple(_without_bias(part) for part in experts.parts))
    return experts.replace(bias=False) if isinstance(experts, FeedForwardSpec) else experts


def _rows(spec: MoESpec) -> float:
    """Expected rows a token that reach a product, the places of padded dispatch included."""
    if isinstance(spec.dispatch, Capacity) and spec.dispatch.pad:
        shares = [
            1.0 if kind in ZERO_COMPUTATION else spec.dispatch.tau
            for kind in spec.experts.expert_kinds()
        ]
        working = sum(
            share
            for share, kind in zip(shares, spec.experts.expert_kinds(), strict=True)
            if kind not in ZERO_COMPUTATION
        )
        slots = getattr(spec.router, "k", 1)
        return spec.dispatch.factor * slots * working / sum(shares)
    return spec.expected_load()


def _mean_expert(experts: ExpertsSpec, width: int) -> float:
    """Parameters of a dispatched expert, in the mean."""
    sizes = zip(experts.parameters_E(width), experts.expert_kinds(), strict=True)
    working = [size for size, kind in sizes if kind not in ZERO_COMPUTATION]
    return sum(working) / len(working)
