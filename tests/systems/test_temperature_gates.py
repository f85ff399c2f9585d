"""The layer designs of the temperature and Gumbel gates: trained, resumed, and compared."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainerCallback

from moekit import DenseToSparse, GumbelSoftmax, MoESpec, SwiGLU
from moekit.compare import Design, ModelSpec, StudySpec, compare, matched
from moekit.data import ProgressHook, TextSpec
from moekit.models.language import MoEDecoderForCausalLM
from moekit.systems import Shape, find
from moekit.training import (
    MoETrainer,
    ProgressReporter,
    SilentProgress,
    TrainingResult,
    TrainingSpec,
    train,
)

SHAPE = Shape(experts=4, hidden=16, k=1)
MODEL = ModelSpec(width=16, depth=2, heads=2, kv_heads=1)
NAMES = ("topk", "temperature_gaussian_moe", "gg_moe")


class Sequences(Dataset[dict[str, Tensor]]):
    """Sequences that count upwards from a random id."""

    def __init__(self, count: int) -> None:
        self.ids = (torch.arange(count)[:, None] * 7 + torch.arange(12)) % 32

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index].clone()}


class Data:
    """In the place of ``moekit.data.TextData``."""

    train, validation, tokenizer = Sequences(24), Sequences(6), None


class Nobody:
    """A StudyProgress that tells nobody."""

    def preparing(self) -> ProgressHook:
        return lambda *_: None

    def run(self, design: str, seed: int, index: int, total: int) -> ProgressReporter:
        return SilentProgress()

    def found(self, design: str, seed: int) -> None:
        return None

    def timing(self) -> None:
        return None


class Interrupt(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt


def named(name: str, shape: Shape = SHAPE) -> Design:
    design = find(name).design
    assert design is not None
    return design(shape)


def layer_of(design: Design) -> MoESpec:
    (layer,) = design.layers
    assert isinstance(layer, MoESpec)
    return layer


@pytest.mark.parametrize("shape", [Shape(8, 256, 2), Shape(8, 100, 3), Shape(16, 8, 4)], ids=str)
def test_gg_moe_has_the_compute_of_top_k_and_fewer_parameters(shape: Shape) -> None:
    ours, theirs = layer_of(named("gg_moe", shape)), layer_of(named("topk", shape))
    width = shape.experts * ours.experts.hidden  # all experts run
    assert 0 <= width - shape.k * shape.hidden < shape.experts
    ratio = sum(ours.experts.parameters_E(8)) / sum(theirs.experts.parameters_E(8))
    assert ratio == pytest.approx(shape.k / shape.experts, rel=0.05)


def test_matching_counts_the_experts_that_run() -> None:
    """At equal operations the temperature gate, top-k in the end, is as wide as top-k."""
    model = ModelSpec(width=64, depth=2, heads=4, kv_heads=2)
    found = matched([named(name, Shape(8, 128, 2)) for name in NAMES], model, "flops")
    assert [layer_of(design).experts.hidden for design in found] == [128, 128, 32]


def test_a_study_states_the_mean_experts_a_token(tmp_path: Path) -> None:
    source = tmp_path / "words.txt"
    source.write_text(" ".join(f"{n % 13} and {n % 7}," for n in range(3000)))
    gate = DenseToSparse(temperature=2.0, final=0.3, steps=4, activation="tanh", k=1)
    annealed = Design("annealed", (MoESpec(gate, SwiGLU(count=4, hidden=16)),))
    spec = StudySpec(
        designs=(named("gg_moe"), named("temperature_gaussian_moe"), annealed),
        model=MODEL,
        training=TrainingSpec(steps=6, batch_size=2, log_every=2, save_every=2, eval_batches=2),
        text=TextSpec(source=str(source), vocab_size=280, sequence_length=16),
        seeds=(0,),
        match="steps",
    )
    records = compare(spec, tmp_path / "study", progress=Nobody()).records
    experts = {record.design: record.feed_forward_experts for record in records}
    assert experts["gg_moe"] == 4
    assert experts["temperature_gaussian_moe"] == 4  # its annealing takes 100 steps
    assert experts["annealed"] == 1
    assert all(0 < record.validation_loss < 10 for record in records)


def run(folder: Path) -> TrainingResult:
    gates = (
        DenseToSparse(temperature=2.0, final=0.3, steps=6, k=2, noise=True, threshold=0.01),
        GumbelSoftmax(),
    )
    layers = tuple(MoESpec(gate, SwiGLU(count=4, hidden=16)) for gate in gates)
    torch.manual_seed(0)
    model = MoEDecoderForCausalLM(Design("gates", layers).config(MODEL, vocabulary=32, length=12))
    spec = TrainingSpec(steps=8, batch_size=4, save_every=3, log_every=2, gradient_accumulation=2)
    return train(model, Data(), spec, folder, progress=SilentProgress())  # type: ignore[arg-type]


@pytest.fixture
def interrupting(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A trainer that is interrupted at step 5, two after its last checkpoint."""
    original = MoETrainer.__init__

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.add_callback(Interrupt())

    with monkeypatch.context() as patch:
        patch.setattr(MoETrainer, "__init__", build)
        yield patch


def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    tmp_path: Path, interrupting: pytest.MonkeyPatch
) -> None:
    """Noise and temperature go on where they were, to the last bit."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "resumed")
    interrupting.undo()
    results = [run(tmp_path / name) for name in ("resumed", "whole")]
    ours, theirs = (load_file(result.checkpoint / "model.safetensors") for result in results)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    (step,) = (value for name, value in ours.items() if name.endswith("router.step"))
    assert int(step) == 8
    losses = [[row.get("loss") for row in result.history] for result in results]
    assert losses[0] == losses[1]
