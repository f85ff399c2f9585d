"""A design: a name and the feed-forward part of a decoder, dense or MoE, layer by layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch

from moekit.dispatch import Capacity
from moekit.errors import SpecError
from moekit.experts import Bank, ExpertsSpec, FeedForwardSpec
from moekit.layer import MoESpec
from moekit.models.language import MoEDecoderConfig
from moekit.models.language.config import check_causal_model
from moekit.residual import check_stack
from moekit.routing import Site
from moekit.routing.router import ZERO_COMPUTATION
from moekit.spec import Spec

LayerSpec = MoESpec | FeedForwardSpec
Cost = Callable[[LayerSpec, int, int | None], float]
E = TypeVar("E", bound=ExpertsSpec)

LONGEST_NAME = 100
UNIT = 8  # hidden widths are multiples of this, which keeps row strides at 16 bytes in bfloat16


@dataclass(frozen=True)
class ModelSpec(Spec):
    """The decoder around the feed-forward parts: everything that all designs have in common.

    Attributes:
        width: model width D.
        depth: number of layers.
        heads, kv_heads: attention heads, and heads of keys and values.
        tie_embeddings: whether the output projection is the embedding.
    """

    width: int = 128
    depth: int = 4
    heads: int = 4
    kv_heads: int = 2
    tie_embeddings: bool = True

    def check(self) -> None:
        for name in ("width", "depth", "heads", "kv_heads"):
            value = getattr(self, name)
            self.require(value >= 1, f"{name} is {value}; wanted at least 1")
        self.require(
            self.width % self.heads == 0, f"width {self.width} is no multiple of {self.heads} heads"
        )
        self.require(
            self.heads % self.kv_heads == 0,
            f"{self.heads} heads cannot share {self.kv_heads} key-value heads evenly",
        )


@dataclass(frozen=True)
class Design(Spec):
    """A named design.

    Attributes:
        name: what tables and plots call it.
        layers: the feed-forward part of every layer, or one for all of them.
    """

    name: str
    layers: tuple[MoESpec | FeedForwardSpec, ...]

    def check(self) -> None:
        self.require(self.name.strip() != "", "name is empty; give the design a name")
        self.require(
            self.name.isprintable() and len(self.name) <= LONGEST_NAME,
            f"name {self.name[:LONGEST_NAME]!r} is no label; wanted one line of at most "
            f"{LONGEST_NAME} characters",
        )
        self.require(len(self.layers) > 0, "it has no layers; give at least one")
        check_causal_model(self.layers)
        check_stack(tuple(s.residual for s in self.layers if isinstance(s, MoESpec)))

    @property
    def causal(self) -> bool:
        """Whether no router looks at later tokens."""
        return all(s.router.causal for s in self.layers if isinstance(s, MoESpec))

    def at_depth(self, depth: int) -> tuple[LayerSpec, ...]:
        """One spec a layer."""
        if len(self.layers) == 1:
            return self.layers * depth
        self.require(
            len(self.layers) == depth,
            f"{self.name} has {len(self.layers)} layer specs; the model has {depth} layers",
        )
        return self.layers

    def config(self, model: ModelSpec, vocabulary: int, length: int) -> MoEDecoderConfig:
        """The configuration of the language model with this design."""
        return MoEDecoderConfig(
            vocab_size=vocabulary,
            hidden_size=model.width,
            num_hidden_layers=model.depth,
            num_attention_heads=model.heads,
            num_key_value_heads=model.kv_heads,
            max_position_embeddings=length,
            tie_word_embeddings=model.tie_embeddings,
            layers=[spec.to_dict() for spec in self.at_depth(model.depth)],
        )


Match = Literal["active", "flops", "steps"]


def matched(designs: Sequence[Design], model: ModelSpec, match: Match) -> list[Design]:
    """The designs with expert widths changed so that each costs what the first one costs.

    ``active`` equals the expected active parameters a token, ``flops`` the expected forward
    floating-point operations a token; ``steps`` leaves the designs as they are, so that they share
    nothing but the number of steps. Expected loads are those at which the balance loss settles.

    Raises:
        SpecError: a design cannot be brought to the cost of the first by changing its widths.
    """
    if match == "steps" or not designs:
        return list(designs)
    cost = _active_parameters if match == "active" else _forward_flops
    target = _total(designs[0], model, cost)
    return [designs[0], *(_resized_to(d, model, cost, target, match) for d in designs[1:])]


def load_design(path: Path) -> Design:
    """The design in a JSON file: a Design, or one layer spec, which is named after the file.

    Raises:
        SpecError: the file is not JSON or describes no design.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"the design {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{path} is not a design in JSON: {error}") from None
    if not isinstance(data, dict) or data.get("kind") not in ("Design", None):
        data = {"layers": [data]}
    try:
        return Design.from_dict({"kind": "Design", "name": path.stem, **data})
    except RecursionError:
        raise SpecError(f"{path} holds specs in specs too deep to be built; nest fewer") from None


def _resized_to(
    design: Design, model: ModelSpec, cost: Cost, target: float, match: Match
) -> Design:
    """Bisect the factor on all hidden widths; costs rise with it."""

    def at(factor: float) -> Design:
        return design.replace(layers=tuple(_scaled(spec, factor) for spec in design.layers))

    def cost_at(factor: float) -> float:
        return _total(at(factor), model, cost)

    low, high = 0.0, 1.0
    while cost_at(high) < target and high < 2**16:
        high *= 2
    if cost_at(low) > target:
        raise SpecError(
            f"{design.name} costs more than the first design at any expert width; "
            f"use fewer experts a token, a larger first design, or match steps instead of {match}"
        )
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost_at(middle) <= target else (low, middle)
    return min((at(low), at(high)), key=lambda d: abs(_total(d, model, cost) - target))


def _total(design: Design, model: ModelSpec, cost: Cost) -> float:
    total, previous = 0.0, None
    for spec in design.at_depth(model.depth):
        total += cost(spec, model.width, previous)
        previous = spec.handed_on(previous) if isinstance(spec, MoESpec) else previous
    return total


def _scaled(spec: LayerSpec, factor: float) -> LayerSpec:
    if isinstance(spec, FeedForwardSpec):
        return _wider(spec, factor)
    shared = None if spec.shared is None else _wider(spec.shared, factor)
    return spec.replace(experts=_wider(spec.experts, factor), shared=shared)


def _wider(experts: E, factor: float) -> E:
    if isinstance(experts, Bank):
        return experts.replace(parts=tuple(_wider(part, factor) for part in experts.parts))
    if isinstance(experts, FeedForwardSpec):
        return experts.replace(hidden=max(UNIT, round(experts.hidden * factor / UNIT) * UNIT))
    return experts


def _active_parameters(spec: LayerSpec, width: int, previous: int | None) -> float:
    """Expected parameters of a feed-forward part that one token uses.

    They differ from those of :func:`moekit.measure.parameter_counts` by what all designs share.
    """
    if isinstance(spec, FeedForwardSpec):
        return spec.parameters_E(width)[0]
    shared = 0 if spec.shared is None else spec.shared.parameters_E(width)[0]
    always = shared + _unconditional(spec, width, previous)
    return always + spec.expected_load() * _mean_expert(spec.experts, width)


def _forward_flops(spec: LayerSpec, width: int, previous: int | None) -> float:
    """Expected floating-point operations of a feed-forward part for one token, forward.

    Two for each matrix entry that the token meets.
    """
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
