"""Fewer experts: calibrate, plan, write, and compare with what was before."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from moekit.data import ProgressHook
from moekit.errors import CheckpointError, SpecError
from moekit.measure.observe import TokenBlocks
from moekit.surgery.apply import needs_own_class, pruned_model, write_pruned
from moekit.surgery.blockwise import BlockwiseModel
from moekit.surgery.budget import Budget, StoredSizes, require_spreadable, spread
from moekit.surgery.checkpoint import Checkpoint, local_folder
from moekit.surgery.evaluate import Evaluation, evaluate
from moekit.surgery.methods import Method
from moekit.surgery.plan import BlockPlan, kept
from moekit.surgery.recorder import record
from moekit.surgery.shards import beside, require_free, take_name
from moekit.surgery.statistics import BlockStatistics
from moekit.surgery.view import BlockView, block_views


@dataclass(frozen=True)
class PrunedBlock:
    """What became of one block.

    Attributes:
        name: path of the block.
        experts_before, experts: number of experts.
        kept: old experts that the new ones descend from.
        similarity: for each removed expert the largest cosine of its output with that of a kept
            one, in the mean over sampled tokens; and of those the mean. None if none was removed.
        passed_on: share of the removed experts' part that passes to others.
    """

    name: str
    experts_before: int
    experts: int
    kept: tuple[int, ...]
    similarity: float | None
    passed_on: float | None


@dataclass(frozen=True)
class PruneReport:
    """What was done and what it changed.

    Attributes:
        method: the method with its settings, as JSON values.
        ordinary: whether the result is an ordinary checkpoint of its architecture, or one of
            :class:`~moekit.surgery.pruned.PrunedMoEForCausalLM`.
        calibration_tokens: tokens that the statistics are of.
        before, after: measured on the held-out text; None without.
        blocks: each MoE block.
    """

    method: dict[str, Any]
    ordinary: bool
    calibration_tokens: int
    before: Evaluation | None
    after: Evaluation | None
    blocks: tuple[PrunedBlock, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        plain = dataclasses.asdict(self)
        for side in ("before", "after"):
            found: Evaluation | None = getattr(self, side)
            if found is not None:
                plain[side]["perplexity"] = found.perplexity
        return plain


def prune(
    checkpoint: str | Path,
    output: Path,
    method: Method,
    budget: Budget,
    calibration: TokenBlocks,
    held_out: TokenBlocks | None = None,
    *,
    batch_size: int = 8,
    max_batches: int | None = None,
    held_out_batches: int | None = None,
    device: str = "cpu",
    seed: int = 0,
    progress: ProgressHook | None = None,
    finish: Callable[[Path, PruneReport], None] | None = None,
) -> PruneReport:
    """Write a checkpoint with fewer experts; the old one is only read.

    Memory is about that of one block, see :func:`~moekit.surgery.record`. What calibration has done
    is kept beside ``output`` until that is there, so that the same call goes on after an
    interruption. ``output`` appears when it is complete and has been compared.

    Args:
        checkpoint: folder or hub name of the model.
        output: folder for the result.
        method: how experts are chosen, merged or recombined.
        budget: how many are left.
        calibration: text that the statistics are taken from.
        held_out: other text, to compare before and after.
        batch_size: blocks of text that run together.
        max_batches: use at most so many batches to calibrate.
        held_out_batches: use at most so many batches to compare.
        device: where to run the model.
        seed: draws the sample of tokens that experts are compared on.
        progress: told how far it is.
        finish: given the finished folder and the report before the folder takes the name
            ``output``; what it writes there comes with it.

    Raises:
        CheckpointError: the checkpoint is missing, incomplete, damaged or not finite.
        SpecError: method or budget do not fit the model.
        OutputError: ``output`` is there already, or cannot be written.
        DataError: the text has no tokens.
    """
    source = Checkpoint(local_folder(checkpoint))
    if source.is_pruned:
        raise CheckpointError(
            f"{source.folder} has been pruned to other numbers of experts in each layer already; "
            "start from the model before"
        )
    require_free(output)
    model = BlockwiseModel(source)
    views = [view for view in model.blocks if view is not None]
    if not views:
        raise SpecError(f"{source.folder} has no MoE block; there are no experts to prune")
    for view in views:
        method.require_block(view)
    require_spreadable(method, views)
    counts = budget.counts(model, method.reroutes)
    needs_own_class(source.config, counts, method.reroutes and _removes(counts, views))
    work = beside(output, "work")
    settings: dict[str, Any] = {"batch_size": batch_size, "device": device, "progress": progress}
    statistics = record(
        source, calibration, method.needs, max_batches=max_batches, work=work, seed=seed, **settings
    )
    fits = partial(budget.allows, StoredSizes.of(model), method.reroutes)
    counts = spread(method, counts, views, statistics, fits)
    own_class = needs_own_class(source.config, counts, method.reroutes and _removes(counts, views))
    planner = _Planner(method, counts, statistics)
    made = work / "result"
    shutil.rmtree(made, ignore_errors=True)
    write_pruned(source, planner, made, own_class)
    before = after = None
    if held_out is not None:
        settings["max_batches"] = held_out_batches
        before = evaluate(source, held_out, description="evaluating before", **settings)
        after = evaluate(Checkpoint(made), held_out, description="evaluating after", **settings)
    report = PruneReport(
        method=method.to_dict(),
        ordinary=not own_class,
        calibration_tokens=statistics[0].tokens,
        before=before,
        after=after,
        blocks=tuple(planner.blocks),
    )
    if finish is not None:
        finish(made, report)
    take_name(made, output)
    shutil.rmtree(work, ignore_errors=True)
    return report


def prune_model(
    model: PreTrainedModel,
    method: Method,
    counts: Sequence[int],
    statistics: Sequence[BlockStatistics],
) -> tuple[PreTrainedModel, list[BlockPlan]]:
    """A new model with ``counts[i]`` experts in MoE block i; the old one is left as it was.

    Args:
        model: the model.
        method: how experts are chosen, merged or recombined.
        counts: experts of each MoE block.
        statistics: of :func:`~moekit.surgery.record_model`, with what the method needs.

    Raises:
        SpecError: counts or statistics do not fit the model or the method.
    """
    views = block_views(model)
    for name, given in (("numbers of experts", counts), ("statistics", statistics)):
        if len(given) != len(views):
            raise SpecError(f"got {len(given)} {name} for {len(views)} MoE blocks; give one each")
    planner = _Planner(method, counts, statistics)
    plans = [planner(number, view) for number, view in enumerate(views)]
    return pruned_model(model, plans), plans


class _Planner:
    """Plans block after block, and notes what becomes of each.

    Attributes:
        blocks: the notes.
    """

    def __init__(
        self, method: Method, counts: Sequence[int], statistics: Sequence[BlockStatistics]
    ) -> None:
        self.method = method
        self.counts = counts
        self.statistics = statistics
        self.blocks: list[PrunedBlock] = []

    def __call__(self, number: int, view: BlockView) -> BlockPlan:
        count, statistics = self.counts[number], self.statistics[number]
        for name, weights in [*view.bank.items(), *view.router.items()]:
            if not bool(weights.isfinite().all()):
                raise SpecError(
                    f"{view.name} has weights ({name}) that are NaN or infinite; start from a "
                    "sound model"
                )
        plan = self._plan(view, statistics, count)
        removed = plan.removed
        passed_E = plan.transfer_EK.sum(1)
        self.blocks.append(
            PrunedBlock(
                name=view.name,
                experts_before=view.experts,
                experts=plan.count,
                kept=plan.keep,
                similarity=removed_similarity(view, plan, statistics.input_SD),
                passed_on=float(passed_E[removed].mean()) if removed else None,
            )
        )
        return plan

    def _plan(self, view: BlockView, statistics: BlockStatistics, count: int) -> BlockPlan:
        statistics.require_of(view)
        if not 1 <= count <= view.experts:
            raise SpecError(f"{view.name} has {view.experts} experts; {count} cannot be kept")
        if count == view.experts:
            return kept(range(count), count)
        return self.method.plan(view, statistics, count)


def removed_similarity(view: BlockView, plan: BlockPlan, input_SD: Tensor) -> float | None:
    """How alike the removed experts' outputs are to those of the kept, see :class:`PrunedBlock`."""
    removed = plan.removed
    if not removed or not len(input_SD):
        return None
    x_SD = input_SD.to(view.bank.up.device)
    kept_KSD = [_direction(view, expert, x_SD) for expert in plan.keep]
    best = []
    for expert in removed:
        own_SD = _direction(view, expert, x_SD)
        best.append(max(float((own_SD * other_SD).sum(1).mean()) for other_SD in kept_KSD))
    return sum(best) / len(best)


@torch.inference_mode()
def _direction(view: BlockView, expert: int, x_SD: Tensor) -> Tensor:
    weights = view.expert(expert).map(Tensor.float)  # its parts may be of several types
    return F.normalize(view.compute(weights, x_SD.float()), dim=1)


def _removes(counts: Sequence[int], views: Sequence[BlockView]) -> bool:
    return any(count < view.experts for count, view in zip(counts, views, strict=True))
