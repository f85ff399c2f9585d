"""How far experts may be reduced before a natively small model is better (UNCURL's question).

Sarkar et al. 2024 (arXiv 2409.01483) train models that differ in their number of experts alone,
reduce the large ones for a task, tune all of them on it, and ask up to which factor a reduced model
matches the native one of its size. That factor depends on the number of experts before.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from moekit.errors import SpecError
from moekit.measure.observe import TokenBlocks
from moekit.surgery.methods import Method
from moekit.surgery.prune import prune_model
from moekit.surgery.recorder import record_model
from moekit.surgery.statistics import BlockStatistics, Needs
from moekit.surgery.view import block_views

NATIVE = "native"


@dataclass(frozen=True)
class FactorRow:
    """One model on the task.

    Attributes:
        method: ``native``, or the name of a method.
        experts: experts a block that the model was trained with.
        left: experts a block that it has.
        seed: which family of models.
        before, loss: loss on the task before and after tuning.
    """

    method: str
    experts: int
    left: int
    seed: int
    before: float
    loss: float

    @property
    def factor(self) -> float:
        """How many times fewer experts it has than it was trained with."""
        return self.experts / self.left


@dataclass(frozen=True)
class Threshold:
    """What a method allows for one number of experts.

    Attributes:
        method: its name.
        experts: experts a block before.
        factor: the largest factor whose reduced model is no worse than the native one of its size
            by more than the tolerance, in the mean over seeds; 1 if none is.
        gaps: loss of the reduced minus that of the native model, a list over seeds by factor.
    """

    method: str
    experts: int
    factor: float
    gaps: dict[float, list[float]]


def pruning_factor_study(
    models: Mapping[int, PreTrainedModel],
    methods: Mapping[str, Method],
    task: TokenBlocks,
    tune: Callable[[PreTrainedModel], None],
    loss: Callable[[PreTrainedModel], float],
    *,
    batch_size: int = 8,
    seed: int = 0,
    done: Callable[[FactorRow], None] | None = None,
) -> list[FactorRow]:
    """Every model of a family reduced to every smaller size of it, and tuned, beside the natives.

    Args:
        models: models that differ in their experts alone, by experts a block; left as they are.
        methods: how experts are reduced, by name; each calibrates on the task.
        task: text of the task.
        tune: trains a model on the task in place; the same for all.
        loss: of a model on held-out text of the task.
        batch_size: blocks of calibration that run together.
        seed: which family this is; also draws what calibration samples.
        done: told each row.

    Raises:
        SpecError: fewer than two sizes, a model of another number of experts than its key, or a
            method that does not fit.
        DataError: the task has no token.
    """
    _check(models, methods)
    needs = Needs()
    for method in methods.values():
        needs = needs | method.needs
    rows = []
    for experts, model in sorted(models.items(), reverse=True):
        statistics_ = record_model(model, task, needs, batch_size=batch_size, seed=seed)
        smaller = sorted((left for left in models if left < experts), reverse=True)
        for name, left, made in _made(experts, model, methods, smaller, statistics_):
            before = loss(made)
            tune(made)
            rows.append(FactorRow(name, experts, left, seed, before, loss(made)))
            if done is not None:
                done(rows[-1])
    return rows


def thresholds(
    rows: Sequence[FactorRow], method: str, tolerance: float = 0.0, *, tuned: bool = True
) -> list[Threshold]:
    """The largest factor that a method allows for each number of experts, largest first.

    Args:
        rows: of :func:`pruning_factor_study`, of any number of families.
        method: which method.
        tolerance: loss that a reduced model may have more than the native one.
        tuned: whether losses are compared after tuning.

    Raises:
        SpecError: no row is of that method, a row or the native model of a size is missing for
            some seed, there are several of one, or a loss is NaN.
    """
    native = {(r.left, r.seed): _loss(r, tuned) for r in rows if r.method == NATIVE}
    own = [row for row in rows if row.method == method and row.method != NATIVE]
    _check_rows(own, native, method)
    found = []
    for experts in sorted({row.experts for row in own}, reverse=True):
        gaps: dict[float, list[float]] = {}
        for row in sorted((r for r in own if r.experts == experts), key=lambda r: r.factor):
            gap = _loss(row, tuned) - native[row.left, row.seed]
            gaps.setdefault(row.factor, []).append(gap)
        allowed = [f for f, values in gaps.items() if statistics.fmean(values) <= tolerance]
        found.append(Threshold(method, experts, max(allowed, default=1.0), gaps))
    return found


def _made(
    experts: int,
    model: PreTrainedModel,
    methods: Mapping[str, Method],
    smaller: Sequence[int],
    statistics_: Sequence[BlockStatistics],
) -> Iterator[tuple[str, int, PreTrainedModel]]:
    yield NATIVE, experts, copy.deepcopy(model)
    for left in smaller:
        for name, method in methods.items():
            counts = [left] * len(statistics_)
            yield name, left, prune_model(model, method, counts, statistics_)[0]


def _loss(row: FactorRow, tuned: bool) -> float:
    found = row.loss if tuned else row.before
    if math.isnan(found):
        raise SpecError(
            f"the loss of {row.method} with {row.left} of {row.experts} experts, seed {row.seed}, "
            "is NaN; measure it again"
        )
    return found


def _check_rows(
    own: Sequence[FactorRow], native: Mapping[tuple[int, int], float], method: str
) -> None:
    if not own:
        raise SpecError(f"no row is of {method!r}")
    missing = sorted({(row.left, row.seed) for row in own} - set(native))
    if missing:
        raise SpecError(
            f"there is no native model of {missing[0][0]} experts, seed {missing[0][1]}"
        )
    seeds = {row.seed for row in own}
    times = Counter((row.experts, row.left, row.seed) for row in own)
    for experts, left in sorted({(row.experts, row.left) for row in own}):
        for seed in sorted(seeds):
            if times[experts, left, seed] != 1:
                raise SpecError(
                    f"{times[experts, left, seed]} rows are of {method!r} with {left} of {experts} "
                    f"experts, seed {seed}; give one for each seed"
                )


def _check(models: Mapping[int, PreTrainedModel], methods: Mapping[str, Method]) -> None:
    if len(models) < 2:
        raise SpecError(f"got models of {len(models)} size; a threshold needs two sizes or more")
    if NATIVE in methods:
        raise SpecError(
            f"a method is called {NATIVE!r}, which are the models themselves; rename it"
        )
    for experts, model in models.items():
        have = {view.experts for view in block_views(model)}
        if have != {experts}:
            raise SpecError(
                f"the model for {experts} experts has {', '.join(map(str, sorted(have)))} a block"
            )
