"""What a training run computes, against loops written without the Trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import DEFAULT_LAYER, Sequences, TinyData, tiny_model
from torch import Tensor

from moekit import (
    Capacity,
    L1Balance,
    MoESpec,
    Pathway,
    ReLURouting,
    RouterZ,
    SwiGLU,
    SwitchBalance,
    TopK,
)
from moekit.models.language import MoEDecoderForCausalLM
from moekit.routing import Load
from moekit.training import SilentProgress, TrainingResult, TrainingSpec, evaluate, train
from moekit.training.decay import decayed_names
from moekit.training.order import ShuffledPasses

RELU_LAYER = MoESpec(
    ReLURouting(k=1), SwiGLU(count=4, hidden=16), losses=(L1Balance(k=1, initial=1e-4),)
)
BIAS_LAYER = MoESpec(
    TopK(k=2, score="sigmoid", bias_rate=0.01), SwiGLU(count=4, hidden=16), losses=(RouterZ(),)
)


def run(model: Any, spec: TrainingSpec, output: Path, data: Any = None) -> TrainingResult:
    return train(model, data or TinyData(), spec, output, progress=SilentProgress())


def learning_rate(spec: TrainingSpec, step: int) -> float:
    """Of the step after ``step`` others: up in a line, then down half a cosine."""
    warmup = math.ceil(spec.warmup_share * spec.steps)
    if step < warmup:
        return spec.learning_rate * (step + 1) / warmup
    share = (step - warmup + 1) / (spec.steps - warmup)
    low = spec.min_learning_rate_ratio
    return spec.learning_rate * (low + (1 - low) * (1 + math.cos(math.pi * share)) / 2)


def bare_losses(model: MoEDecoderForCausalLM, data: Sequences, spec: TrainingSpec) -> list[float]:
    """The losses of a plain loop over the same batches."""
    decayed = set(decayed_names(model))
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if n in decayed], "weight_decay": spec.weight_decay},
        {"params": [p for n, p in named if n not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(spec.beta1, spec.beta2), fused=True)
    order = list(ShuffledPasses(len(data), spec.steps * spec.batch_size, spec.seed))
    losses = []
    model.train()
    for step in range(spec.steps):
        chosen = order[step * spec.batch_size : (step + 1) * spec.batch_size]
        ids = torch.stack([data[index]["input_ids"] for index in chosen])
        output = model(input_ids=ids, labels=ids)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(spec, step)
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), spec.clip)
        optimizer.step()
        model.update_routing([Load.of(record.routing) for record in output.moe])
        losses.append(output.loss.item())
    return losses


@pytest.mark.parametrize("layer", [DEFAULT_LAYER, RELU_LAYER, BIAS_LAYER])
def test_losses_are_those_of_a_plain_loop(layer: MoESpec, tmp_path: Path) -> None:
    spec = TrainingSpec(steps=12, batch_size=8, log_every=1, warmup_share=0.25, clip=0.5)
    expected = bare_losses(tiny_model(layer), Sequences(40), spec)
    result = run(tiny_model(layer), spec, tmp_path / "run")
    # The same operations in another grouping: the model divides the summed cross-entropy itself.
    assert [row["loss"] for row in result.history] == pytest.approx(expected, rel=1e-5)
    rates = [learning_rate(spec, step) for step in range(spec.steps)]
    assert [row["learning_rate"] for row in result.history] == pytest.approx(rates, rel=1e-9)
    assert rates[-1] == pytest.approx(spec.learning_rate * spec.min_learning_rate_ratio)


def test_same_seed_same_losses_other_seed_other_losses(tmp_path: Path) -> None:
    layer = MoESpec(TopK(k=2, jitter=0.1, noise=True), SwiGLU(count=4, hidden=16))

    def losses(seed: int, name: str) -> list[float]:
        spec = TrainingSpec(steps=4, batch_size=4, log_every=1, seed=seed)
        return [row["loss"] for row in run(tiny_model(layer), spec, tmp_path / name).history]

    first = losses(3, "a")
    assert first == losses(3, "b")
    assert first != losses(4, "c")


class Ragged(Sequences):
    """Sequences of which some positions are no target, more of them in some than in others."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = super().__getitem__(index)
        item["labels"][: index % 14] = -100
        return item


