"""A router over LoRA experts, and a projection that they adapt."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moekit.dispatch.plan import Plan, plan_rows
from moekit.experts.groups import GroupedMM
from moekit.routing.routing import Routing
from moekit.surgery.adapt.spec import AdaptSpec


@dataclass(frozen=True)
class Mixed:
    """Where the tokens of a call go.

    Attributes:
        shape: the call's leading sizes, such as (B, T); N is their product.
        probability_NE: the router's softmax over LoRA experts.
        expert_NK: the experts that each token chose; null ones come behind the others.
        plan: their rows and combine weights; None where all experts are combined.
    """

    shape: tuple[int, ...]
    probability_NE: Tensor
    expert_NK: Tensor
    plan: Plan | None


class MixtureRouter(nn.Module):
    """Chooses LoRA experts token by token, once for all projections of a feed-forward part.

    Attributes:
        mixed: where the tokens of the last call went; None before any.
        forced: an expert that gets every token with weight 1, or None.
    """

    def __init__(self, width: int, spec: AdaptSpec, like: Tensor) -> None:
        super().__init__()
        self.spec = spec
        self.linear = nn.Linear(
            width,
            spec.experts + spec.null,
            bias=spec.router_bias,
            device=like.device,
            dtype=adapter_dtype(like),
        )
        self.mixed: Mixed | None = None
        self.forced: int | None = None

    def forward(self, x: Tensor) -> None:
        """Decide for the tokens ``x`` (..., D); projections then look at :attr:`mixed`."""
        x_ND = x.reshape(-1, x.shape[-1])
        logit_NE = self.linear(x_ND.to(self.linear.weight.dtype))
        probability_NE = logit_NE.softmax(-1)
        # By logits: probabilities of all that are far behind the best are 0 alike.
        expert_NK = logit_NE.topk(self.spec.k).indices
        if self.forced is not None:
            expert_NK = torch.full_like(expert_NK[:, :1], self.forced)
        plan = None if self._dense() else self._plan(logit_NE, probability_NE, expert_NK)
        self.mixed = Mixed(tuple(x.shape[:-1]), probability_NE, expert_NK, plan)

    @property
    def through_all(self) -> bool:
        """Whether the task's gradient reaches the probabilities of experts that are not used."""
        ste = self.spec.combine == "ste" and self.forced is None
        return ste and self.training and torch.is_grad_enabled()

    def _dense(self) -> bool:
        return self.spec.combine == "soft" and self.forced is None

    def _plan(self, logit_NE: Tensor, probability_NE: Tensor, expert_NK: Tensor) -> Plan:
        weight_NK = torch.full_like(probability_NE[:, : expert_NK.shape[1]], 1 / expert_NK.shape[1])
        null_NK = expert_NK >= self.spec.experts
        if self.forced is None:
            chosen_NK = probability_NE.gather(1, expert_NK)
            if self.spec.combine == "gate":
                weight_NK = chosen_NK
            elif self.spec.combine == "normalized":
                weight_NK = _softmax_without(null_NK, logit_NE.gather(1, expert_NK))
            elif self.spec.combine == "sparse_ste":
                weight_NK = weight_NK + (chosen_NK - chosen_NK.detach())  # adds 0 and a gradient
        full = self.spec.null == 0
        if not full:
            expert_NK, weight_NK = expert_NK.masked_fill(null_NK, -1), weight_NK * ~null_NK
        routing = Routing(expert_NK, weight_NK, self.spec.experts, full=full)
        return plan_rows(routing, [(0, self.spec.experts)], GroupedMM)


