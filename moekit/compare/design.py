"""A design: a name and the parts of a decoder, dense or MoE, layer by layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from moekit.compare.cost import expected_flops, expected_parameters
from moekit.compare.model import ModelSpec
from moekit.errors import SpecError
from moekit.experts import Bank, ExpertsSpec, FeedForwardSpec, attention_heads
from moekit.layer import MoESpec
from moekit.models.language.config import (
    BlockSpec,
    LayerSpec,
    MoEDecoderConfig,
    check_causal_model,
)
from moekit.residual import check_stack
from moekit.spec import Spec

Cost = Callable[["Design"], float]
E = TypeVar("E", bound=ExpertsSpec)
S = TypeVar("S")

LONGEST_NAME = 100
UNIT = 8  # hidden widths are multiples of this, which keeps row strides at 16 bytes in bfloat16


@dataclass(frozen=True)
class Design(Spec):
    """A named design.

    Attributes:
        name: what tables and plots call it.
        layers: the feed-forward part of every layer, or one for all of them.
        attention: the mixture of attention modules of every layer, or one for all of them; None
            is the model's own attention.
    """

    name: str
    layers: tuple[MoESpec | FeedForwardSpec, ...]
    attention: tuple[MoESpec | None, ...] = (None,)

    def check(self) -> None:
        self.require(self.name.strip() != "", "name is empty; give the design a name")
        self.require(
            self.name.isprintable() and len(self.name) <= LONGEST_NAME,
            f"name {self.name[:LONGEST_NAME]!r} is no label; wanted one line of at most "
            f"{LONGEST_NAME} characters",
        )
        self.require(len(self.layers) > 0, "it has no layers; give at least one")
        self.require(len(self.attention) > 0, "attention is empty; leave it out for the usual one")
        for spec in self.attention:
            self.require(
                spec is None or attention_heads(spec.experts) is not None,
                "attention holds a bank without attention modules; wanted AttentionHeads",
            )
        check_causal_model(self.mixtures)
        check_stack(tuple(spec.residual for spec in self.mixtures))

    @property
    def mixtures(self) -> tuple[MoESpec, ...]:
        """The mixtures it is made of."""
        parts = (*self.attention, *self.layers)
        return tuple(part for part in parts if isinstance(part, MoESpec))

    @property
    def causal(self) -> bool:
        """Whether no router looks at later tokens."""
        return all(spec.router.causal for spec in self.mixtures)

    def at_depth(self, depth: int) -> tuple[LayerSpec, ...]:
        """The feed-forward part of each block."""
        return self._repeated(self.layers, depth)

    def blocks(self, depth: int) -> tuple[BlockSpec, ...]:
        """Both parts of each block."""
        attention = self._repeated(self.attention, depth)
        return tuple(map(BlockSpec, attention, self.at_depth(depth)))

    def _repeated(self, specs: tuple[S, ...], depth: int) -> tuple[S, ...]:
        if len(specs) == 1:
            return specs * depth
        self.require(
            len(specs) == depth,
            f"{self.name} has {len(specs)} layer specs; the model has {depth} layers",
        )
        return specs

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
            layers=[block.feed_forward for block in self.blocks(model.depth)],
            attention=[block.attention for block in self.blocks(model.depth)],
        )


Match = Literal["active", "flops", "steps"]


def matched(
    designs: Sequence[Design], model: ModelSpec, match: Match, length: int = 256
) -> list[Design]:
    """The designs with expert widths changed so that each costs what the first one costs.

    ``active`` equals the expected active parameters a token, ``flops`` the expected forward
    floating-point operations a token; ``steps`` leaves the designs as they are, so that they share
    nothing but the number of steps. Expected loads are those at which the balance loss settles.
    The widths of feed-forward experts change, and those of attention modules stay.

    Args:
        length: tokens in a sequence, which the operations of attention depend on.

    Raises:
        SpecError: a design cannot be brought to the cost of the first by changing its widths.
    """
    if match == "steps" or not designs:
        return list(designs)

    def cost(design: Design) -> float:
        blocks = design.blocks(model.depth)
        if match == "active":
            return sum(expected_parameters(blocks, model))
        return sum(expected_flops(blocks, model, length))

    target = cost(designs[0])
    return [designs[0], *(_resized_to(design, cost, target, match) for design in designs[1:])]


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


def _resized_to(design: Design, cost: Cost, target: float, match: Match) -> Design:
    """Bisect the factor on all hidden widths; costs rise with it."""

    def at(factor: float) -> Design:
        return design.replace(layers=tuple(_scaled(spec, factor) for spec in design.layers))

    def cost_at(factor: float) -> float:
        return cost(at(factor))

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
    return min((at(low), at(high)), key=lambda d: abs(cost(d) - target))


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
