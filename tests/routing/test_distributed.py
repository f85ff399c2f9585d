"""Two ranks: losses and controllers see the global batch."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moekit.experts import Bank, ExpertsSpec, SwiGLU, Zero
from moekit.layer import MoESpec
from moekit.routing import (
    Comet,
    Entropy,
    HeterogeneousBalance,
    L1Balance,
    Load,
    LossSite,
    LossSpec,
    MutualInformation,
    NullAwareBalance,
    ReLURouting,
    RouterSpec,
    RouterZ,
    RoutingLosses,
    Signals,
    SwitchBalance,
    TopK,
    all_reduce_loads,
)

BANK = Bank((SwiGLU(count=3, hidden=4), Zero(2)))
PROBABILISTIC: tuple[LossSpec, ...] = (
    SwitchBalance(),
    SwitchBalance(scope="global", divide_by_k=True),
    NullAwareBalance(),
    HeterogeneousBalance(tau=0.5),
    RouterZ(),
    Entropy(of="token"),
    Entropy(of="marginal"),
    MutualInformation(),
)
DESIGNS: dict[str, tuple[RouterSpec, ExpertsSpec, tuple[LossSpec, ...]]] = {
    **{f"{i}": (TopK(k=2), BANK, (loss,)) for i, loss in enumerate(PROBABILISTIC)},
    "relu": (ReLURouting(k=1), BANK, (L1Balance(k=1, initial=0.1),)),
    "a loss of the router": (Comet(k=2, gamma=8.0, entropy=0.5), BANK, (RouterZ(),)),
}


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and padding; the halves differ in both, so that their own losses differ."""
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    x_ND[6:] += 2
    return x_ND, torch.arange(12) < 10


def loss_and_gradients(name: str, half: slice) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss of two layers on some rows of the batch, and the gradients of their routers."""
    torch.manual_seed(1)
    layers = [MoESpec(*DESIGNS[name][:2]).build(4).double() for _ in range(2)]
    weights = [weight for layer in layers for weight in layer.router.parameters()]
    for weight in weights:
        torch.nn.init.normal_(weight)
    losses = RoutingLosses([LossSite(DESIGNS[name][2], layer.router) for layer in layers])
    x_ND, valid_N = batch()
    signals = Signals(valid_N=valid_N[half])
    total, _ = losses([layer.router(x_ND[half], signals) for layer in layers])
    gradients = torch.autograd.grad(total, weights)
    return total.detach(), list(gradients)


def controllers(rank: int) -> float:
    """λ after three steps in which the ranks see different sparsity."""
    layer = MoESpec(ReLURouting(k=1), BANK).build(4)
    losses = RoutingLosses([LossSite((L1Balance(k=1),), layer.router)])
    for step in range(3):
        # Rank 0 alone is above the target at each step, rank 1 below; together above, once below.
        active = [[40, 40, 2], [0, 0, 3]][rank][step]
        load = Load(torch.tensor([active, 0, 0, 0, 0]), torch.tensor(10))
        losses.update(all_reduce_loads([load]))
    return float(losses.coefficients()["L1Balance"])


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    half = slice(0, 6) if rank == 0 else slice(6, 12)
    found = {name: loss_and_gradients(name, half) for name in DESIGNS}
    result = {"losses": found, "lam": controllers(rank)}
    torch.save(result, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, args=(port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", DESIGNS)
def test_the_mean_over_ranks_is_the_loss_of_the_whole_batch(ranks: list[dict], name: str) -> None:
    """Gradient averaging over ranks gives the gradient of one process with both halves."""
    total, gradients = loss_and_gradients(name, slice(0, 12))
    (first, first_gradients), (second, second_gradients) = (r["losses"][name] for r in ranks)
    torch.testing.assert_close((first + second) / 2, total, rtol=1e-12, atol=1e-14)
    for wanted, a, b in zip(gradients, first_gradients, second_gradients, strict=True):
        torch.testing.assert_close((a + b) / 2, wanted, rtol=1e-10, atol=1e-13)
    assert not torch.allclose(first, second)  # the halves do differ


def test_ranks_of_different_sparsity_agree_on_the_coefficient(ranks: list[dict]) -> None:
    assert ranks[0]["lam"] == ranks[1]["lam"]
    assert ranks[0]["lam"] == pytest.approx(1e-8 * 1.2, rel=1e-6)  # up, up, down
