"""A loss that is not finite ends the run with one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import TinyData, tiny_model

from moekit.errors import DivergedError
from moekit.models.language import MoEDecoderForCausalLM
from moekit.training import SilentProgress, TrainingSpec, train
from moekit.training.checkpoints import checkpoints, is_whole
from moekit.training.divergence import LossWatch


@contextmanager
def poisoned(model: MoEDecoderForCausalLM, after: int, value: float) -> Iterator[None]:
    """Multiply the loss of each forward pass after the first ``after`` ones by ``value``."""
    forward, calls = model.forward, 0

    def bad(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        output = forward(*args, **kwargs)
        calls += model.training
        if model.training and calls > after:
            output.loss = output.loss * value
        return output

    model.forward = bad  # type: ignore[method-assign]
    yield


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_step_the_last_loss_and_what_to_try_are_named(
    value: float, parts: int, tmp_path: Path
) -> None:
    model = tiny_model()
    spec = TrainingSpec(
        steps=30, batch_size=4, gradient_accumulation=parts, save_every=4, log_every=5, clip=2.0
    )
    with poisoned(model, after=6 * parts, value=value), pytest.raises(DivergedError) as caught:
        train(model, TinyData(), spec, tmp_path, progress=SilentProgress())
    message = str(caught.value)
    assert message.startswith(
        "the loss stopped being finite at step 7 (the last finite loss was 3."
    )
    assert "try a lower learning_rate than 0.003, a longer warmup or clipping" in message
    assert "\n" not in message
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-4"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "run.json"]
    assert is_whole(tmp_path / "checkpoint-4")


def test_a_learning_rate_far_too_high_ends_so(tmp_path: Path) -> None:
    spec = TrainingSpec(steps=40, batch_size=4, learning_rate=1e30, log_every=1, save_every=1)
    with pytest.raises(DivergedError, match="stopped being finite at step"):
        train(tiny_model(), TinyData(), spec, tmp_path, progress=SilentProgress())
    for checkpoint in checkpoints(tmp_path):
        model = MoEDecoderForCausalLM.from_pretrained(checkpoint)
        assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_weights_are_looked_at_before_they_are_saved() -> None:
    watch = LossWatch(torch.device("cpu"), "try something else")
    model = tiny_model()
    watch.add(torch.tensor(2.5))
    watch.close_step(1)
    watch.check_weights(model, 1)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = torch.inf
    with pytest.raises(
        DivergedError,
        match=r"weights .* at step 2 \(the last finite loss was 2\.5\); try something",
    ):
        watch.check_weights(model, 2)


def test_the_first_bad_step_is_kept() -> None:
    watch = LossWatch(torch.device("cpu"), "stop")
    for step, loss in enumerate([3.0, 2.0, torch.nan, 1.0, torch.inf], start=1):
        watch.add(torch.tensor(loss))
        watch.close_step(step)
    with pytest.raises(DivergedError, match=r"at step 3 \(the last finite loss was 2\); stop"):
        watch.check()


def test_a_loss_that_never_was_finite() -> None:
    watch = LossWatch(torch.device("cpu"), "stop")
    watch.add(torch.tensor(torch.nan))
    watch.close_step(1)
    with pytest.raises(DivergedError, match=r"at step 1 \(no loss was finite\)"):
        watch.check()
