"""The trainings of ModuleFormer's experiment: models of one domain, adapted to another."""

from __future__ import annotations

import math
import statistics
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moekit.compare import Design, ModelSpec
from moekit.compare.run import build_model, evaluation_batches, on_device
from moekit.data import PackedDataset, TextData, TextSpec, prepare
from moekit.experts import GELU, AttentionHeads
from moekit.layer import MoESpec
from moekit.measure import observe, routing_information
from moekit.models.language import MoEDecoderForCausalLM
from moekit.routing import (
    Entropy,
    LossSpec,
    ModuleRouting,
    MutualInformation,
    RouterZ,
    SwitchBalance,
)
from moekit.surgery import extend_modules
from moekit.surgery.rebuild import mixtures, rebuilt
from moekit.systems.experiment import Laboratory
from moekit.training import ProgressReporter, TrainingSpec, train
from moekit.training.evaluation import evaluate

MODEL = ModelSpec(width=96, depth=3, heads=4, kv_heads=4)
LENGTH, BATCH = 128, 8
ATTENTION, FEED_FORWARD, HIDDEN, K = 8, 16, 96, 2
ADDED_ATTENTION, ADDED_FEED_FORWARD = 4, 8
WEIGHT = 0.01  # Switch Transformer's; ModuleFormer's is not in its release
BALANCE: dict[str, tuple[LossSpec, ...]] = {
    "mi": (MutualInformation(WEIGHT),),
    "none": (),
    "switch": (SwitchBalance(WEIGHT, divide_by_k=True), RouterZ(0.1 * WEIGHT)),
}
CONCENTRATION = (Entropy(0.1, of="marginal"),)  # more, for fine-tuning is short


@dataclass(frozen=True)
class Budget:
    """How long the models learn.

    Attributes:
        seeds: number of seeds.
        steps, tuning: steps on the first domain, and then on the second.
        batches: batches of a domain that are evaluated, and that usage is counted on.
    """

    seeds: int
    steps: int
    tuning: int
    batches: int


@dataclass(frozen=True)
class Domains:
    """Both domains under the same bytes.

    Attributes:
        old: the manual of the standard library.
        new: its modules' source.
    """

    old: TextData
    new: TextData


