"""Two processes, each with its own tokens and half of the experts, against the emulation."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moekit.dispatch import Dropless, Rectified, plan_places, plan_rows, rectify
from moekit.experts import GroupedMM, SwiGLU
from moekit.layer import MoE, MoESpec
from moekit.routing import Routing, TopK

RANKS, TOKENS, EXPERTS, WIDTH = 2, 12, 6, 8
SPECS = {
    f"{fill_in}-{intra}-{k}": (k, Rectified(0.5, groups=RANKS, fill_in=fill_in, intra_device=intra))
    for fill_in in (False, True)
    for intra in (False, True)
    for k in (1, 2)
}


def layer_of(k: int, spec: Any) -> MoE:
    torch.manual_seed(1)
    layer = MoESpec(TopK(k=k), SwiGLU(count=EXPERTS, hidden=8), spec).build(WIDTH).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return layer


def tokens(seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(RANKS * TOKENS, WIDTH, generator=generator, dtype=torch.float64)


class Communication(TorchDispatchMode):
    """Names of all operations between processes: collectives, messages, barriers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            self.calls.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Resident:
    """The experts of one rank: all that it may run."""

    def __init__(self, layer: MoE, rank: int) -> None:
        size = EXPERTS // RANKS
        self.start, self.stop = rank * size, (rank + 1) * size
        self.bank = SwiGLU(count=size, hidden=8).build(WIDTH).double()
        whole = layer.experts.state_dict()
        self.bank.load_state_dict({n: v[self.start : self.stop] for n, v in whole.items()})

    def run(self, rows_RD: Tensor, count_E: Tensor) -> Tensor:
        return self.bank(rows_RD, GroupedMM(count_E))


class Exchange(torch.autograd.Function):
    """Block p goes to rank p, and its gradient back; every block has the same static shape."""

    @staticmethod
    def forward(_: Any, blocks_PXD: Tensor) -> Tensor:
        sent = blocks_PXD.contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        return received

    @staticmethod
    def backward(context: Any, *gradient: Tensor) -> Tensor:
        return Exchange.forward(context, gradient[0])


def everywhere(sent: Routing, x_ND: Tensor, resident: Resident, places: int) -> Tensor:
    """Run assignments on the ranks that hold their experts: one exchange there, one back."""
    plan = plan_places(sent, [(0, EXPERTS)], places)
    size = EXPERTS // RANKS
    given = Exchange.apply(plan.gather(x_ND).view(RANKS, size, places, WIDTH))
    rows_RD = given.transpose(0, 1).reshape(-1, WIDTH)  # by expert, then by source rank
    y_RD = resident.run(rows_RD, torch.full((size,), RANKS * places))
    back = Exchange.apply(y_RD.view(size, RANKS, places, WIDTH).transpose(0, 1))
    return plan.combine(back.reshape(-1, WIDTH))


def at_home(kept: Routing, x_ND: Tensor, resident: Resident) -> Tensor:
    """Run assignments on resident experts; an assignment to any other would have no row."""
    plan = plan_rows(kept, [(resident.start, resident.stop)])
    assert int(plan.groups.count_E.sum()) == int(kept.used_NK.sum())
    return plan.combine(resident.run(plan.gather(x_ND), plan.groups.count_E))


def part_of(routing: Routing, slots: slice) -> Routing:
    return Routing(routing.expert_NK[:, slots], routing.weight_NK[:, slots], EXPERTS)


def trained(name: str, rank: int) -> dict[str, Any]:
    """One rank's output and gradients for its own tokens, and how it talked to the other."""
    k, spec = SPECS[name]
    layer = layer_of(k, Dropless())
    resident = Resident(layer, rank)
    mine = slice(rank * TOKENS, (rank + 1) * TOKENS)
    x_ND = tokens()[mine].requires_grad_()
    with Communication() as communication:
        group_N = torch.full((TOKENS,), rank)
        done = rectify(layer.router(x_ND), spec, group_N)
        requests = k + spec.fill_in
        sent = part_of(done.routing, slice(0, requests))
        local = part_of(done.routing, slice(requests, None))
        y_ND = everywhere(sent, x_ND, resident, int(done.places) // EXPERTS)
        if spec.intra_device:
            y_ND = y_ND + at_home(local, x_ND, resident)
        forward = len(communication.calls)
        (y_ND * tokens(seed=3)[mine]).sum().backward()
    counts = [done.dropped, done.filled, done.padding, done.served, done.places]
    return {
        "y": y_ND.detach(),
        "x": x_ND.grad,
        "router": layer.router.weight.grad,
        "experts": [parameter.grad for parameter in resident.bank.parameters()],
        "forward": communication.calls[:forward],
        "backward": communication.calls[forward:],
        "counts": torch.stack(counts),
    }


def seen_by_the_counter() -> list[str]:
    """Other ways to talk that it must not miss."""
    with Communication() as communication:
        dist.all_reduce(torch.zeros(2))
        if dist.get_rank() == 0:
            dist.send(torch.zeros(2), 1)
        else:
            dist.recv(torch.zeros(2), 0)
        dist.barrier()
    return communication.calls


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    runs = {name: trained(name, rank) for name in SPECS}
    torch.save({"runs": runs, "seen": seen_by_the_counter()}, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, args=(port, str(folder)), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("name", SPECS)
def test_two_processes_equal_the_emulation(ranks: list[dict[str, Any]], name: str) -> None:
    k, spec = SPECS[name]
    layer, x_ND = layer_of(k, spec), tokens().requires_grad_()
    whole = rectify(layer.router(x_ND), spec)
    wanted_ND = layer(x_ND).y
    (wanted_ND * tokens(seed=3)).sum().backward()
    found = [rank["runs"][name] for rank in ranks]
    pairs = [
        (torch.cat([rank["y"] for rank in found]), wanted_ND.detach()),
        (torch.cat([rank["x"] for rank in found]), x_ND.grad),
        (sum(rank["router"] for rank in found), layer.router.weight.grad),
        *zip(
            (torch.cat(parts) for parts in zip(*(r["experts"] for r in found), strict=True)),
            (parameter.grad for parameter in layer.experts.parameters()),
            strict=True,
        ),
    ]
    for ours, wanted in pairs:
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
    counts = [whole.dropped, whole.filled, whole.padding, whole.served, whole.places]
    assert sum(rank["counts"] for rank in found).tolist() == [int(c) for c in counts]
    assert int(whole.dropped) > 0
    assert bool(int(whole.served)) == spec.intra_device


def test_intra_device_repair_needs_no_communication(ranks: list[dict[str, Any]]) -> None:
    """One exchange there and one back, and the same for gradients, with and without it."""
    for rank, message in zip(ranks, ("send", "recv_"), strict=True):
        assert rank["seen"] == ["allreduce_", message, "barrier"]
        for found in rank["runs"].values():
            assert found["forward"] == found["backward"] == ["alltoall_base_"] * 2
