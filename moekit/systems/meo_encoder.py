"""A small encoder of digits whose feed-forward projections are mixtures, as in MEO's code."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moekit.dispatch import DispatchSpec, Dropless, Merged
from moekit.experts import AdapterSpec, Linear, TokenAttention
from moekit.layer import MoESpec
from moekit.measure.flops import flop_counter
from moekit.routing import (
    LossSite,
    LossSpec,
    NoisyTopK,
    PerSequence,
    RouterSpec,
    Routing,
    RoutingLosses,
    SwitchBalance,
    TopK,
)
from moekit.systems.digits import Digits
from moekit.training import ProgressReporter

EXPERTS, CHOSEN = 8, 4
WIDTH, HIDDEN, HEADS, BLOCKS = 32, 64, 4, 1
TOKENS, PIXELS = 32, 2
BATCH = 100
LEARNING_RATE = 3e-3


@dataclass(frozen=True)
class Arm:
    """What the feed-forward projections are.

    Attributes:
        router: who computes; None for dense projections.
        dispatch: whether chosen experts are run or merged.
        adapter: token attention, or None.
        losses: balance losses beside those of the router.
        experts_per_token: experts with a share in a token's output.
    """

    router: RouterSpec | None
    dispatch: DispatchSpec = Dropless()
    adapter: AdapterSpec | None = None
    losses: tuple[LossSpec, ...] = ()
    experts_per_token: int = CHOSEN


# The reduction of 64 of the paper would leave a width of 0.
ATTENTION = TokenAttention(reduction=8)
GATE = NoisyTopK(k=CHOSEN)
ARMS = {
    "dense": Arm(None, experts_per_token=1),
    # Switch's router; its probabilities times E, so that it starts near the dense one as well.
    "MoE, 1 a token": Arm(
        TopK(k=1, normalize="none", scale=float(EXPERTS)),
        losses=(SwitchBalance(0.01),),
        experts_per_token=1,
    ),
    "MoE, 4 a token": Arm(GATE),
    "MoE, 4 a sequence": Arm(PerSequence(GATE)),
    "MEO, sequence": Arm(PerSequence(GATE), Merged()),
    "MEO, token": Arm(PerSequence(GATE), Merged(), ATTENTION),
}


class Projection(nn.Module):
    """``x Wᵀ + b``, dense or a mixture of projections that all start as the dense one."""

    def __init__(self, arm: Arm, width: int, out: int) -> None:
        super().__init__()
        dense = nn.Linear(width, out)
        self.dense = dense if arm.router is None else None
        self.mixture = None
        if arm.router is not None:
            spec = MoESpec(
                arm.router, Linear(EXPERTS, out=out), arm.dispatch, arm.losses, adapter=arm.adapter
            )
            with torch.random.fork_rng(devices=[]):  # so that all arms draw the rest alike
                self.mixture = spec.build(width)
            with torch.no_grad():
                for name, parameter in self.mixture.experts.named_parameters():
                    parameter.copy_(dense.get_parameter(name).expand_as(parameter))

    def forward(self, x_BTD: Tensor, routings: list[Routing]) -> Tensor:
        """The projection; a mixture adds its routing to ``routings``."""
        if self.mixture is None:
            assert self.dense is not None
            projected: Tensor = self.dense(x_BTD)
            return projected
        output = self.mixture(x_BTD)
        routings.append(output.routing)
        y: Tensor = output.y
        return y


class Block(nn.Module):
    """Attention in both directions and a feed-forward part ``P₂(relu(P₁(x)))``."""

    def __init__(self, arm: Arm) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.output = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = Projection(arm, WIDTH, HIDDEN), Projection(arm, HIDDEN, WIDTH)

    def forward(self, x_BTD: Tensor, routings: list[Routing]) -> Tensor:
        """The block's output."""
        heads = self.query_key_value(self.norms[0](x_BTD)).unflatten(-1, (3, HEADS, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        x_BTD = x_BTD + self.output(mixed.transpose(1, 2).flatten(2))
        inner = F.relu(self.up(self.norms[1](x_BTD), routings))
        return x_BTD + self.down(inner, routings)


class Encoder(nn.Module):
    """Two pixels a token (T = 32), one block, mean pooling, ten classes."""

    def __init__(self, arm: Arm) -> None:
        super().__init__()
        self.patch = nn.Linear(PIXELS, WIDTH)
        self.position = nn.Parameter(torch.randn(TOKENS, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(Block(arm) for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, 10)
        parts = [p.mixture for p in self.modules() if isinstance(p, Projection)]
        mixtures = [mixture for mixture in parts if mixture is not None]
        self.losses = RoutingLosses([LossSite(arm.losses, m.router) for m in mixtures])

    def forward(self, images_BHW: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, 10) of images (B, 8, 8), and the weighted sum of the routing losses ()."""
        patches_BTP = images_BHW.flatten(1).unflatten(1, (TOKENS, PIXELS))
        x_BTD = self.patch(patches_BTP) + self.position
        routings: list[Routing] = []
        for block in self.blocks:
            x_BTD = block(x_BTD, routings)
        total, _ = self.losses(routings)
        return self.head(x_BTD.mean(1)), total


@dataclass(frozen=True)
class Outcome:
    """One trained encoder.

    Attributes:
        accuracy: on the test images.
        rows_per_token: rows that reached an expert's product, a token and projection.
        mflops_per_image: forward operations, counted; merging included.
        seconds_per_epoch: of training.
    """

    accuracy: float
    rows_per_token: float
    mflops_per_image: float
    seconds_per_epoch: float


def trained(
    arm: Arm, digits: Digits, seed: int, epochs: int, device: str, reporter: ProgressReporter
) -> Outcome:
    """Train an encoder and test it; equal seeds see the same images in the same order."""
    model = built(arm, seed).to(device)
    start = time.perf_counter()
    try:
        losses = curve(model, digits, seed, epochs, reporter)
    finally:
        reporter.finish()
    seconds = (time.perf_counter() - start) / epochs
    assert losses
    return _tested(model, digits, seconds)


def built(arm: Arm, seed: int) -> Encoder:
    """An untrained encoder, which computes the same for every arm without token routing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Encoder(arm)


def curve(
    model: Encoder, digits: Digits, seed: int, epochs: int, reporter: ProgressReporter
) -> list[float]:
    """Train, and give the loss of every step."""
    generator, parameter = torch.Generator().manual_seed(seed), model.position
    optimiser = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    losses: list[float] = []
    reporter.start(epochs, "encoder")
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # of the gates' noise
        for epoch in range(epochs):
            order = torch.randperm(len(digits.train_labels), generator=generator)
            for rows in order.split(BATCH):
                logits, routing_loss = model(digits.train_images[rows].to(parameter))
                labels = digits.train_labels[rows].to(parameter.device)
                loss = F.cross_entropy(logits, labels)
                optimiser.zero_grad()
                (loss + routing_loss).backward()
                optimiser.step()
                losses.append(float(loss.detach()))
            reporter.update(epoch + 1, losses[-1], None)
    return losses


@torch.no_grad()
def _tested(model: Encoder, digits: Digits, seconds: float) -> Outcome:
    model.eval()
    images = digits.test_images.to(model.position)
    rows: list[float] = []
    for projection in model.modules():
        if isinstance(projection, Projection) and projection.mixture is not None:
            projection.mixture.register_forward_hook(
                lambda _, args, out: rows.append(
                    int(out.rows_E.sum()) / (args[0].shape[0] * args[0].shape[1])
                )
            )
    with flop_counter() as counter:
        logits, _ = model(images)
    correct = logits.argmax(-1).cpu() == digits.test_labels
    return Outcome(
        accuracy=float(correct.double().mean()),
        rows_per_token=sum(rows) / len(rows) if rows else 1.0,
        mflops_per_image=counter.get_total_flops() / len(images) / 1e6,
        seconds_per_epoch=seconds,
    )
