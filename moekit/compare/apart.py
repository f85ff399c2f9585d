"""A run in a process of its own, so that what it holds in memory is its own too.

Libraries keep caches from run to run in one process, and the peak of a later run would then count
what earlier ones left. A run that the system kills for lack of memory also leaves the study alive.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from transformers.utils import logging

from moekit.compare.design import Design
from moekit.compare.model import ModelSpec
from moekit.compare.record import RunRecord
from moekit.compare.run import RunPlace, run_design
from moekit.data import TextData
from moekit.errors import MoekitError, ProcessError
from moekit.training import ProgressReporter, TrainingSpec


def run_apart(
    design: Design,
    model_spec: ModelSpec,
    training: TrainingSpec,
    data: TextData,
    place: RunPlace,
    reporter: ProgressReporter,
    device: str = "cpu",
    report_to: Sequence[str] = (),
) -> RunRecord:
    """:func:`~moekit.compare.run.run_design` in a fresh process; the reporter stays in this one.

    Raises:
        ProcessError: the process ended without a result, as when the system kills it.
        MoekitError: what ``run_design`` raised there.
    """
    name = f"{design.name}, seed {training.seed}"
    arguments = (design, model_spec, training, data, place)

    with _Worker(name, run_design, arguments, (device, report_to), _processes(device)) as worker:
        return worker.attend(reporter)


def _processes(device: str) -> BaseContext:
    """Where processes come from that have nothing of this one's.

    On a CPU they are forked off a server that has imported what a run needs and done nothing else,
    which saves each of them the seconds of that. One that uses a GPU may not be: a library that
    looks for GPUs when it is imported leaves them out of a fork's reach.
    """
    if sys.platform != "linux" or torch.device(device).type != "cpu":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


@dataclass(frozen=True)
class _Settings:
    """What a process sets for itself and does not hand to one that it spawns."""

    threads: int
    verbosity: int
    environment: dict[str, str]

    @classmethod
    def present(cls) -> _Settings:
        return cls(torch.get_num_threads(), logging.get_verbosity(), dict(os.environ))

    def apply(self) -> None:
        os.environ.clear()  # a server's is that of when it started
        os.environ.update(self.environment)
        torch.set_num_threads(self.threads)
        logging.set_verbosity(self.verbosity)
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # the reporter tells


def _serve(processes: BaseContext) -> None:
    """See that the server runs and has imported what it should, which an interrupt may end."""
    with _interrupts_kept_here():
        forkserver.ensure_running()
    first: BaseProcess = processes.Process(target=_nothing)  # type: ignore[attr-defined]
    first.start()
    first.join()


def _nothing() -> None:
    """What a process does that only shows that there are some."""


class _Worker:
    """A process that calls ``function(*before, reporter, *after)``; a context manager."""

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        before: Sequence[Any],
        after: Sequence[Any],
        processes: BaseContext,
    ) -> None:
        self._name = name
        self._processes = processes
        self._receiver, self._sender = processes.Pipe(duplex=False)
        given = (self._sender, _Settings.present(), function, tuple(before), tuple(after))
        self._process: BaseProcess = processes.Process(target=_work, args=given)  # type: ignore[attr-defined]

    def __enter__(self) -> _Worker:
        try:
            if self._processes.get_start_method() == "forkserver":
                _serve(self._processes)
            with _interrupts_kept_here():
                self._process.start()
        except BaseException:
            self.__exit__()
            raise
        self._sender.close()  # so that the other end's closing is seen
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.pid is not None:
            self._process.terminate()  # does nothing to a process that has ended
            self._process.join()
        self._receiver.close()

    def attend(self, reporter: ProgressReporter) -> Any:
        """Pass its progress on until it has a result."""
        while True:
            try:
                what, content = self._receiver.recv()
            except EOFError:
                self._process.join()
                raise ProcessError(self._ending()) from None
            if what == "result":
                return content
            if what == "error":
                raise content
            getattr(reporter, what)(*content)

    def _ending(self) -> str:
        code = self._process.exitcode or 0
        if code < 0:
            return (
                f"the process of {self._name} was killed ({signal.Signals(-code).name}), as a "
                "system does when memory runs out; give it more, use a smaller batch or a smaller "
                "model, and run the same again to go on"
            )
        return f"the process of {self._name} ended with code {code} and no result; see above why"


class _Remote:
    """A :class:`ProgressReporter` that tells the process which waits."""

    def __init__(self, sender: Connection[Any, Any]) -> None:
        self._sender = sender

    def start(self, total: int, description: str) -> None:
        self._sender.send(("start", (total, description)))

    def update(self, step: int, loss: float | None, tokens_per_second: float | None) -> None:
        self._sender.send(("update", (step, loss, tokens_per_second)))

    def finish(self) -> None:
        self._sender.send(("finish", ()))


def _work(
    sender: Connection[Any, Any],
    settings: _Settings,
    function: Callable[..., Any],
    before: Sequence[Any],
    after: Sequence[Any],
) -> None:
    """The life of the process. If nobody listens any more, its next word ends it."""
    _keep_interrupts_out()  # a server that somebody else started lets them in
    settings.apply()
    try:
        message = ("result", function(*before, _Remote(sender), *after))
    except BrokenPipeError:
        return
    except Exception as error:  # whatever it is, it is the waiting process's to show
        message = ("error", _portable(error))
    sender.send(message)


def _portable(error: Exception) -> Exception:
    """The error as it can be sent, with the trace that a defect needs."""
    if isinstance(error, MoekitError):
        return error
    error.add_note(f"in the process of the run:\n{traceback.format_exc()}")
    try:
        return pickle.loads(pickle.dumps(error))  # some can be packed and not unpacked
    except Exception:
        return RuntimeError("".join(traceback.format_exception_only(error)).strip())


def _keep_interrupts_out() -> None:
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


@contextlib.contextmanager
def _interrupts_kept_here() -> Iterator[None]:
    """A process started meanwhile never gets control-C: the one that waits for it ends it."""
    if sys.platform == "win32":  # where a new process has no mask to inherit
        yield
        return
    resource_tracker.ensure_running()  # whose start would let signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
