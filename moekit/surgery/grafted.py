"""A mixture of transformers with null experts grafted on its routers (AdaMoE).

No config of transformers has experts that compute nothing, so the model is one of ours with the
original inside: each router has rows for the null experts, and rows of tokens that chose one never
reach the experts module, whichever implementation of experts it runs.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from moekit.errors import SignalError, SpecError
from moekit.routing import NullAwareBalance, Site
from moekit.routing.losses import Batch
from moekit.surgery.added_loss import with_loss_added
from moekit.surgery.view import block_views
from moekit.surgery.view_architectures import architecture_of
from moekit.surgery.wrapped import WrappedConfig, WrappedForCausalLM

GRAFTABLE = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
Normalize = Literal["true", "all"]


class GraftedMoEConfig(WrappedConfig):  # type: ignore[no-untyped-call]
    """Configuration of :class:`GraftedMoEForCausalLM`.

    Attributes:
        null_experts: null experts m of each router.
        k: picks a token, null experts among them.
        normalize: a token's weights are divided by the sum over its ``true`` picks, or over
            ``all`` of them, null ones too.
        balance_weight: weight of the null-aware balance loss in training.
    """

    model_type = "moekit_grafted"

    null_experts: int = 0
    k: int = 1
    normalize: str = "true"
    balance_weight: float = 0.02


class NullRouter(nn.Module):
    """A softmax router over E experts and m that compute nothing.

    Attributes:
        weight: rows of the true experts, as before.
        null_weight: rows of the null experts.
        seen: logits (N, E + m) and picks (N, K) of the last call.
    """

    def __init__(self, weight_ED: Tensor, config: GraftedMoEConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(weight_ED)
        self.null_weight = nn.Parameter(
            weight_ED.new_zeros(config.null_experts, weight_ED.shape[1])
        )
        self.seen: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (N, E + m), weights (N, K) and ids (N, K); null picks have id E or more and
        weight 0."""
        x_ND = x.reshape(-1, x.shape[-1])
        logits_NE = F.linear(x_ND, torch.cat([self.weight, self.null_weight]))
        wide_NE = logits_NE.float()
        # By logits: probabilities of all that are far behind the best are 0 alike.
        logit_NK, expert_NK = wide_NE.topk(self.config.k)
        true_NK = expert_NK < len(self.weight)
        picked_NK = wide_NE.softmax(-1).gather(-1, expert_NK)
        own_NK = picked_NK * true_NK
        whole_NK = own_NK if self.config.normalize == "true" else picked_NK
        total_N1 = whole_NK.sum(-1, keepdim=True)
        lost_N1 = total_N1 < torch.finfo(total_N1.dtype).tiny
        weight_NK = torch.where(
            lost_N1, _softmax_of(true_NK, logit_NK), own_NK / total_N1.masked_fill(lost_N1, 1.0)
        )
        self.seen = logits_NE, expert_NK
        return logits_NE, weight_NK.to(logits_NE.dtype), expert_NK


def _softmax_of(true_NK: Tensor, logit_NK: Tensor) -> Tensor:
    """Softmax over a token's true picks; all zero where it has none."""
    lowest = torch.finfo(logit_NK.dtype).min
    return logit_NK.masked_fill(~true_NK, lowest).softmax(-1) * true_NK