class LoRAExperts(nn.Module):
    """A frozen projection and what K LoRA experts add to it.

    Args:
        base: ``torch.nn.Linear`` or transformers' ``Conv1D``; used as it is.
        router: whose choice they follow; None for one expert.
        spec: sizes and combination.
    """

    def __init__(self, base: nn.Module, router: MixtureRouter | None, spec: AdaptSpec) -> None:
        super().__init__()
        self.base, self.spec = base, spec
        self.follow(router)
        out, inner = sizes_of(base)
        like: Tensor = base.weight  # type: ignore[assignment]
        own = torch.empty(0, device=like.device, dtype=adapter_dtype(like))
        self.lora_A = nn.Parameter(own.new_empty(spec.experts, spec.rank, inner))
        self.lora_B = nn.Parameter(own.new_zeros(spec.experts, out, spec.rank))
        for pair_rI in self.lora_A:
            nn.init.kaiming_uniform_(pair_rI, a=math.sqrt(5))
        self.dropout = nn.Dropout(spec.dropout)

    def follow(self, router: MixtureRouter | None) -> None:
        """Do what ``router`` decides, which is a module of another part and not of this one."""
        object.__setattr__(self, "router", router)

    @property
    def weight(self) -> Tensor:
        """The base's own weight; some models look at it."""
        return self.base.weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """``base(x)`` plus the experts' update, for ``x`` (..., I)."""
        y: Tensor = self.base(x)
        x_NI = self.dropout(x.reshape(-1, x.shape[-1]).to(self.lora_A.dtype))
        update_NO = self.spec.scale * self._update(x_NI)
        return y + update_NO.to(y.dtype).view(y.shape)

    def _update(self, x_NI: Tensor) -> Tensor:
        router: MixtureRouter | None = self.router  # type: ignore[assignment]
        if router is None:
            return x_NI @ self.lora_A[0].T @ self.lora_B[0].T
        mixed = router.mixed
        assert mixed is not None  # the part's hook has run the router
        if mixed.plan is None:
            return _combined(x_NI, mixed.probability_NE, self.lora_A, self.lora_B)
        plan = mixed.plan
        inner_Rr = plan.groups.linear(plan.gather(x_NI), self.lora_A)
        update_NO = plan.combine(plan.groups.linear(inner_Rr, self.lora_B))
        if router.through_all:
            change_NE = mixed.probability_NE - mixed.probability_NE.detach()  # 0, with a gradient
            pairs = (x_NI.detach(), change_NE, self.lora_A.detach(), self.lora_B.detach())
            update_NO = update_NO + _combined(*pairs)
        return update_NO

    def matrix(self, expert: int) -> Tensor:
        """The update of one expert as a matrix (O, I)."""
        return self.spec.scale * (self.lora_B[expert] @ self.lora_A[expert])


def _softmax_without(null_NK: Tensor, logit_NK: Tensor) -> Tensor:
    """Softmax over the slots of a token that hold no null expert; all zero where none does.

    Of the chosen logits and not of probabilities, which are zero beside a null expert that is far
    ahead.
    """
    lowest = torch.finfo(logit_NK.dtype).min
    return logit_NK.masked_fill(null_NK, lowest).softmax(-1).masked_fill(null_NK, 0.0)


def _combined(x_NI: Tensor, weight_NE: Tensor, a_ErI: Tensor, b_EOr: Tensor) -> Tensor:
    """``Σ_e w_e B_e A_e x`` of all experts, (N, O); weights are applied where rows are short."""
    inner_NEr = (x_NI @ a_ErI.flatten(0, 1).T).unflatten(1, a_ErI.shape[:2])
    return (weight_NE[..., None] * inner_NEr).flatten(1) @ b_EOr.transpose(1, 2).flatten(0, 1)


def sizes_of(linear: nn.Module) -> tuple[int, int]:
    """Out and in features of a projection; ``Conv1D`` keeps its weight transposed."""
    rows, columns = linear.weight.shape  # type: ignore[misc]
    return (rows, columns) if isinstance(linear, nn.Linear) else (columns, rows)


def adapter_dtype(like: Tensor) -> torch.dtype:
    """That of the weight, but never less than float32, as peft does it."""
    return torch.promote_types(like.dtype, torch.float32)
