"""moekit's kernels in models that are not ours: an experts implementation of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor, nn
from transformers.integrations import moe as experts_of_transformers

from moekit.dispatch.choice import BackendName, Choice
from moekit.dispatch.fused import composed, feed_forward
from moekit.dispatch.plan import Plan, plan_rows
from moekit.errors import SpecError
from moekit.experts.activation import Activation, GatedSiLU
from moekit.experts.experts import FeedForward
from moekit.routing import Routing


def register_experts(name: str = "moekit", backend: BackendName = "auto") -> None:
    """Make moekit's kernels an experts implementation of transformers, under ``name``.

    One registration serves every model whose experts are fused tensors (Mixtral, Qwen-MoE, OLMoE,
    DeepSeek, GPT-OSS, Granite, ...), in inference and training, and nothing about weights or
    checkpoints changes. Outputs and gradients are those of transformers' ``eager`` to rounding.

    Args:
        name: what ``set_experts_implementation`` and ``experts_implementation=`` are then given.
        backend: what runs the experts, see :class:`moekit.Dropless`.

    Raises:
        SpecError: there is no such backend, or the name is one of transformers' own.

    Example:
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> register_experts()
        >>> model = MixtralForCausalLM(MixtralConfig(
        ...     vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        ...     num_attention_heads=2, num_key_value_heads=2,
        ... ))
        >>> model.set_experts_implementation("moekit")
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 32])
    """
    known = get_args(BackendName)
    if backend not in known:
        raise SpecError(f"backend is {backend!r}; wanted one of {', '.join(known)}")
    interface = experts_of_transformers.ALL_EXPERTS_FUNCTIONS
    taken = interface.get(name) if name in interface else None
    if name == "eager" or not (taken is None or isinstance(taken, _Experts)):
        raise SpecError(f"{name!r} is an experts implementation of transformers; choose another")
    interface.register(name, _Experts(backend))


class _Experts:
    """The function that transformers calls in place of an experts module's own forward."""

    def __init__(self, backend: BackendName) -> None:
        self.choice = Choice(backend)

    def __call__(
        self, module: nn.Module, x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor
    ) -> Tensor:
        bank, after = _bank(module), _after(module)
        rows_ND = x_ND.to(bank.up_EJD.dtype)
        routing = _routing(module, expert_NK, weight_NK)
        experts, _, width = bank.up_EJD.shape
        routing.check_fits(rows_ND, width, experts)
        if after is not None or _has_parameters(getattr(module, "act_fn", None)):
            y_NO = composed(rows_ND, self._plan(routing), bank, after)
        else:
            y_NO = self._feed_forward(rows_ND, routing, bank)
        return y_NO.to(x_ND.dtype)

    def _feed_forward(self, x_ND: Tensor, routing: Routing, bank: FeedForward) -> Tensor:
        if self.choice.decodes(x_ND, routing):
            found = self.choice.decoded(x_ND, routing, bank)
            if found is not None:
                return found[0]
        plan = self._plan(routing)
        return feed_forward(x_ND, plan, bank, self.choice.backend(x_ND, plan, bank))

    def _plan(self, routing: Routing) -> Plan:
        return plan_rows(routing, [(0, routing.experts)], self.choice.groups)


def _routing(module: nn.Module, expert_NK: Tensor, weight_NK: Tensor) -> Routing:
    """Experts that live on another rank have an id beyond the last one: no row for them."""
    experts = int(module.num_experts)  # type: ignore[arg-type]
    spread = bool(getattr(module, "_is_expert_parallel", False))
    expert_NK = expert_NK.long()
    if spread:
        expert_NK = torch.where(expert_NK < experts, expert_NK, -1)
    return Routing(expert_NK, weight_NK, experts, full=not spread)


def _bank(module: nn.Module) -> FeedForward:
    """The module's tensors, each weight as (E, out, in) whatever its layout."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    weights = [getattr(module, name) for name in (up, "down_proj")]
    if module.is_transposed:
        weights = [weight.transpose(1, 2) for weight in weights]
    names = (f"{up}_bias", "down_proj_bias")
    biases = [getattr(module, name) if module.has_bias else None for name in names]
    return FeedForward(weights[0], weights[1], biases[0], biases[1], _activation(module))


def _activation(module: nn.Module) -> Activation:
    if not module.has_gate:
        return Activation(module.act_fn)  # type: ignore[arg-type]
    own = type(module)._apply_gate  # type: ignore[attr-defined]
    plain = own is experts_of_transformers._default_apply_gate
    if plain and type(module.act_fn).__name__ in ("SiLUActivation", "SiLU"):
        return GatedSiLU()
    return Activation(module._apply_gate)  # type: ignore[arg-type]


def _after(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What the module does to its experts' outputs before they are weighted."""
    return module.post_expert_norm if module.has_post_expert_norm else None  # type: ignore[return-value]


def _has_parameters(part: object) -> bool:
    return isinstance(part, nn.Module) and next(part.parameters(), None) is not None
