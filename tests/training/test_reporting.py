"""Progress bars and trackers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_training import TinyData, tiny_model
from transformers import TrainingArguments

from moekit import L1Balance, MoESpec, ReLURouting, SwiGLU, TopK
from moekit.errors import MissingExtraError
from moekit.training import MoETrainer, RichProgress, SilentProgress, TrainingSpec, bars, train
from moekit.training import arguments as arguments_module

LAYERS = [
    MoESpec(ReLURouting(k=1), SwiGLU(count=4, hidden=16), losses=(L1Balance(k=1),)),
    MoESpec(TopK(k=2), SwiGLU(count=4, hidden=16)),
]
SPEC = TrainingSpec(steps=4, batch_size=4, log_every=2, eval_every=2)


class Recorder:
    """A reporter that keeps what it was told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def start(self, total: int, description: str) -> None:
        self.calls.append(("start", total, description))

    def update(self, step: int, loss: float | None, tokens_per_second: float | None) -> None:
        self.calls.append(("update", step, loss))

    def finish(self) -> None:
        self.calls.append(("finish",))


def test_a_reporter_is_told_each_step(tmp_path: Path) -> None:
    recorder = Recorder()
    result = train(tiny_model(), TinyData(), SPEC, tmp_path, progress=recorder, description="tiny")
    assert recorder.calls[0] == ("start", 4, "tiny")
    assert recorder.calls[-1] == ("finish",)
    updates = recorder.calls[1:-1]
    assert [step for _, step, _ in updates] == sorted(step for _, step, _ in updates)
    assert {step for _, step, _ in updates} == {1, 2, 3, 4}
    assert updates[-1][2] == result.history[-1]["loss"]


def test_a_reporter_is_told_of_an_early_end(tmp_path: Path) -> None:
    class Impatient(Recorder):
        def update(self, step: int, loss: float | None, tokens_per_second: float | None) -> None:
            raise KeyboardInterrupt

    recorder = Impatient()
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model(), TinyData(), SPEC, tmp_path, progress=recorder)
    assert recorder.calls[-1] == ("finish",)


def test_without_a_terminal_few_plain_lines_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny_model(), TinyData(), SPEC, tmp_path)
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("training: step 4/4, loss 3.")
    assert line.endswith("tokens/s, done")


def test_lines_tell_the_remaining_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("moekit.training.progress.time.monotonic", lambda: now)
    progress = RichProgress(bars(Console(file=io.StringIO())))
    progress.start(20, "run")
    for step in range(11, 16):  # resumed after step 10
        now += 4.0
        progress.update(step, 2.5, 1234.5)
    progress.finish()
    lines = capsys.readouterr().err.splitlines()
    # 12 s for 3 steps, 7 to go
    assert lines == [
        "run: step 13/20, loss 2.500, 1,234 tokens/s, 0:28 left",
        "run: step 15/20, loss 2.500, 1,234 tokens/s, stopped",
    ]


def test_on_a_terminal_a_bar_shows_loss_and_speed() -> None:
    out = io.StringIO()
    shared = bars(Console(file=out, force_terminal=True, width=120))
    with shared:
        progress = RichProgress(shared)
        progress.start(8, "first of two")
        progress.update(4, 3.25, 2000.0)
        shared.refresh()
        assert [task.completed for task in shared.tasks] == [4]
        progress.finish()
        assert not shared.tasks
    assert "first of two" in out.getvalue()
    assert "4/8" in out.getvalue()
    assert "loss 3.250" in out.getvalue()
    assert "2,000 tokens/s" in out.getvalue()


def test_tensorboard_gets_every_figure(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = tiny_model(LAYERS)
    progress = SilentProgress()
    result = train(model, TinyData(), SPEC, tmp_path, progress=progress, report_to=("tensorboard",))
    (events,) = tmp_path.glob("runs/*/events*")
    found = EventAccumulator(str(events)).Reload()
    tags = found.Tags()["scalars"]
    for name in (
        "train/loss",
        "train/cross_entropy",
        "train/routing/load_violation",
        "train/routing/entropy",
        "train/routing/dropped_share",
        "train/routing/feed_forward_experts_per_token",
        "train/routing/sparsity",
        "train/routing/L1Balance",
        "train/routing/L1Balance/coefficient",
        "train/layers/0/load/3",
        "train/layers/1/load_violation",
        "eval/loss",
    ):
        assert name in tags
    losses = {event.step: event.value for event in found.Scalars("train/loss")}
    logged = {row["step"]: row["loss"] for row in result.history if "loss" in row}
    assert losses == pytest.approx(logged)
    loads = [event.value for event in found.Scalars("train/layers/0/load/3")]
    assert loads == [row["routing"]["layers"][0]["load"][3] for row in result.history]


@pytest.mark.slow
def test_wandb_gets_the_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    try:
        train(
            tiny_model(LAYERS),
            TinyData(),
            SPEC,
            tmp_path / "run",
            progress=SilentProgress(),
            report_to=("wandb",),
        )
        summary = dict(wandb.run.summary)
    finally:
        wandb.finish()
    assert "train/routing/L1Balance/coefficient" in summary
    assert "eval/loss" in summary
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.parametrize(
    ("tracker", "said"),
    [
        ("wandb", r"wandb, which is not installed .*; run pip install 'moekit\[tracking\]'"),
        ("mlflow", "mlflow, which is not installed or not set up; install it or leave it out"),
        ("flyte", "flyte, which is not installed"),
    ],
)
def test_a_tracker_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: str, said: str
) -> None:
    monkeypatch.setattr(arguments_module, "get_available_reporting_integrations", list)
    monkeypatch.setattr(arguments_module, "is_flytekit_available", lambda: False)
    with pytest.raises(MissingExtraError, match=said):
        train(tiny_model(), TinyData(), SPEC, tmp_path / "run", report_to=(tracker,))
    assert not (tmp_path / "run").exists()


def test_the_trainer_also_works_by_itself(tmp_path: Path) -> None:
    """With ordinary arguments: epochs, an evaluation of several sets, metrics, the best model."""
    data = TinyData()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=2,
        per_device_train_batch_size=8,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=1e-2,
        save_total_limit=1,
    )
    trainer = MoETrainer(
        tiny_model(), arguments, train_dataset=data.train, eval_dataset=data.validation
    )
    trainer.train()
    rows = trainer.state.log_history
    assert [row["step"] for row in rows if "eval_loss" in row] == [5, 10]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-10")
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-10"]
    several = trainer.evaluate({"a": data.validation, "b": data.train})
    assert several["eval_a_loss"] == pytest.approx(trainer.evaluate()["eval_loss"])
    assert several["eval_b_loss"] < 3.4


def test_metrics_of_predictions_are_the_base_classs(tmp_path: Path) -> None:
    data = TinyData()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True
    )
    trainer = MoETrainer(
        tiny_model(),
        arguments,
        eval_dataset=data.validation,
        compute_metrics=lambda prediction: {"shape": float(prediction.predictions.shape[-1])},
    )
    metrics = trainer.evaluate()
    assert metrics["eval_shape"] == 32.0
    plain = MoETrainer(tiny_model(), arguments, eval_dataset=data.validation)
    # the base class averages over batches, all of the same number of tokens here
    assert metrics["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)