class TrueRows:
    """Hooks around an experts module that keep null picks from it.

    Each true assignment goes in as a token of its own with one expert; outputs are added up again.

    Attributes:
        rows: assignments that went in at the last call.
    """

    def __init__(self, experts: nn.Module, count: int) -> None:
        self.count, self.rows = count, 0
        self._token_R: Tensor | None = None
        self._like: Tensor | None = None
        experts.register_forward_pre_hook(self._before)
        experts.register_forward_hook(self._after)

    def _before(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x_ND, expert_NK, weight_NK = args
        token_R, slot_R = (expert_NK < self.count).nonzero(as_tuple=True)
        self.rows = len(token_R)
        if not self.rows and len(x_ND):  # modules differ in what they do with no row at all
            token_R = slot_R = token_R.new_zeros(1)
        self._token_R, self._like = token_R, x_ND
        expert_R = expert_NK[token_R, slot_R].clamp_max(self.count - 1)
        return x_ND[token_R], expert_R[:, None], weight_NK[token_R, slot_R][:, None]

    def _after(self, _: nn.Module, args: tuple[Tensor, ...], y_RD: Tensor) -> Tensor:
        token_R, like, self._token_R, self._like = self._token_R, self._like, None, None
        assert token_R is not None
        assert like is not None
        dtype = torch.promote_types(y_RD.dtype, torch.float32)
        total_ND = torch.zeros(len(like), y_RD.shape[1], dtype=dtype, device=y_RD.device)
        return total_ND.index_add(0, token_R, y_RD.to(dtype)).to(y_RD.dtype)


class GraftedMoEForCausalLM(WrappedForCausalLM):  # type: ignore[no-untyped-call]
    """The causal language model; in training its loss has the null-aware balance loss added.

    Attributes:
        inner: the model of transformers with its routers grown.
    """

    config: GraftedMoEConfig
    config_class = GraftedMoEConfig
    balance_in_words = "a grafted model has a balance loss of its own, in its loss"

    def change(self) -> None:
        """Grow the routers, and keep null picks from the experts."""
        config = self.config
        if config.text_config.model_type not in GRAFTABLE:
            raise SpecError(
                f"null experts cannot be grafted on {config.text_config.model_type!r}, whose "
                f"router is no plain softmax; supported: {', '.join(GRAFTABLE)}, and moekit's own "
                "decoder"
            )
        architecture = architecture_of(config.text_config)
        self.routers: list[NullRouter] = []
        self.true_rows: list[TrueRows] = []
        for view in block_views(self.inner):
            router = NullRouter(view.router.weight, config)
            view.block.add_module(architecture.router, router)
            self.routers.append(router)
            experts = architecture.experts_module(view.block)
            self.true_rows.append(TrueRows(experts, view.experts))
        kinds = ("feed_forward",) * len(self.routers[0].weight) + ("zero",) * config.null_experts
        width = self.routers[0].weight.shape[1]
        self._balance = NullAwareBalance().build(Site(width=width, kinds=kinds))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original model."""
        output = super().forward(*args, **kwargs)
        weight = self.config.balance_weight
        if not (self.training and weight):
            return output
        return with_loss_added(
            output, super().forward, args, kwargs, lambda mask: weight * self.balance_loss(mask)
        )

    def balance_loss(self, attention_mask: Tensor | None = None) -> Tensor:
        """AdaMoE's null-aware balance loss of the last call, summed over layers, unweighted.

        Args:
            attention_mask: (B, T), 0 for padding, which is left out.

        Raises:
            SignalError: nothing has been called yet, or the mask is of another shape.
        """
        return torch.stack([self._balance(b) for b in self._batches(attention_mask)]).sum()

    def true_experts_per_token(self, attention_mask: Tensor | None = None) -> list[float]:
        """Mean number of experts with work that a token of the last call used, by block."""
        batches = zip(self._batches(attention_mask), self.routers, strict=True)
        return [
            float(batch.load_E[: len(router.weight)].sum() / batch.tokens)
            for batch, router in batches
        ]

    def _batches(self, mask_BT: Tensor | None) -> list[Batch]:
        return [_batch(router, mask_BT) for router in self.routers]


def _batch(router: NullRouter, mask_BT: Tensor | None) -> Batch:
    if router.seen is None:
        raise SignalError("the model has routed nothing yet; call it first")
    logits_NE, picked_NK = router.seen
    tokens, experts = logits_NE.shape
    valid_N = torch.ones(tokens, dtype=torch.bool, device=logits_NE.device)
    if mask_BT is not None:
        if mask_BT.ndim != 2 or mask_BT.numel() != tokens:
            raise SignalError(
                f"attention_mask has shape {tuple(mask_BT.shape)} for {tokens} tokens; wanted one "
                "entry a token, (B, T)"
            )
        valid_N = mask_BT.flatten().bool().to(logits_NE.device)
    load_E = torch.bincount(picked_NK[valid_N].flatten(), minlength=experts)
    return Batch(
        load_E=load_E,
        tokens=valid_N.sum(),
        logits_NE=logits_NE.float(),
        scores_NE=logits_NE.float().softmax(-1),
        valid_N1=valid_N[:, None],
        ranks=1,
    )


AutoConfig.register(GraftedMoEConfig.model_type, GraftedMoEConfig, exist_ok=True)
AutoModelForCausalLM.register(GraftedMoEConfig, GraftedMoEForCausalLM, exist_ok=True)
