"""What a view must know of an architecture; the common form of transformers is the default."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from moekit.errors import SpecError
from moekit.measure.gates import read_decision
from moekit.routing import Routing
from moekit.surgery.stored_names import PER_EXPERT, StoredNames
from moekit.surgery.weights import ExpertWeights, RouterWeights


@dataclass(frozen=True)
class RoutingRule:
    """How a block chooses experts and weighs them.

    Attributes:
        top_k: experts a token.
        normalised: whether the weights of a token are divided by their sum.
        scale: factor on the weights.
        groups: number of equal groups that experts are split into; 1 for none.
        smallest: fewest experts that the block works with.
        score: what turns logits into scores.
    """

    top_k: int
    normalised: bool
    scale: float = 1.0
    groups: int = 1
    smallest: int = 1
    score: Literal["softmax", "sigmoid"] = "softmax"


@dataclass(frozen=True)
class Architecture:
    """One architecture, by default with the fused experts that most of transformers share.

    ``gate_up_proj (E, 2H, D)`` holds the gate's rows first, ``down_proj (E, D, H)`` follows.

    Attributes:
        model_type: what its ``config.json`` calls it.
        count: config key of the number of experts.
        block: attribute of a decoder layer that holds an MoE block.
        router: attribute of the block.
        normalised: whether weights are divided by their sum, or the config key that tells.
        shared: path from a decoder layer to its shared expert; empty for none.
        shared_gate: path to the gate of the shared expert; empty for none.
        group_keys: config keys of the number of groups and of those a token may use.
        per_group: fewest experts a group, for the score that ranks groups.
        score: what turns router logits into scores.
        stored: names in a checkpoint.
    """

    model_type: str
    count: str
    block: str = "mlp"
    router: str = "gate"
    normalised: bool | str = True
    shared: str = ""
    shared_gate: str = ""
    group_keys: tuple[str, str] | None = None
    per_group: int = 1
    score: Literal["softmax", "sigmoid"] = "softmax"
    stored: StoredNames = PER_EXPERT

    def is_moe(self, layer: nn.Module) -> bool:
        """Whether a decoder layer holds an MoE block."""
        return hasattr(getattr(layer, self.block, None), "experts")

    def check(self, layer: nn.Module) -> None:
        """Refuse a block that has another form than the architecture's usual one."""

    def rule(self, config: PreTrainedConfig, block: nn.Module) -> RoutingRule:
        """How the block routes."""
        top_k: int = config.num_experts_per_tok
        groups, top_groups = self.groups(config)
        room = math.ceil(top_k / top_groups)
        normalised = self.normalised
        if isinstance(normalised, str):
            normalised = bool(getattr(config, normalised))
        return RoutingRule(
            top_k=top_k,
            normalised=normalised,
            scale=float(getattr(config, "routed_scaling_factor", 1.0)),
            groups=groups,
            smallest=max(top_k, groups * max(room, self.per_group)),
            score=self.score,
        )

    def groups(self, config: PreTrainedConfig) -> tuple[int, int]:
        """Number of groups of experts, and of those a token may use."""
        if self.group_keys is None:
            return 1, 1
        return getattr(config, self.group_keys[0]) or 1, getattr(config, self.group_keys[1]) or 1

    def experts(self, block: Any) -> ExpertWeights:
        """The bank of a block, sharing its memory."""
        gate_EHD, up_EHD = block.experts.gate_up_proj.detach().chunk(2, dim=1)
        return ExpertWeights(up=up_EHD, down=block.experts.down_proj.detach(), gate=gate_EHD)

    def pack_experts(self, bank: ExpertWeights) -> dict[str, Tensor]:
        """The tensors of a bank by their name within the block."""
        assert bank.gate is not None
        return {
            "experts.gate_up_proj": torch.cat([bank.gate, bank.up], dim=1),
            "experts.down_proj": bank.down,
        }

    def router_weights(self, block: nn.Module) -> RouterWeights:
        """The router of a block, sharing its memory."""
        router = self.router_module(block)
        tensors = [getattr(router, n, None) for n in ("weight", "bias", "e_score_correction_bias")]
        weight, bias, correction = (None if t is None else t.detach() for t in tensors)
        assert weight is not None
        return RouterWeights(weight, bias, correction)

    def pack_router(self, weights: RouterWeights) -> dict[str, Tensor]:
        """The tensors of a router by their name within the block."""
        names = {"weight": "weight", "bias": "bias", "correction": "e_score_correction_bias"}
        return {f"{self.router}.{names[name]}": value for name, value in weights.items()}

    def router_module(self, block: nn.Module) -> nn.Module:
        """The module that decides."""
        return block.get_submodule(self.router)

    def experts_module(self, block: nn.Module) -> nn.Module:
        """The module that computes the routed experts."""
        return block.get_submodule("experts")

    def shared_experts(self, layer: nn.Module) -> ExpertWeights | None:
        """The shared expert of a decoder layer, sharing its memory; None where there is none."""
        module: Any = _at(layer, self.shared)
        if module is None:
            return None
        gate, up, down = (
            getattr(module, name).weight.detach() for name in ("gate_proj", "up_proj", "down_proj")
        )
        return ExpertWeights(up=up, down=down, gate=gate)

    def shared_gate_weight(self, layer: nn.Module) -> Tensor | None:
        """The weight (1, D) of the shared expert's gate, or None."""
        module: Any = _at(layer, self.shared_gate)
        return None if module is None else module.weight.detach()

    def activate(self, block: Any, gate: Tensor | None, up: Tensor) -> Tensor:
        """What the second projection is given (N, H)."""
        assert gate is not None
        return block.experts.act_fn(gate) * up

    def read(self, name: str, output: Any) -> Routing:
        """The decision that the router module returned."""
        return read_decision(name, output)

    def resized(self, config: PreTrainedConfig, counts: Sequence[int]) -> PreTrainedConfig:
        """A copy of the config with other numbers of experts in its MoE layers, in order.

        Raises:
            SpecError: the architecture has one number for all layers, and they differ.
        """
        if len(set(counts)) > 1:
            raise SpecError(
                f"{self.model_type} has one number of experts for all layers; got {list(counts)}"
            )
        resized = copy.deepcopy(config)
        setattr(resized, self.count, counts[0])
        return resized

    def handed_on(self, output: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """What a decoder layer hands to the next: what the next takes as positional arguments."""
        return (output,)

    def skip(self, args: tuple[Any, ...]) -> Any:
        """What a decoder layer that does nothing returns."""
        return args[0]

    def compute(self, block: nn.Module, expert: ExpertWeights, x_ND: Tensor) -> Tensor:
        """What one expert makes of the rows ``x_ND``."""
        gate = None if expert.gate is None else F.linear(x_ND, expert.gate, expert.gate_bias)
        inner = self.activate(block, gate, F.linear(x_ND, expert.up, expert.up_bias))
        return F.linear(inner, expert.down, expert.down_bias)


def _at(layer: nn.Module, path: str) -> nn.Module | None:
    """The module at ``path``, or None if it is absent or the path empty."""
    found: Any = layer if path else None
    for name in path.split("."):
        found = getattr(found, name, None)
    return found
