"""What an adapter consists of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moekit.spec import Spec

Combine = Literal["sparse_ste", "hard", "gate", "normalized", "ste", "soft"]


@dataclass(frozen=True)
class AdaptSpec(Spec):
    """A mixture of LoRA experts on every feed-forward part, and LoRA on attention.

    An expert is a LoRA pair for each projection of the feed-forward part; one router a part sends
    each token to ``k`` of them, the same for all projections (LLaVA-MoLE, arXiv 2401.16160). A
    feed-forward part that is a mixture of experts itself gets a LoRA pair for each of its experts
    and projections instead, and its own router is left as it is.

    How the experts of a token are combined, with p the router's softmax:

    ============== =========================== ============================= ==================
    combine        weight of an expert         router's gradient of the task experts computed
    ============== =========================== ============================= ==================
    ``sparse_ste`` 1/k                         through the chosen ones       k
    ``hard``       1/k                         none, it learns balance alone k
    ``gate``       p of the chosen ones        through the chosen ones       k
    ``normalized`` p over the chosen ones' sum through the chosen ones       k
    ``ste``        1/k                         through all                   all in training
    ``soft``       p, of all                   through all                   all
    ============== =========================== ============================= ==================

    ``sparse_ste`` computes what the paper says and lets the router learn; ``hard`` and ``soft``
    are what the official code trains and serves with.

    With ``null`` experts a token may choose fewer: some of its k choices then do nothing, and
    weights are over the others (AdaMoE, arXiv 2406.13233, whose LoRA experts are ``experts=4,
    null=5, k=4, rank=8, combine="normalized", routers="linear", router_bias=False``). At balance
    ``k * experts / (experts + null)`` of them are used.

    Attributes:
        experts: LoRA experts of a part; 1 without null experts is plain LoRA without a router.
        null: experts that compute nothing; they need ``normalized`` or ``gate``.
        k: experts a token, null ones included.
        routers: ``part`` for one a feed-forward part, which all its projections follow; ``linear``
            for one a projection, those of attention too, which then have LoRA experts as well.
        router_bias: whether routers have a bias.
        rank: r of every LoRA pair.
        alpha: an update is scaled by alpha / r.
        dropout: on what goes into a pair, in training; peft allows none for fused experts.
        combine: see above.
        balance: weight of the balance loss Σ c p, c the share of choices that fell on an expert
            and p its mean probability, which is added to the model's loss in training. Null
            experts are interchangeable: each has the mean c of all of them. It is the mean over
            routers; AdaMoE's loss with its α is ``α (experts + null) k`` times it.
        pooled: take c and p over all layers together, as the official code does; layers may then
            collapse onto different experts at no cost.
        feed_forward: adapt feed-forward parts.
        attention: adapt the projections of attention by plain LoRA of the same rank, through peft.
    """

    experts: int = 3
    null: int = 0
    k: int = 1
    routers: Literal["part", "linear"] = "part"
    router_bias: bool = True
    rank: int = 32
    alpha: float = 64.0
    dropout: float = 0.05
    combine: Combine = "sparse_ste"
    balance: float = 0.01
    pooled: bool = False
    feed_forward: bool = True
    attention: bool = True

    def check(self) -> None:
        self.require(self.experts >= 1, f"experts is {self.experts}; wanted at least 1")
        self.require(self.null >= 0, f"null is {self.null}; wanted 0 or more")
        most = self.experts + self.null
        self.require(1 <= self.k <= most, f"k is {self.k}; wanted 1 to {most}, the experts")
        self.require(
            self.null == 0 or self.combine in ("normalized", "gate"),
            f"combine is {self.combine} with {self.null} null experts, which have no weight there; "
            "wanted normalized or gate",
        )
        self.require(self.rank >= 1, f"rank is {self.rank}; wanted at least 1")
        self.require(self.alpha > 0, f"alpha is {self.alpha}; wanted a positive number")
        self.require(0 <= self.dropout < 1, f"dropout is {self.dropout}; wanted 0 to below 1")
        self.require(self.balance >= 0, f"balance is {self.balance}; wanted 0 or more")
        self.require(
            self.feed_forward or self.attention,
            "feed_forward and attention are both off; nothing would be adapted",
        )

    @property
    def scale(self) -> float:
        """What an update is multiplied by."""
        return self.alpha / self.rank

    @property
    def routed(self) -> bool:
        """Whether tokens have a choice."""
        return self.experts + self.null > 1

    @property
    def everywhere(self) -> bool:
        """Whether attention's projections get LoRA experts like those of feed-forward parts."""
        return self.attention and self.routers == "linear" and self.routed
