"""Runs in processes of their own: the same results, their own memory, their own deaths."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_study import DESIGNS, Watched

from moekit.compare import StudySpec, compare
from moekit.compare.apart import _processes, _Worker
from moekit.errors import DivergedError, ProcessError
from moekit.training import SilentProgress

Make = Callable[..., StudySpec]


def test_a_process_of_its_own_changes_no_number(study_spec: Make, tmp_path: Path) -> None:
    spec = study_spec(designs=DESIGNS[1:])
    here = compare(spec, tmp_path / "here", progress=Watched())
    apart = compare(spec, tmp_path / "apart", progress=Watched(), apart=True)
    (one,), (other,) = here.records, apart.records
    assert one.validation_loss == other.validation_loss
    assert one.statistics == other.statistics
    assert [row.get("loss") for row in one.history] == [row.get("loss") for row in other.history]
    # What the test's own process holds beside the run is not counted.
    assert other.peak_memory_bytes < one.peak_memory_bytes


def test_errors_and_interrupts_cross(study_spec: Make, tmp_path: Path) -> None:
    spec = study_spec(designs=DESIGNS[1:])
    wild = spec.replace(training=spec.training.replace(learning_rate=1e9, steps=30))
    with pytest.raises(DivergedError, match="stopped being finite at step"):
        compare(wild, tmp_path / "wild", progress=Watched(), apart=True)
    with pytest.raises(KeyboardInterrupt):
        compare(spec, tmp_path / "cut", progress=Watched(stop_at=(0, 5)), apart=True)
    resumed = compare(spec, tmp_path / "cut", progress=Watched())
    whole = compare(spec, tmp_path / "whole", progress=Watched())
    assert resumed.records[0].validation_loss == whole.records[0].validation_loss


class _Told(SilentProgress):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def update(self, step: int, loss: float | None, tokens_per_second: float | None) -> None:
        self.steps.append(step)


class _OddError(Exception):
    """Can be packed and not unpacked: it wants two arguments and keeps one."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one)


def _work(how: str, reporter: Any, last: int) -> int:
    """What the worker of these tests does."""
    reporter.update(last, None, None)
    if how == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "leaves":
        os._exit(3)
    if how == "oddly":
        raise _OddError("one", "two")
    if how == "memory":
        raise torch.OutOfMemoryError("no room")
    return torch.get_num_threads()


def _attended(how: str, device: str = "cpu") -> tuple[Any, list[int]]:
    told = _Told()
    with _Worker("a run", _work, (how,), (7,), _processes(device)) as worker:
        return worker.attend(told), told.steps


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_worker_returns_and_tells(device: str) -> None:
    assert _attended("well", device) == (torch.get_num_threads(), [7])


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        ("is killed", ProcessError, r"a run was killed \(SIGKILL\).*memory runs out"),
        ("leaves", ProcessError, "ended with code 3"),
        ("oddly", RuntimeError, "_OddError: one"),
        ("memory", torch.OutOfMemoryError, "no room"),
    ],
)
def test_how_a_worker_can_end(how: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        _attended(how)


def _environment(name: str, _: Any) -> str | None:
    return os.environ.get(name)


def test_a_worker_has_the_environment_of_today(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of when the server was started."""
    for value in ("one", None, "two"):
        if value is None:
            monkeypatch.delenv("MOEKIT_TEST_WORKER")
        else:
            monkeypatch.setenv("MOEKIT_TEST_WORKER", value)
        name = ("MOEKIT_TEST_WORKER",)
        with _Worker("a run", _environment, name, (), _processes("cpu")) as worker:
            assert worker.attend(SilentProgress()) == value


def test_an_interrupt_while_a_worker_starts_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = _Worker("a run", _work, ("well",), (7,), _processes("cpu"))
    start = worker._process.start

    def interrupted() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        start()

    monkeypatch.setattr(worker._process, "start", interrupted)
    with pytest.raises(KeyboardInterrupt), worker:
        pass
    assert worker._process.pid is None or worker._process.exitcode is not None
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, set())
