"""Token-choice top-k routing in the forms the field uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from moekit.routing.float32 import KeepsFloat32
from moekit.routing.router import Router, RouterSpec, Site, linear_logits, ranges_of
from moekit.routing.routing import Load, Routing, Signals


@dataclass(frozen=True)
class TopK(RouterSpec):
    """Each token takes its k best experts (Shazeer et al. 2017; Switch, Mixtral, DeepSeek).

    Attributes:
        k: experts a token.
        score: ``softmax`` over all experts, or ``sigmoid`` of each (DeepSeek-V3).
        normalize: the combine weights are the scores of the selected experts, as they are
            (``none``: Switch, OLMoE), divided by their sum (``selected``: Mixtral; with softmax
            this equals a softmax over the selected logits), or with zero experts left out and
            divided by the sum of the rest (``nonzero``: AdaMoE eq. 5, released MoE++). A token
            with nothing but zero experts gets weights of 0.
        scale: factor on the combine weights (DeepSeek's routed scaling factor).
        jitter: in training, the router's input is multiplied by U(1 - jitter, 1 + jitter)
            (Switch Transformer).
        noise: in training, adds ``ε softplus(x W_noise)`` to the logits, ε ~ N(0, 1)
            (Shazeer et al. 2017, eq. 4).
        groups, top_groups, group_score: experts are split into ``groups`` equal groups, and only
            the best ``top_groups`` of a token compete; a group's score is its ``max``
            (DeepSeek-V2) or the sum of its ``top2`` (DeepSeek-V3).
        bias_rate: step of the auxiliary-loss-free balancing bias, 0 for none (DeepSeek-V3
            sec. 2.1.2). The bias moves the selection, never the weights.
        bias: whether the linear map has a bias.
        init_std: standard deviation of the initial weights; None for the model's own.
    """

    k: int = 2
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: Literal["none", "selected", "nonzero"] = "selected"
    scale: float = 1.0
    jitter: float = 0.0
    noise: bool = False
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "top2"
    bias_rate: float = 0.0
    bias: bool = False
    init_std: float | None = None

    def check(self) -> None:
        self.require(self.k >= 1, f"k is {self.k}; a token needs at least one expert")
        self.require(
            self.init_std is None or self.init_std > 0,
            f"init_std is {self.init_std}; wanted a positive number, or None for the model's own",
        )
        self.require(0 <= self.jitter < 1, f"jitter is {self.jitter}; wanted 0 <= jitter < 1")
        self.require(self.scale > 0, f"scale is {self.scale}; wanted a positive number")
        self.require(self.bias_rate >= 0, f"bias_rate is {self.bias_rate}; wanted 0 or more")
        self.require(
            1 <= self.top_groups <= self.groups,
            f"top_groups is {self.top_groups} of {self.groups} groups; wanted 1 to groups",
        )

    def check_experts(self, kinds: tuple[str, ...]) -> None:
        experts = len(kinds)
        self.require(self.k <= experts, f"k is {self.k} but the bank has {experts} experts")
        self.require(
            experts % self.groups == 0,
            f"{experts} experts cannot be split into {self.groups} equal groups",
        )
        room = experts // self.groups * self.top_groups
        self.require(self.k <= room, f"k is {self.k} but {self.top_groups} groups hold {room}")
        self.require(
            self.group_score == "max" or self.groups == 1 or experts // self.groups >= 2,
            "group_score top2 needs at least two experts a group",
        )

    def build(self, site: Site) -> TopKRouter:
        return TopKRouter(self, site)

    def expected_load(self, share_E: tuple[float, ...], counted_E: tuple[bool, ...]) -> float:
        return self.k * sum(s for s, counted in zip(share_E, counted_E, strict=True) if counted)


class TopKRouter(KeepsFloat32, Router):
    """The module of :class:`TopK`."""

    float32_buffers = ("correction_bias_E",)  # steps of 1e-3 vanish in bfloat16
    correction_bias_E: Tensor

    def __init__(self, spec: TopK, site: Site) -> None:
        spec.check_experts(site.kinds)
        super().__init__(site)
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(site.experts, site.width))
        self.bias = nn.Parameter(torch.empty(site.experts)) if spec.bias else None
        self.noise_weight = (
            nn.Parameter(torch.empty(site.experts, site.width)) if spec.noise else None
        )
        if spec.bias_rate > 0:
            bias_E = torch.zeros(site.experts, dtype=torch.float32)
            self.register_buffer("correction_bias_E", bias_E)
        self._zero_ranges = ranges_of(site.kinds, "zero")
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        nn.init.normal_(self.weight, std=self.spec.init_std or std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.noise_weight is not None:
            nn.init.zeros_(self.noise_weight)
        if self.spec.bias_rate > 0:
            nn.init.zeros_(self.correction_bias_E)

    def route(self, x_ND: Tensor, signals: Signals) -> Routing:
        return self.decide(*self.evaluate(x_ND, signals))

    def evaluate(self, x_ND: Tensor, signals: Signals) -> tuple[Tensor, Tensor]:
        """Raw logits (N, E), and the logits that are scored, with noise and scaling."""
        x_ND = self._jittered(x_ND)
        logits_NE = self.logits(x_ND, signals)
        return logits_NE, self.scaled(self._noisy(x_ND, logits_NE))

    def decide(self, logits_NE: Tensor, scored_NE: Tensor) -> Routing:
        """The routing that follows from what ``evaluate`` returned."""
        scores_NE = self.score(scored_NE)
        expert_NK = self.select(scores_NE)
        return Routing(
            expert_NK=expert_NK,
            weight_NK=self.combine_weights(scored_NE, scores_NE, expert_NK),
            experts=self.site.experts,
            logits_NE=logits_NE,
            scores_NE=self.probabilities(scores_NE),
            full=True,
        )

    def logits(self, x_ND: Tensor, signals: Signals) -> Tensor:
        """Raw logits (N, E), which the next layer may also look at."""
        return linear_logits(x_ND, self.weight, self.bias)

    def scaled(self, logits_NE: Tensor) -> Tensor:
        """The logits as they are scored."""
        return logits_NE

    def score(self, logits_NE: Tensor) -> Tensor:
        """Scores (N, E) that are ranked, combined and balanced."""
        return logits_NE.sigmoid() if self.spec.score == "sigmoid" else logits_NE.softmax(-1)

    def probabilities(self, scores_NE: Tensor) -> Tensor:
        """Scores as balance losses average them: sigmoid scores divided by their sum."""
        if self.spec.score == "softmax":
            return scores_NE
        return scores_NE / scores_NE.sum(-1, keepdim=True)

    def select(self, scores_NE: Tensor) -> Tensor:
        """Ids (N, K) of the chosen experts, best first."""
        return self.best(scores_NE, self.spec.k)

    def best(self, scores_NE: Tensor, k: int) -> Tensor:
        """Ids (N, k) of the best experts after the balancing bias and the group limit."""
        ranking_NE = scores_NE.detach()
        if self.spec.bias_rate > 0:
            ranking_NE = ranking_NE + self.correction_bias_E
        if self.spec.groups > 1:
            ranking_NE = self._within_top_groups(ranking_NE)
        return ranking_NE.topk(k, dim=-1).indices

    def combine_weights(self, logits_NE: Tensor, scores_NE: Tensor, expert_NK: Tensor) -> Tensor:
        """Weights (N, K) of the chosen experts, from the logits that were scored and the scores."""
        if self.spec.normalize == "none":
            weight_NK = scores_NE.gather(1, expert_NK)
        elif self.spec.score == "softmax":
            logit_NK = logits_NE.gather(1, expert_NK)
            weight_NK = _softmax_of_rest(logit_NK, self._left_out(expert_NK))
        else:
            score_NK = scores_NE.gather(1, expert_NK)
            weight_NK = _share_of_rest(score_NK, self._left_out(expert_NK))
        return weight_NK * self.spec.scale if self.spec.scale != 1.0 else weight_NK

    def _left_out(self, expert_NK: Tensor) -> Tensor | None:
        """True where normalisation leaves a slot out; None where it leaves out none."""
        if self.spec.normalize != "nonzero" or not self._zero_ranges:
            return None
        out_NK = torch.zeros_like(expert_NK, dtype=torch.bool)
        for start, stop in self._zero_ranges:
            out_NK = out_NK | ((expert_NK >= start) & (expert_NK < stop))
        return out_NK

    @torch.no_grad()
    def update(self, load: Load) -> None:
        """Raise the bias of experts below the mean load and lower it above."""
        if self.spec.bias_rate > 0:
            load_E = load.assignments_E.to(self.correction_bias_E.dtype)
            self.correction_bias_E += self.spec.bias_rate * torch.sign(load_E.mean() - load_E)

    def _jittered(self, x_ND: Tensor) -> Tensor:
        if not self.training or self.spec.jitter == 0:
            return x_ND
        low, high = 1 - self.spec.jitter, 1 + self.spec.jitter
        return x_ND * torch.empty_like(x_ND).uniform_(low, high)

    def _noisy(self, x_ND: Tensor, logits_NE: Tensor) -> Tensor:
        if self.noise_weight is None or not self.training:
            return logits_NE
        std_NE = torch.nn.functional.softplus(linear_logits(x_ND, self.noise_weight))
        return logits_NE + torch.randn_like(logits_NE) * std_NE

    def _within_top_groups(self, ranking_NE: Tensor) -> Tensor:
        groups = self.spec.groups
        grouped_NGE = ranking_NE.unflatten(-1, (groups, -1))
        best = 1 if self.spec.group_score == "max" else 2
        group_NG = grouped_NGE.topk(best, dim=-1).values.sum(-1)
        open_NG = torch.zeros_like(group_NG, dtype=torch.bool)
        open_NG.scatter_(1, group_NG.topk(self.spec.top_groups, dim=-1).indices, True)
        return grouped_NGE.masked_fill(~open_NG[..., None], float("-inf")).flatten(1)


def _softmax_of_rest(logit_NK: Tensor, out_NK: Tensor | None) -> Tensor:
    """Softmax over the slots that are not left out; 0 in those that are.

    Equal to the scores divided by their sum, whose gradient is NaN once float32 scores underflow:
    beside a null expert that wins by 80 nats, say.
    """
    if out_NK is None:
        return logit_NK.softmax(-1)
    none_N1 = out_NK.all(-1, keepdim=True)
    logit_NK = logit_NK.masked_fill(out_NK, float("-inf")).masked_fill(none_N1, 0.0)
    return logit_NK.softmax(-1).masked_fill(out_NK, 0.0)


def _share_of_rest(score_NK: Tensor, out_NK: Tensor | None) -> Tensor:
    """Scores divided by the sum of those not left out; 0 in those that are."""
    score_NK = score_NK if out_NK is None else score_NK.masked_fill(out_NK, 0.0)
    total_N1 = score_NK.sum(-1, keepdim=True)
    lost_N1 = total_N1 < torch.finfo(total_N1.dtype).tiny  # 1 / total would overflow
    return score_NK.masked_fill(lost_N1, 0.0) / total_N1.masked_fill(lost_N1, 1.0)
