"""ModuleFormer's router: a small network before the softmax, gates left as they are.

Shen, Zhang, Cao, Tan, Chen, Gan: "ModuleFormer: Learning Modular Large Language Models From
Uncurated Data", arXiv 2306.04640. Its last layer has a row a module and may consist of blocks, so
that modules added to a trained model have rows of their own, to be trained alone; and it may keep
the rows of modules that were pruned, which then still take their share of the softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moekit.routing.router import Router, RouterSpec, Site, linear_logits
from moekit.routing.routing import Routing, Signals

REMOVED = "removed_"
SMALLEST = 1e-6  # as released: a module of probability 0 can be drawn too


@dataclass(frozen=True)
class ModuleRouting(RouterSpec):
    """Top-k of a softmax over all modules, weighted by the probabilities themselves.

    The weights of a token are not divided by their sum, which is less than 1 for k below E.

    Attributes:
        k: modules a token.
        gate: how logits are made: ``mlp`` is ``W₂ GELU(W₁ x + b)``, ``linear`` one matrix, and
            ``cosine`` ``exp(t)`` times the cosine of ``W₁ x`` and a module's centroid, t learned
            (``gmm`` in the released code).
        hidden: width of ``W₁ x``; None for a quarter of the model's, as in the release.
        dropout: dropout before the last layer of ``mlp`` in training.
        sampled: in training, so many of the k are drawn from the probabilities of the modules
            that are not among the best ``k - sampled``.
        added: sizes of the blocks of modules that were added later; see
            :func:`moekit.surgery.extend_modules`.
        removed: number of pruned modules whose logits stay in the softmax; see
            :func:`moekit.surgery.prune_modules`.
        init_std: standard deviation of the initial weights; None for the model's own.
    """

    k: int = 2
    gate: Literal["mlp", "linear", "cosine"] = "mlp"
    hidden: int | None = None
    dropout: float = 0.0
    sampled: int = 0
    added: tuple[int, ...] = ()
    removed: int = 0
    init_std: float | None = None

    def check(self) -> None:
        self.require(self.k >= 1, f"k is {self.k}; a token needs at least one module")
        self.require(
            self.hidden is None or self.hidden >= 1,
            f"hidden is {self.hidden}; wanted a positive width",
        )
        self.require(0 <= self.dropout < 1, f"dropout is {self.dropout}; wanted 0 <= dropout < 1")
        self.require(
            0 <= self.sampled <= self.k,
            f"sampled is {self.sampled}; wanted 0 to k, which is {self.k}",
        )
        self.require(
            min((*self.added, self.removed)) >= 0,
            f"added is {self.added} and removed {self.removed}; wanted numbers of modules",
        )
        self.require(
            self.init_std is None or self.init_std > 0,
            f"init_std is {self.init_std}; wanted a positive number, or None for the model's own",
        )

    def check_experts(self, kinds: tuple[str, ...]) -> None:
        self.require(self.k <= len(kinds), f"k is {self.k} but the bank has {len(kinds)} experts")
        self.require(
            sum(self.added) <= len(kinds),
            f"{sum(self.added)} modules were added, but the bank has {len(kinds)} in all",
        )

    def hidden_width(self, width: int) -> int:
        """Width of what the last layer sees in a model of ``width``."""
        if self.gate == "linear":
            return width
        return max(1, width // 4) if self.hidden is None else self.hidden

    def build(self, site: Site) -> ModuleRouter:
        return ModuleRouter(self, site)

    def expected_load(self, share_E: tuple[float, ...], counted_E: tuple[bool, ...]) -> float:
        return self.k * sum(s for s, counted in zip(share_E, counted_E, strict=True) if counted)


class ModuleRouter(Router):
    """The module of :class:`ModuleRouting`.

    Rows of the last layer are ``weight``, then ``added_0_weight`` and so on with a bias each, then
    ``removed_weight``.
    """

    def __init__(self, spec: ModuleRouting, site: Site) -> None:
        spec.check_experts(site.kinds)
        super().__init__(site)
        self.spec = spec
        hidden = spec.hidden_width(site.width)
        if spec.gate != "linear":
            self.hidden_weight = nn.Parameter(torch.empty(hidden, site.width))
        self.hidden_bias = nn.Parameter(torch.empty(hidden)) if spec.gate == "mlp" else None
        self.temperature = nn.Parameter(torch.empty(())) if spec.gate == "cosine" else None
        self.weight = nn.Parameter(torch.empty(site.experts - sum(spec.added), hidden))
        for name, size in self._later_blocks():
            self.register_parameter(f"{name}weight", nn.Parameter(torch.empty(size, hidden)))
            self.register_parameter(f"{name}bias", nn.Parameter(torch.empty(size)))
        self.reset_parameters()

    @property
    def blocks(self) -> list[tuple[Tensor, Tensor | None]]:
        """Weight and bias of each block of modules that can be chosen, the original first."""
        names = [name for name, _ in self._later_blocks() if name != REMOVED]
        return [(self.weight, None), *(self._block(name) for name in names)]

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or name == "temperature":
                nn.init.zeros_(parameter)
            elif self.spec.gate == "cosine" and name != "hidden_weight":
                nn.init.normal_(parameter)  # centroids: only their direction counts
            else:
                nn.init.normal_(parameter, std=self.spec.init_std or std)

    def route(self, x_ND: Tensor, signals: Signals) -> Routing:
        hidden_NH = self._hidden(x_ND)
        logits_NE = self._logits(hidden_NH, self.blocks)
        all_NE = logits_NE
        if self.spec.removed:
            gone_NE = self._logits(hidden_NH, [self._block(REMOVED)])
            all_NE = torch.cat([logits_NE, gone_NE], dim=1)
        probability_NE = all_NE.softmax(-1)[:, : self.site.experts]
        expert_NK = self._select(probability_NE.detach())
        return Routing(
            expert_NK=expert_NK,
            weight_NK=probability_NE.gather(1, expert_NK),
            experts=self.site.experts,
            logits_NE=logits_NE,
            scores_NE=logits_NE.softmax(-1) if self.spec.removed else probability_NE,
            full=True,
        )

    def _hidden(self, x_ND: Tensor) -> Tensor:
        if self.spec.gate == "linear":
            return x_ND
        hidden_NH = linear_logits(x_ND, self.hidden_weight, self.hidden_bias)
        if self.spec.gate == "cosine":
            return F.normalize(hidden_NH, dim=-1)
        return F.dropout(F.gelu(hidden_NH), self.spec.dropout, self.training)

    def _logits(self, hidden_NH: Tensor, blocks: list[tuple[Tensor, Tensor | None]]) -> Tensor:
        parts = [self._block_logits(hidden_NH, weight, bias) for weight, bias in blocks]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _block_logits(self, hidden_NH: Tensor, weight_EH: Tensor, bias_E: Tensor | None) -> Tensor:
        if self.temperature is None:
            return linear_logits(hidden_NH, weight_EH, bias_E)
        cosine_NE = linear_logits(hidden_NH, F.normalize(weight_EH.to(hidden_NH.dtype), dim=-1))
        logits_NE = cosine_NE * self.temperature.to(cosine_NE.dtype).exp()
        return logits_NE if bias_E is None else logits_NE + bias_E

    def _select(self, probability_NE: Tensor) -> Tensor:
        """Ids (N, K): the best, then those that are drawn."""
        drawn = self.spec.sampled if self.training else 0
        best_NK = probability_NE.topk(self.spec.k - drawn, dim=-1).indices
        if not drawn or not len(probability_NE):
            return probability_NE.topk(self.spec.k, dim=-1).indices
        open_NE = (probability_NE + SMALLEST).scatter(1, best_NK, 0.0)
        return torch.cat([best_NK, open_NE.multinomial(drawn)], dim=1)

    def _later_blocks(self) -> list[tuple[str, int]]:
        """Prefix of the parameters' names and number of rows, of all blocks but the first."""
        added = [(f"added_{index}_", size) for index, size in enumerate(self.spec.added)]
        return added + ([(REMOVED, self.spec.removed)] if self.spec.removed else [])

    def _block(self, name: str) -> tuple[Tensor, Tensor]:
        """Weight and bias; no Parameters under ``functional_call``."""
        return getattr(self, f"{name}weight"), getattr(self, f"{name}bias")
