"""Read the decisions of transformers' own routers.

Since transformers 5 a router is a module that returns ``(logits, weights, expert ids)``, of
shapes (N, E), (N, K) and (N, K), and that stands beside a module named ``experts``. It is
recognised by its class name, its place and what it returns, so a new architecture that keeps to
the form needs nothing here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig

from moekit.errors import CheckpointError
from moekit.routing.routing import Routing

_NAME = re.compile(r"(Router|Gate)$")
_ROUNDING = 0.01  # of proportions that were computed in bfloat16
_READABLE = (
    "Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek-V2 and V3, GPT-OSS, Granite-MoE, Phi-MoE, and "
    "others whose routers return (logits, weights, expert ids)"
)


@dataclass(frozen=True)
class ExpertBlock:
    """A module of transformers that holds a router beside its experts.

    Attributes:
        module: the block.
        gate: its router.
        experts: its bank.
    """

    module: nn.Module
    gate: nn.Module
    experts: nn.Module

    def number_of_experts(self) -> int:
        """Number of experts E: of fused tensors (E, ...), or of a list."""
        if isinstance(self.experts, nn.ModuleList):
            return len(self.experts)
        return next(p.shape[0] for p in self.experts.parameters() if p.dim() >= 3)

    def top_k(self, config: PreTrainedConfig) -> int:
        """Experts a token.

        Raises:
            CheckpointError: neither the router nor the config tells.
        """
        names = ("top_k", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")
        values = [getattr(place, n, None) for place in (self.gate, config) for n in names]
        found = next((value for value in values if isinstance(value, int)), None)
        if found is None:
            raise CheckpointError(
                f"{type(self.gate).__name__} does not tell how many experts a token uses"
            )
        return found


def expert_blocks(model: nn.Module) -> dict[str, ExpertBlock]:
    """The blocks of a model that have a router and experts, by name, in order."""
    found = {}
    for name, module in model.named_modules():
        experts = getattr(module, "experts", None)
        gates = [m for m in module.children() if _NAME.search(type(m).__name__)]
        if isinstance(experts, nn.Module) and gates:
            found[name] = ExpertBlock(module, gates[0], experts)
    return found


def find_gates(model: nn.Module) -> dict[str, nn.Module]:
    """The routers of a transformers model by the name of their block, in order.

    Raises:
        CheckpointError: there is none.
    """
    found = {name: block.gate for name, block in expert_blocks(model).items()}
    if not found:
        raise CheckpointError(
            f"{type(model).__name__} has no router that can be read; readable are {_READABLE}"
        )
    return found


class GateHooks:
    """Collects the routing of every router call inside the block.

    Attributes:
        routings: one a call, in the order of the calls; rows follow the flattened (B, T) tokens.

    Raises:
        CheckpointError: the model has no router, or one returns something else than a decision.
    """

    def __init__(self, model: nn.Module) -> None:
        self.routings: list[Routing] = []
        self._gates = find_gates(model)
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> GateHooks:
        for name, gate in self._gates.items():
            self._handles.append(gate.register_forward_hook(self._reader(name)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _reader(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def read(gate: nn.Module, _: tuple[Any, ...], output: Any) -> None:
            self.routings.append(read_decision(f"{name} ({type(gate).__name__})", output))

        return read


def read_decision(name: str, output: Any) -> Routing:
    """The decision that a router of transformers returned.

    Args:
        name: what an error calls the router.
        output: what it returned.

    Raises:
        CheckpointError: it is not (logits, weights, expert ids).
    """
    if not _is_decision(output):
        raise CheckpointError(
            f"the router of {name} does not return (logits, weights, expert ids); "
            f"readable are {_READABLE}"
        )
    logits, weights, ids = (part.detach().flatten(0, -2) for part in output[:3])
    experts = logits.shape[-1]
    used_NK = (ids >= 0) & (ids < experts)
    expert_NK = torch.where(used_NK, ids.long(), -1)
    weight_NK = weights.masked_fill(~used_NK, 0.0)
    return Routing(
        expert_NK=expert_NK,
        weight_NK=weight_NK,
        experts=experts,
        logits_NE=logits,
        scores_NE=_scores(logits.float(), weight_NK.float(), expert_NK),
    )


def _is_decision(output: Any) -> bool:
    if not isinstance(output, tuple) or len(output) < 3:
        return False
    if not all(isinstance(part, Tensor) and part.dim() >= 2 for part in output[:3]):
        return False
    logits, weights, ids = output[:3]
    return (
        logits.is_floating_point()
        and weights.is_floating_point()
        and not ids.is_floating_point()
        and weights.shape == ids.shape
        and logits.shape[:-1] == ids.shape[:-1]
    )


def _scores(logits_NE: Tensor, weight_NK: Tensor, expert_NK: Tensor) -> Tensor:
    """The probabilities behind the weights.

    Routers do not say whether they take a softmax or normalised sigmoids (DeepSeek-V3), or have
    handed out probabilities for logits. Softmax is assumed unless the chosen entries of another
    form are in the proportions of the weights, up to rounding, and its own are not.
    """
    sigmoid_NE = logits_NE.sigmoid()
    forms = [
        logits_NE.softmax(-1),
        sigmoid_NE / sigmoid_NE.sum(-1, keepdim=True),
        logits_NE.clamp_min(0),
    ]
    chosen_NK, target_NK = expert_NK.clamp_min(0), _proportions(weight_NK)
    fits = [
        bool(torch.allclose(_proportions(form_NE.gather(1, chosen_NK)), target_NK, atol=_ROUNDING))
        for form_NE in forms
    ]
    return forms[fits.index(True)] if any(fits) else forms[0]


def _proportions(value_NK: Tensor) -> Tensor:
    total_N1 = value_NK.sum(-1, keepdim=True)
    return value_NK / torch.where(total_N1 > 0, total_N1, 1.0)
