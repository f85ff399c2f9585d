"""Tasks of EleutherAI's lm-evaluation-harness, on a model that is in memory."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from moekit.errors import MissingExtraError, SpecError


def require_harness() -> None:
    """Refuse to go on where lm-eval is not installed.

    Raises:
        MissingExtraError: it is not.
    """
    if find_spec("lm_eval") is None:
        raise MissingExtraError(
            "tasks are run by lm-evaluation-harness, which is not installed; "
            "pip install 'moekit[evaluation]'"
        )


def harness_scores(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    batch_size: int = 8,
    limit: int | None = None,
    folder: Path | None = None,
) -> dict[str, dict[str, float]]:
    """The harness's numbers by task and metric, ``acc`` and ``acc_stderr`` for one.

    Args:
        tasks: names of the harness's tasks; their data come from where it takes them.
        limit: items a task at most.
        folder: tasks of the user's own, as the harness's ``--include_path``.

    Raises:
        MissingExtraError: lm-eval is not installed.
        SpecError: it has no such task.
    """
    require_harness()
    evaluator, huggingface = import_module("lm_eval"), import_module("lm_eval.models.huggingface")
    manager = import_module("lm_eval.tasks").TaskManager(
        include_path=None if folder is None else str(folder)
    )
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown or not tasks:
        raise SpecError(f"lm-evaluation-harness has no task {', '.join(unknown) or '(none given)'}")
    wrapped = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = evaluator.simple_evaluate(
        model=wrapped, tasks=list(tasks), limit=limit, task_manager=manager
    )
    return {
        task: {
            name.removesuffix(",none"): float(value)  # "acc,none": the metric and its filter
            for name, value in metrics.items()
            if "," in name and isinstance(value, int | float)
        }
        for task, metrics in found["results"].items()
    }
