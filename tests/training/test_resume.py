"""Checkpoints: whole or absent, and a resumed run is the uninterrupted one."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from resume_cases import DATA, LAYERS, SPEC, model
from safetensors.torch import load_file
from tiny_training import Sequences, TinyData, tiny_model
from transformers import AutoModelForCausalLM, TrainerCallback

from moekit.errors import CheckpointError, OutputError
from moekit.models.language import MoEDecoderForCausalLM
from moekit.training import MoETrainer, SilentProgress, TrainingResult, train
from moekit.training.checkpoints import STAGING, checkpoints, is_whole, last_whole

FOLDER = Path(__file__).parent
NOT_REPRODUCIBLE = ("seconds", "tokens_per_second", "validation_seconds")


def run(output: Path, spec: Any = SPEC, **options: Any) -> TrainingResult:
    return train(model(), DATA, spec, output, progress=SilentProgress(), **options)


def comparable(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in NOT_REPRODUCIBLE} for row in history]


def weights(result: TrainingResult) -> dict[str, torch.Tensor]:
    return load_file(result.checkpoint / "model.safetensors")


def assert_same_run(result: TrainingResult, other: TrainingResult) -> None:
    """Equal to the last bit: losses, statistics, λ, weights, biases."""
    assert comparable(result.history) == comparable(other.history)
    ours, theirs = weights(result), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    return run(tmp_path_factory.mktemp("run") / "whole")


class Interrupt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [4, 7, 15])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    step: int, uninterrupted: TrainingResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = MoETrainer.__init__

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.add_callback(Interrupt(step))

    with monkeypatch.context() as patch:
        patch.setattr(MoETrainer, "__init__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    assert checkpoints(tmp_path)[-1].name == f"checkpoint-{step // 4 * 4}"
    assert_same_run(run(tmp_path), uninterrupted)


@pytest.mark.parametrize(
    ("moment", "last"),
    [
        ("step:6", 4),
        pytest.param("save:8:model.safetensors", 4, marks=pytest.mark.slow),
        ("save:8:optimizer.pt", 4),
        pytest.param("rename:12", 8, marks=pytest.mark.slow),
        pytest.param("save:4:rng_state.pth", None, marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_without_warning_resumes_from_its_last_whole_checkpoint(
    moment: str, last: int | None, uninterrupted: TrainingResult, tmp_path: Path
) -> None:
    script = [sys.executable, str(FOLDER / "killed_run.py"), str(tmp_path), moment]
    path = os.pathsep.join([str(FOLDER), *sys.path])
    done = subprocess.run(
        script, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True
    )
    assert done.returncode == -9, done.stderr.decode()
    found = last_whole(tmp_path)
    assert (None if found is None else found.name) == (last and f"checkpoint-{last}")
    assert all(is_whole(path) for path in checkpoints(tmp_path))
    if not moment.startswith("step"):
        assert any((tmp_path / STAGING).iterdir())  # it was killed in the middle of a save
    assert_same_run(run(tmp_path), uninterrupted)
    assert not (tmp_path / STAGING).exists()


def test_a_finished_run_returns_its_result_again(
    uninterrupted: TrainingResult, tmp_path: Path
) -> None:
    shutil.copytree(uninterrupted.checkpoint.parent, tmp_path / "copy")
    again = run(tmp_path / "copy")
    assert again.history == uninterrupted.history
    assert again.tokens_per_second == uninterrupted.tokens_per_second
    assert again.steps == SPEC.steps


def test_a_damaged_checkpoint_is_passed_over(uninterrupted: TrainingResult, tmp_path: Path) -> None:
    shutil.copytree(uninterrupted.checkpoint.parent, tmp_path / "copy")
    first, last = checkpoints(tmp_path / "copy")
    assert [first.name, last.name] == ["checkpoint-12", "checkpoint-16"]
    os.truncate(last / "model.safetensors", 1000)
    assert last_whole(tmp_path / "copy") == first
    assert_same_run(run(tmp_path / "copy"), uninterrupted)


@pytest.mark.parametrize(
    "name",
    ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"],
)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
def test_damage_is_noticed(
    name: str, damage: str, uninterrupted: TrainingResult, tmp_path: Path
) -> None:
    copy = shutil.copytree(uninterrupted.checkpoint, tmp_path / "checkpoint-16")
    assert is_whole(copy)
    if damage == "missing":
        (copy / name).unlink()
    else:
        os.truncate(copy / name, 0 if damage == "empty" else (copy / name).stat().st_size - 30)
    assert not is_whole(copy)


def test_a_checkpoint_holds_router_state_and_nothing_that_runs_code(
    uninterrupted: TrainingResult,
) -> None:
    folder = uninterrupted.checkpoint
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "trainer_state.json",
        "training_args.json",
    ]
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(folder / name, weights_only=True)  # refuses any other object
    loaded = MoEDecoderForCausalLM.from_pretrained(folder)
    bias_E = loaded.moe_layers[0].router.correction_bias_E
    assert bias_E.abs().max() >= 0.01
    logged = uninterrupted.history[-1]["routing"]["coefficients"]["L1Balance"]
    assert loaded.routing_losses.coefficients()["L1Balance"].item() == logged
    assert logged != pytest.approx(1e-3)  # λ has moved


def test_transformers_loads_the_checkpoint(uninterrupted: TrainingResult) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(uninterrupted.checkpoint)
    assert loaded.config.use_cache
    saved = weights(uninterrupted)
    state = loaded.state_dict()
    assert all(torch.equal(state[name], value) for name, value in saved.items())


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run(tmp_path, SPEC.replace(keep=1, save_every=3))
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-16"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": 1e-4}, "learning_rate"),
        ({"steps": 20}, "steps"),
        ({"seed": 3, "clip": 2.0}, "clip, seed"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(
    change: dict[str, Any], named: str, uninterrupted: TrainingResult
) -> None:
    with pytest.raises(CheckpointError, match=f"another training, which differs in {named};"):
        run(uninterrupted.checkpoint.parent, SPEC.replace(**change))


def test_another_model_or_other_data_in_the_same_folder_is_refused(
    uninterrupted: TrainingResult,
) -> None:
    output = uninterrupted.checkpoint.parent
    other = tiny_model([LAYERS[0], LAYERS[0]])
    with pytest.raises(CheckpointError, match="another model, which differs in layers"):
        train(other, DATA, SPEC, output, progress=SilentProgress())
    other_data = TinyData(train=Sequences(41, seed=3))
    with pytest.raises(CheckpointError, match="another data, which differs in"):
        train(model(), other_data, SPEC, output, progress=SilentProgress())


def test_how_often_it_reports_may_change_on_resume(
    uninterrupted: TrainingResult, tmp_path: Path
) -> None:
    shutil.copytree(uninterrupted.checkpoint.parent, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "checkpoint-16")
    spec = SPEC.replace(log_every=1, eval_every=5, keep=3, save_every=2)
    result = run(tmp_path / "copy", spec)
    assert [row["step"] for row in result.history][-4:] == [13, 14, 15, 16]
    ours, theirs = weights(result), weights(uninterrupted)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_not_resuming_into_a_used_folder_is_refused(uninterrupted: TrainingResult) -> None:
    with pytest.raises(OutputError, match="checkpoint-16 of an earlier run"):
        run(uninterrupted.checkpoint.parent, resume=False)


def test_checkpoints_without_their_record_are_refused(
    uninterrupted: TrainingResult, tmp_path: Path
) -> None:
    shutil.copytree(uninterrupted.checkpoint, tmp_path / "checkpoint-16")
    with pytest.raises(CheckpointError, match=r"no readable run\.json"):
        run(tmp_path)


def test_weights_of_another_shape_are_refused_by_name(
    uninterrupted: TrainingResult, tmp_path: Path
) -> None:
    output = shutil.copytree(uninterrupted.checkpoint.parent, tmp_path / "copy")
    wide = tiny_model(LAYERS, num_attention_heads=2, hidden_size=32)
    record = json.loads((output / "run.json").read_text())
    config = json.loads(wide.config.to_json_string(use_diff=False))
    record["model"] = {name: config[name] for name in record["model"]}
    (output / "run.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"is of another model .*size mismatch"):
        train(wide, DATA, SPEC, output, progress=SilentProgress())


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def full(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if "checkpoint-8" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OutputError, match="No space left on device; free some space") as caught:
        run(tmp_path)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "run.json"]
    assert is_whole(tmp_path / "checkpoint-4")


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write to .*: File exists; give another folder"):
        run(tmp_path / "file")
