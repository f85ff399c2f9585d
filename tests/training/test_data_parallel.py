"""Two processes under torchrun train like one process on the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from distributed_run import CASES, run_case

from moekit.errors import SpecError
from moekit.training import TrainingSpec
from moekit.training.checkpoints import checkpoints, is_whole

FOLDER = Path(__file__).parent


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that two gloo processes wrote to."""
    output = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(FOLDER / "distributed_run.py"), str(output)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(FOLDER), *sys.path]),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return output


def read(folder: Path, case: str, rank: int) -> Any:
    return json.loads((folder / f"{case}.{rank}.json").read_text())


@pytest.mark.parametrize("case", list(CASES))
def test_two_processes_train_like_one(case: str, two_processes: Path, tmp_path: Path) -> None:
    one = run_case(case, tmp_path)
    two = read(two_processes, case, 0)
    for row, same in zip(one["history"], two["history"], strict=True):
        # float32 sums over 128 tokens in another order
        for name in ("loss", "cross_entropy"):
            assert same[name] == pytest.approx(row[name], rel=1e-6)
        # The norm also adds up rounding of the backward pass.
        assert same["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-4)
        assert same["learning_rate"] == row["learning_rate"]
        assert same["tokens"] == row["tokens"]
        assert same["routing"]["tokens"] == row["routing"]["tokens"]
        # the same tokens go to the same experts, in sum over the processes
        loads, others = ([layer["load"] for layer in r["routing"]["layers"]] for r in (row, same))
        assert loads == others
        assert same["routing"]["losses"] == pytest.approx(row["routing"]["losses"], rel=1e-5)
        assert same["routing"]["coefficients"] == row["routing"]["coefficients"]
        assert ("validation_loss" in row) == ("validation_loss" in same)
        if "validation_loss" in row:
            assert same["validation_loss"] == pytest.approx(row["validation_loss"], rel=1e-5)
    assert two["buffers"] == one["buffers"]  # biases and λ
    assert two["whole"] == pytest.approx(one["whole"], rel=1e-5)


@pytest.mark.parametrize("case", list(CASES))
def test_processes_agree(case: str, two_processes: Path) -> None:
    first, second = read(two_processes, case, 0), read(two_processes, case, 1)
    assert first["logits"] == second["logits"]
    assert first["buffers"] == second["buffers"]
    assert first["whole"] == second["whole"]
    losses = [[row["loss"] for row in found["history"]] for found in (first, second)]
    assert losses[0] == losses[1]


def test_checkpoints_of_two_processes_are_whole(two_processes: Path) -> None:
    for case in CASES:
        (checkpoint,) = checkpoints(two_processes / case)
        assert is_whole(checkpoint)
        names = {path.name for path in checkpoint.iterdir()}
        assert {"rng_state_0.pth", "rng_state_1.pth"} <= names


@pytest.mark.parametrize("rank", [0, 1])
def test_an_interrupted_run_of_two_processes_resumes_exactly(
    rank: int, two_processes: Path
) -> None:
    found = read(two_processes, "interrupted", rank)
    assert found["resumed"] == found["whole"]


def test_all_processes_end_when_one_diverges(two_processes: Path) -> None:
    messages = [read(two_processes, "diverge", rank) for rank in (0, 1)]
    assert all("stopped being finite at step 1" in message for message in messages)
    assert not checkpoints(two_processes / "diverge")


def test_a_batch_that_cannot_be_split_is_refused() -> None:
    with pytest.raises(SpecError, match="over 3 processes"):
        TrainingSpec(batch_size=8).micro_batch(3)
