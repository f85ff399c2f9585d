"""The speed of an MoE layer at one shape, against transformers' backends and a dense layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moekit.dispatch import Dropless
from moekit.experts import FeedForwardExperts, SwiGLU
from moekit.measure.layer_shapes import LayerShape
from moekit.measure.memory import PeakMemory, collecting_only_what_is_new
from moekit.measure.roofline import LimitRuns, Limits, alternating, captured, interleaved
from moekit.measure.scattermoe import scattermoe
from moekit.routing import Routing

BACKENDS = {
    "cpu": ("native", "streamed", "few_rows", "grouped_mm", "loop"),
    "cuda": ("triton", "grouped_mm", "loop"),
}
OURS = {"moekit": "auto"} | {
    f"moekit {name}": name for names in BACKENDS.values() for name in names
}
THEIRS = {f"transformers {name}": name for name in ("eager", "batched_mm", "grouped_mm")}
SCATTERMOE = "ScatterMoE"
DENSE = "dense of equal FLOPs"
RECOMPUTED = "transformers grouped_mm, recomputed"
# These wait for the host in every run: to loop over experts, or to count their rows.
WAITING = ("moekit loop", "transformers eager", SCATTERMOE)
# Of timed runs at a shape: small ones, which little disturbs, take more turns than asked for.
LEAST_SECONDS = 0.6
# Bytes of weights beyond which batched_mm, which copies an expert a row, is left out.
LARGEST_COPY = 2**31


@dataclass(frozen=True)
class LayerTiming:
    """One shape, forward alone or with backward.

    Attributes:
        shape: which.
        training: whether the backward pass is in it.
        whole: whether the router is in it.
        seconds: median time of each contender.
        peak_bytes: memory that each one's run added at its highest.
        saved_bytes: bytes a token kept for the backward pass, weights left out; training only.
        limits: what the machine could do meanwhile, by medians of runs.
        least_seconds: the limit for this work: operations at the rate of a large
            product, or weights (and in training their gradients) at the rate of reading memory.
        bound: which of the two it is, ``compute`` or ``memory``.
        graph_seconds: forward on a GPU, the same as ``seconds`` for replays of a CUDA graph, of
            those contenders that never wait for the host.
    """

    shape: LayerShape
    training: bool
    whole: bool
    seconds: dict[str, float]
    peak_bytes: dict[str, int]
    saved_bytes: dict[str, float]
    limits: Limits
    least_seconds: float
    bound: str
    graph_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def best_other(self) -> float:
        """Time of the fastest backend of transformers."""
        return min(time for name, time in self.seconds.items() if name in THEIRS)

    @property
    def ratio(self) -> float:
        """How many times as fast as that we are."""
        return self.best_other / self.seconds["moekit"]

    @property
    def share(self) -> float:
        """Share of the machine's limit that we reach."""
        return self.least_seconds / self.seconds["moekit"]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self) | {"ratio": self.ratio, "share": self.share}


Run = Callable[[Tensor, Tensor], Tensor]