class Workshop:
    """Trains and measures the models of one seed."""

    def __init__(self, lab: Laboratory, budget: Budget, seed: int, done: int, total: int) -> None:
        self.lab, self.budget, self.seed = lab, budget, seed
        self._done, self._total = done, total
        self.domains = domains(lab)

    def pretrained(self, design: Design) -> MoEDecoderForCausalLM:
        """A model trained on the first domain, or loaded if it was before."""
        model = build_model(design, MODEL, self.domains.old, self.seed)
        return self._trained(f"{design.name}-old", model, self.domains.old, self.budget.steps, 3e-3)

    def tuned(self, name: str, model: MoEDecoderForCausalLM) -> MoEDecoderForCausalLM:
        """``model`` trained on the second domain."""
        return self._trained(name, model, self.domains.new, self.budget.tuning, 1e-3)

    def bits(self, model: MoEDecoderForCausalLM, data: TextData) -> float:
        """Bits a byte of held-out text."""
        nats = evaluate(model, data.validation, BATCH, self.budget.batches)
        return nats / math.log(2) / data.validation.bytes_per_token

    def entropies(self, model: MoEDecoderForCausalLM) -> tuple[float, float]:
        """``H(m)`` and ``H(m|x)`` on held-out text of the first domain, mean over mixtures."""
        seen = [o.routings for o in observe(model, self.domains.old.validation, BATCH, 8)]
        found = [routing_information(routings) for routings in zip(*seen, strict=True)]
        marginal = statistics.fmean(one.marginal for one in found)
        return marginal, statistics.fmean(one.conditional for one in found)

    def _trained(
        self, name: str, model: MoEDecoderForCausalLM, data: TextData, steps: int, rate: float
    ) -> MoEDecoderForCausalLM:
        reporter: ProgressReporter = self.lab.progress.run(name, self.seed, self._done, self._total)
        self._done += 1
        spec = TrainingSpec(
            steps=steps,
            batch_size=BATCH,
            learning_rate=rate,
            log_every=max(1, steps // 20),
            eval_batches=2,
            seed=self.seed,
        )
        folder = self.lab.output / f"{name}-seed{self.seed}".replace(" ", "-")
        result = train(on_device(model, self.lab.device), data, spec, folder, progress=reporter)
        # As loaded, whether it was trained now or earlier: what builds on it can then be resumed.
        loaded = MoEDecoderForCausalLM.from_pretrained(result.checkpoint, local_files_only=True)
        return on_device(loaded, self.lab.device)


RUNS_A_SEED = 9  # four pre-trainings and five adaptations


def domains(lab: Laboratory) -> Domains:
    """The manual, and modules of about the same size."""
    library = Path(sysconfig.get_paths()["stdlib"])
    base = TextSpec(
        source=str(library / "pydoc_data" / "topics.py"), vocab_size=258, sequence_length=LENGTH
    )
    source = base.replace(source=str(library / "*.py"), limit_bytes=600_000)
    preparing = lab.progress.preparing()
    return Domains(prepare(base, progress=preparing), prepare(source, progress=preparing))


def modular(balance: str) -> Design:
    """ModuleFormer with one of the balance losses."""
    losses = BALANCE[balance]
    router = ModuleRouting(k=K, hidden=64)
    heads = AttentionHeads(count=ATTENTION, heads=2, inner=MODEL.width // 2)
    return Design(
        f"moduleformer {balance}",
        layers=(MoESpec(router, GELU(count=FEED_FORWARD, hidden=HIDDEN), losses=losses),),
        attention=(MoESpec(router, heads, losses=losses),),
    )


def dense(hidden: int = K * HIDDEN) -> Design:
    """A dense decoder; by default with the active feed-forward width of ModuleFormer."""
    return Design("dense", (GELU(count=1, hidden=hidden),))


def dense_of_equal_size() -> Design:
    """A dense decoder with as many parameters in all as ModuleFormer."""
    wanted = _parameters(modular("mi")) - _parameters(dense())
    return dense(K * HIDDEN + round(wanted / (2 * MODEL.width * MODEL.depth)))


def extended(model: MoEDecoderForCausalLM, seed: int) -> MoEDecoderForCausalLM:
    """With half as many new modules again, which alone are trainable."""
    return extend_modules(
        model, attention=ADDED_ATTENTION, feed_forward=ADDED_FEED_FORWARD, seed=seed
    )


def balanced_by(
    model: MoEDecoderForCausalLM, losses: tuple[LossSpec, ...]
) -> MoEDecoderForCausalLM:
    """A copy with other routing losses."""
    specs = {mixture.name: mixture.spec.replace(losses=losses) for mixture in mixtures(model)}
    return rebuilt(model, specs, {})


@torch.inference_mode()
def tokens_per_second(
    models: Mapping[str, MoEDecoderForCausalLM], data: PackedDataset, repeats: int = 9
) -> dict[str, float]:
    """Forward speed of models that take turns on the same batches, the median over repeats."""
    device = next(iter(models.values())).device
    batches = evaluation_batches(data, BATCH, device)
    tokens = sum(batch.numel() for batch in batches)
    speeds: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            start = time.perf_counter()
            for batch in batches:
                model(input_ids=batch, use_cache=False)
            if batches[0].is_cuda:
                torch.cuda.synchronize(device)
            if repeat:  # the first pass only warms up
                speeds[name].append(tokens / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in speeds.items()}


def built(design: Design, data: TextData, seed: int, device: str) -> MoEDecoderForCausalLM:
    """An untrained model, for timing."""
    return on_device(build_model(design, MODEL, data, seed), device)


def _parameters(design: Design) -> int:
    with torch.device("meta"):
        model = MoEDecoderForCausalLM(design.config(MODEL, 258, LENGTH))
    return sum(parameter.numel() for parameter in model.parameters())


def mean(values: Sequence[float]) -> float:
    """The mean of a measure over seeds."""
    return statistics.fmean(values)