@pytest.mark.parametrize("kind", [Sequences, Ragged])
def test_micro_batches_add_up_to_the_batch(kind: type[Sequences], tmp_path: Path) -> None:
    layer = MoESpec(TopK(k=2), SwiGLU(count=4, hidden=16))
    data = TinyData(train=kind(40))

    def trained(parts: int) -> tuple[TrainingResult, MoEDecoderForCausalLM]:
        model = tiny_model(layer)
        spec = TrainingSpec(steps=5, batch_size=8, gradient_accumulation=parts, log_every=1)
        return run(model, spec, tmp_path / f"{parts}", data), model

    (whole, model), (parts, other) = trained(1), trained(4)
    for row, same in zip(whole.history, parts.history, strict=True):
        # float32 sums in another order
        assert same["loss"] == pytest.approx(row["loss"], rel=1e-5)
        assert same["cross_entropy"] == pytest.approx(row["cross_entropy"], rel=1e-5)
        assert same["tokens"] == row["tokens"]
        assert same["routing"]["tokens"] == row["routing"]["tokens"]
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        # Adam divides by the root of the second moment, which amplifies rounding of tiny gradients
        torch.testing.assert_close(p, q, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("parts", [1, 4])
def test_lambda_is_corrected_once_a_step_by_the_sparsity_of_the_whole_step(
    parts: int, tmp_path: Path
) -> None:
    spec = TrainingSpec(steps=15, batch_size=8, gradient_accumulation=parts, log_every=1)
    history = run(tiny_model(RELU_LAYER), spec, tmp_path / "run").history
    expected, seen = 1e-4, set()
    for row in history:
        error = (1 - 1 / 4) - row["routing"]["sparsity"]
        sign = (error > 1e-7) - (error < -1e-7)
        seen.add(sign)
        expected *= 1.2**sign
        found = row["routing"]["coefficients"]["L1Balance"]
        assert found == pytest.approx(expected, rel=1e-5)  # float32 products
        layers = row["routing"]["layers"]
        assert sum(layer["sparsity"] for layer in layers) / 2 == row["routing"]["sparsity"]
    assert seen >= {1}


@pytest.mark.parametrize("parts", [1, 4])
def test_balancing_biases_move_by_one_rate_a_step(parts: int, tmp_path: Path) -> None:
    model = tiny_model(BIAS_LAYER)
    spec = TrainingSpec(steps=6, batch_size=8, gradient_accumulation=parts, log_every=1)
    history = run(model, spec, tmp_path / "run").history
    for index, layer in enumerate(model.moe_layers):
        expected = torch.zeros(4)
        for row in history:
            load = torch.tensor(row["routing"]["layers"][index]["load"], dtype=torch.float32)
            expected += 0.01 * torch.sign(load.mean() - load)
        assert torch.equal(layer.router.correction_bias_E, expected)


@pytest.mark.parametrize("layer", [RELU_LAYER, MoESpec(Pathway(jitter=0.2), SwiGLU(4, hidden=16))])
def test_activation_checkpointing_changes_nothing(layer: MoESpec, tmp_path: Path) -> None:
    def history(on: bool) -> list[dict[str, Any]]:
        spec = TrainingSpec(steps=4, batch_size=4, log_every=1, gradient_checkpointing=on)
        return run(tiny_model(layer), spec, tmp_path / str(on)).history

    for row, same in zip(history(False), history(True), strict=True):
        assert row["loss"] == same["loss"]
        assert row["grad_norm"] == same["grad_norm"]
        assert row["routing"] == same["routing"]  # counted once, not again in the backward pass


def test_bfloat16_keeps_weights_and_controllers_in_float32(tmp_path: Path) -> None:
    def trained(precision: Any) -> tuple[MoEDecoderForCausalLM, list[dict[str, Any]]]:
        model = tiny_model(RELU_LAYER)
        spec = TrainingSpec(steps=6, batch_size=8, log_every=1, precision=precision)
        return model, run(model, spec, tmp_path / precision).history

    model, half = trained("bfloat16")
    _, full = trained("float32")
    losses, wanted = ([row["loss"] for row in rows] for rows in (half, full))
    assert losses != wanted
    assert losses == pytest.approx(wanted, rel=0.02)  # bfloat16 has 8 bits
    state = model.state_dict().values()
    assert {t.dtype for t in state if t.is_floating_point()} == {torch.float32}
    assert "forward" not in vars(model)  # autocast is taken off again
    ids = Sequences(2).ids
    assert model(input_ids=ids).logits.dtype == torch.float32


def test_statistics_name_what_happened(tmp_path: Path) -> None:
    layer = MoESpec(
        TopK(k=2),
        SwiGLU(count=4, hidden=16),
        dispatch=Capacity(factor=0.5),
        losses=(SwitchBalance(), RouterZ()),
    )
    spec = TrainingSpec(steps=7, batch_size=8, log_every=4)
    result = run(tiny_model(layer), spec, tmp_path / "run")
    assert [row["step"] for row in result.history] == [1, 4, 7]
    assert [row["tokens"] for row in result.history] == [128, 512, 896]
    for row, steps in zip(result.history, [1, 3, 3], strict=True):
        routing = row["routing"]
        assert routing["tokens"] == steps * 8 * 16
        assert routing["experts_per_token"] == 2.0
        assert routing["dropped_share"] >= 0.5
        assert 0 < routing["feed_forward_experts_per_token"] <= 2.0
        assert 1 <= routing["load_violation"] <= 4
        assert 0 < routing["entropy"] < math.log(4)
        assert [sum(layer["load"]) for layer in routing["layers"]] == [steps * 256] * 2
        weighted = 0.01 * routing["losses"]["SwitchBalance"] + 1e-3 * routing["losses"]["RouterZ"]
        assert row["loss"] == pytest.approx(row["cross_entropy"] + weighted, rel=1e-5)
    assert result.tokens == 7 * 8 * 16
    assert result.steps == 7
    assert result.seconds >= result.history[0]["seconds"] > 0
    assert result.peak_memory_bytes > 2**20
    assert result.tokens_per_second > 0


def test_a_dense_model_trains_too(tmp_path: Path) -> None:
    model = tiny_model(SwiGLU(count=1, hidden=32))
    result = run(model, TrainingSpec(steps=3, batch_size=4, log_every=1), tmp_path / "run")
    assert result.history[-1]["routing"]["layers"] == []
    assert result.history[-1]["cross_entropy"] == pytest.approx(result.history[-1]["loss"])


def test_training_learns_and_leaves_the_config_as_it_was(tmp_path: Path) -> None:
    model = tiny_model()
    spec = TrainingSpec(steps=60, batch_size=16, learning_rate=1e-2)
    result = run(model, spec, tmp_path / "run", TinyData(train=Sequences(400)))
    assert result.validation_loss < 2.0 < math.log(32) - 1
    assert model.config.use_cache  # the Trainer turns it off


def mean_nats(model: MoEDecoderForCausalLM, data: Sequences) -> float:
    """Mean negative log-likelihood in float64, one sequence at a time."""
    model = model.double().eval()
    total, count = 0.0, 0
    for item in (data[index] for index in range(len(data))):
        with torch.no_grad():
            logits = model(input_ids=item["input_ids"][None]).logits[0]
        for position, label in enumerate(item["labels"].tolist()):
            if position and label != -100:
                total -= logits[position - 1].log_softmax(-1)[label].item()
                count += 1
    return total / count


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_evaluation_is_the_mean_over_tokens_without_routing_losses(batch_size: int) -> None:
    data = Ragged(13, seed=2)
    model = tiny_model()
    model.train()
    found = evaluate(model, data, batch_size)
    assert model.training
    assert found == pytest.approx(mean_nats(model, data), rel=1e-6)


def test_evaluation_can_stop_early_and_needs_a_token() -> None:
    model = tiny_model()
    first = evaluate(model, Sequences(12), batch_size=4, max_batches=2)
    assert first == pytest.approx(mean_nats(tiny_model(), _FirstEight(12)), rel=1e-6)
    with pytest.raises(ValueError, match="no token to predict"):
        evaluate(model, Sequences(3, length=1), batch_size=2)


class _FirstEight(Sequences):
    def __len__(self) -> int:
        return 8


def test_evaluation_does_not_change_the_run(tmp_path: Path) -> None:
    layer = MoESpec(TopK(k=2, jitter=0.1), SwiGLU(count=4, hidden=16))

    def losses(every: int | None, name: str) -> list[float]:
        spec = TrainingSpec(steps=6, batch_size=4, log_every=1, eval_every=every)
        result = run(tiny_model(layer), spec, tmp_path / name)
        assert "validation_loss" in result.history[-1]
        assert result.history[-1]["validation_loss"] == result.validation_loss
        return [row["loss"] for row in result.history]

    assert losses(None, "end") == losses(2, "often")


def test_eval_batches_are_batches_of_batch_size(tmp_path: Path) -> None:
    model = tiny_model()
    spec = TrainingSpec(steps=2, batch_size=4, gradient_accumulation=2, eval_batches=2)
    result = run(model, spec, tmp_path / "run")
    expected = mean_nats(model, _FirstEight(12, seed=1))
    assert result.validation_loss == pytest.approx(expected, rel=1e-5)