class LayerBench:
    """All contenders at one shape, on the same weights, tokens and routing.

    The router is not in it: every contender is given ids and weights. Tokens choose experts
    uniformly at random.

    Args:
        shape: the sizes.
        device: where to run.
        seed: of weights, tokens and routing.
    """

    whole: ClassVar[bool] = False

    def __init__(self, shape: LayerShape, device: torch.device, seed: int = 0) -> None:
        self.shape, self.device = shape, device
        generator = torch.Generator(device).manual_seed(seed)
        dtype = getattr(torch, shape.dtype)
        with torch.device(device):
            self.bank = SwiGLU(count=shape.experts, hidden=shape.hidden).build(shape.width)
        self.bank.to(dtype)
        with torch.no_grad():
            for parameter in self.bank.parameters():
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
        room: dict[str, Any] = {"generator": generator, "device": device}
        self.x_ND = torch.randn(shape.tokens, shape.width, **room).to(dtype)
        scores_NE = torch.rand(shape.tokens, shape.experts, **room)
        weight_NK, self.expert_NK = scores_NE.topk(shape.k)
        self.weight_NK = (weight_NK / weight_NK.sum(-1, keepdim=True)).to(dtype)
        self.config = _config(shape)
        self.theirs = _of_transformers(self.bank, self.config)
        self.dense = [
            nn.Parameter(torch.randn(out, inner, device=device, dtype=dtype) * inner**-0.5)
            for out, inner in _dense_sizes(shape)
        ]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Of all contenders."""
        return [*self.bank.parameters(), *self.dense]

    def contenders(self, training: bool, names: Iterable[str] | None = None) -> dict[str, Run]:
        """What is compared, by name; each maps tokens (N, D) and weights (N, K) to outputs.

        Backends of transformers that a shape rules out are not among them.
        """
        here = ("auto", *BACKENDS.get(self.device.type, ("grouped_mm", "loop")))
        found = {name: self._ours(backend) for name, backend in OURS.items() if backend in here}
        found |= {name: self._theirs(b) for name, b in THEIRS.items() if self._takes(b)}
        if training and self._takes("grouped_mm"):
            found[RECOMPUTED] = self._recomputed
        found |= self._peers()
        found[DENSE] = self._dense
        return found if names is None else {n: run for n, run in found.items() if n in set(names)}

    def time(
        self,
        limit_runs: LimitRuns,
        training: bool,
        repeats: int,
        names: Iterable[str] | None = None,
        least_seconds: float = LEAST_SECONDS,
    ) -> LayerTiming:
        """Time all contenders, which take turns, and the limits, and measure the memory of each.

        Args:
            limit_runs: of this device and dtype.
            training: with the backward pass.
            repeats: least turns.
            names: of the contenders; by default all.
            least_seconds: of all turns together; further ones follow until it is reached. The
                limits get as many again.
        """
        contenders = self.contenders(training, names)
        runs = {name: self._call(run, training) for name, run in contenders.items()}
        with torch.set_grad_enabled(training):  # once, as models do
            taken = alternating((runs, limit_runs.runs), self.device, repeats, least_seconds)
            with collecting_only_what_is_new():
                peaks = {name: self._peak(run) for name, run in runs.items()}
            graphed = self.device.type == "cuda" and not training
            graph_seconds = self._graphed(runs, repeats, least_seconds) if graphed else {}
        seconds, limits = {name: taken[name] for name in runs}, limit_runs.limits(taken)
        least, bound = limits.least_seconds(*self._work(training))
        saved = {name: self.saved_bytes(run) for name, run in contenders.items() if training}
        return LayerTiming(
            self.shape,
            training,
            self.whole,
            seconds,
            peaks,
            {name: count / self.shape.tokens for name, count in saved.items()},
            limits,
            least,
            bound,
            graph_seconds,
        )

    def _graphed(
        self, runs: dict[str, Callable[[], Tensor | None]], repeats: int, least_seconds: float
    ) -> dict[str, float]:
        graphs = {name: captured(run) for name, run in runs.items() if name not in WAITING}
        replays: dict[str, Callable[[], Tensor | None]] = {
            name: replay for name, replay in graphs.items() if replay is not None
        }
        return interleaved(replays, self.device, repeats, least_seconds)

    def saved_bytes(self, run: Run) -> int:
        """Bytes that autograd keeps for the backward pass of ``run``, parameters left out."""
        held: dict[int, int] = {}
        parameters = {p.data_ptr() for p in self.parameters}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        x_ND, weight_NK = self._leaves()
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            y_ND = run(x_ND, weight_NK)
        del y_ND
        return sum(held.values())

    def _work(self, training: bool) -> tuple[float, float]:
        """Operations and bytes: each expert with rows is read once forward, and backward once;
        every expert's gradient is written once."""
        used = len(self.expert_NK.unique())
        read = used * self.shape.weight_bytes
        written = self.shape.experts * self.shape.weight_bytes
        if training:
            return 3 * self.shape.flops, 2 * read + written
        return self.shape.flops, read

    def _leaves(self) -> tuple[Tensor, Tensor]:
        return self.x_ND.clone().requires_grad_(), self.weight_NK.clone().requires_grad_()

    def _call(self, run: Run, training: bool) -> Callable[[], Tensor | None]:
        if not training:
            return lambda: run(self.x_ND, self.weight_NK)
        cotangent = torch.randn_like(self.x_ND)

        def step() -> None:
            for parameter in self.parameters:
                parameter.grad = None
            run(*self._leaves()).backward(cotangent)

        return step

    def _peak(self, run: Callable[[], Tensor | None]) -> int:
        with PeakMemory(self.device) as before:
            pass
        with PeakMemory(self.device) as during:
            run()
        return max(during.bytes - before.bytes, 0)

    def _ours(self, backend: str) -> Run:
        dispatch = Dropless(backend=backend).build()  # type: ignore[arg-type]  # one of ours

        def run(x_ND: Tensor, weight_NK: Tensor) -> Tensor:
            routing = Routing(self.expert_NK, weight_NK, self.shape.experts, full=True)
            y_ND: Tensor = dispatch(x_ND, routing, self.bank).y_ND
            return y_ND

        return run

    def _theirs(self, backend: str) -> Run:
        def run(x_ND: Tensor, weight_NK: Tensor) -> Tensor:
            self.config._experts_implementation = backend
            y_ND: Tensor = self.theirs(x_ND, self.expert_NK, weight_NK)
            return y_ND

        return run

    def _takes(self, backend: str) -> bool:
        """Whether a backend of transformers runs at this shape, and within a bounded memory."""
        copied = self.shape.tokens * self.shape.k * self.shape.weight_bytes
        ruled_out = {"batched_mm": copied > LARGEST_COPY, "grouped_mm": not self.shape.aligned}
        return not ruled_out.get(backend, False)

    def _peers(self) -> dict[str, Run]:
        peer = scattermoe(self.bank, self.expert_NK) if self.device.type == "cuda" else None
        return {} if peer is None else {SCATTERMOE: peer}

    def _recomputed(self, x_ND: Tensor, weight_NK: Tensor) -> Tensor:
        y_ND: Tensor = checkpoint(self._theirs("grouped_mm"), x_ND, weight_NK, use_reentrant=False)
        return y_ND

    def _dense(self, x_ND: Tensor, weight_NK: Tensor) -> Tensor:
        gate_NH, up_NH = (x_ND @ self.dense[0].T).chunk(2, dim=-1)
        return (F.silu(gate_NH) * up_NH) @ self.dense[1].T


def _config(shape: LayerShape) -> MixtralConfig:
    return MixtralConfig(
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.k,
        hidden_act="silu",
    )


def _of_transformers(bank: FeedForwardExperts, config: MixtralConfig) -> MixtralExperts:
    """transformers' module on the same parameters."""
    with torch.device("meta"):
        module = MixtralExperts(config)
    module.gate_up_proj = bank.get_parameter(bank.up_name)
    module.down_proj = bank.down_proj
    return module


def _dense_sizes(shape: LayerShape) -> tuple[tuple[int, int], tuple[int, int]]:
    hidden = shape.k * shape.hidden
    return (2 * hidden, shape.width), (shape.width, hidden)
