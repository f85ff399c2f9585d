"""Unlearning: attribute, train, write, and compare with what was before."""

from __future__ import annotations

import dataclasses
import itertools
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from moekit.data.fingerprint import digest_of, fingerprint_of
from moekit.errors import CheckpointError
from moekit.measure.observe import TokenBlocks
from moekit.surgery.checkpoint import Checkpoint, local_folder
from moekit.surgery.run_store import RunStore, blocks_digest
from moekit.surgery.shards import appearing, beside, require_free
from moekit.surgery.unlearn.attribution import attribute_experts, require_scores
from moekit.surgery.unlearn.loop import Look, Loop, Outcome, Texts, drawn_blocks, require_texts
from moekit.surgery.unlearn.spec import UnlearnSpec
from moekit.surgery.unlearn.targets import Choice, choice_of
from moekit.surgery.unlearn.trained import Trained
from moekit.surgery.unlearn.write import write_unlearned
from moekit.surgery.view import BlockView, block_views
from moekit.training.progress import ProgressReporter, SilentProgress

_FORMAT = 2  # of what is kept of a run


@dataclass(frozen=True)
class SelectedExpert:
    """An expert that was trained alone.

    Attributes:
        block: path of its block.
        layer: number of its decoder layer.
        expert: its number.
        affinity: of the forget text to it; None where it was not attributed.
    """

    block: str
    layer: int
    expert: int
    affinity: float | None


@dataclass(frozen=True)
class UnlearnReport:
    """What was done and what it changed.

    Attributes:
        spec: the run, as JSON values.
        experts: those that were trained alone.
        steps: steps taken.
        reached: whether perplexity on held-out forget text rose as far as was asked.
        parameters: of the whole model; tied ones once.
        trained: parameters that were free to change.
        changed: parameters that are no longer what they were.
        forget, retain: ``before`` and ``after`` on held-out text: loss, perplexity, accuracy (of
            the most likely next token) and tokens. ``retain`` is None without such text.
        overlap: for ``forget`` and ``retain``, the share of the selected experts that stayed the
            same, for each MoE block.
        looks: every look at the held-out text on the way.
    """

    spec: dict[str, Any]
    experts: tuple[SelectedExpert, ...]
    steps: int
    reached: bool
    parameters: int
    trained: int
    changed: int
    forget: dict[str, dict[str, float]]
    retain: dict[str, dict[str, float]] | None
    overlap: dict[str, tuple[float, ...]]
    looks: tuple[Look, ...]

    @property
    def changed_share(self) -> float:
        """Share of the model's parameters that are no longer what they were."""
        return self.changed / self.parameters

    def retain_perplexity_at(self, times: float) -> float | None:
        """Perplexity on retain text where that on forget text was ``times`` what it was.

        Runs are compared at equal forgetting, and looks are steps apart: between the two around
        that point the logarithm of one perplexity is taken as linear in that of the other.

        Returns:
            None where there is no held-out retain text, or the run never came so far.
        """
        wanted = math.log(times) + self.looks[0].forget_nats
        for one, other in itertools.pairwise(self.looks):
            f0, f1, r0, r1 = one.forget_nats, other.forget_nats, one.retain_nats, other.retain_nats
            if f0 < wanted <= f1 and r0 is not None and r1 is not None:
                return math.exp(r0 + (r1 - r0) * (wanted - f0) / (f1 - f0))
        return None

    def to_dict(self) -> dict[str, Any]:
        """JSON values; None for a perplexity that is too large for a number."""
        found: dict[str, Any] = _finite(dataclasses.asdict(self))
        return {**found, "changed_share": self.changed_share}


def unlearn(
    checkpoint: str | Path,
    output: Path,
    texts: Texts,
    spec: UnlearnSpec = UnlearnSpec(),  # noqa: B008  (a frozen value)
    *,
    device: str = "cpu",
    reporter: ProgressReporter | None = None,
    finish: Callable[[Path, UnlearnReport], None] | None = None,
) -> UnlearnReport:
    """Write a checkpoint that has unlearned a text; the old one is only read.

    The result is an ordinary checkpoint of the same architecture, which differs from the old one
    in the trained tensors alone. ``output`` appears when it is complete. What is done so far is
    kept beside it at every look, so that the same call goes on after an interruption.

    Args:
        checkpoint: folder or hub name of the model.
        output: folder for the result.
        texts: what to forget and what to retain.
        spec: how.
        device: where to run the model, which has to fit there.
        reporter: told how far it is.
        finish: given the finished folder and the report before the folder takes the name
            ``output``; what it writes there comes with it.

    Raises:
        CheckpointError: the checkpoint is missing, incomplete, damaged, quantised or not finite.
        SpecError: the run does not fit the model.
        DataError: a text is empty.
        DivergedError: a loss is not finite.
        OutputError: ``output`` is there already, or cannot be written.
    """
    require_free(output)
    source = Checkpoint(local_folder(checkpoint))
    require_texts(texts, spec)
    model = _loaded(source, device)
    work = beside(output, "work")
    store = RunStore.of(work, _digest(source, texts, spec))
    run = _Run(model, texts, spec, store, reporter or SilentProgress())
    report = run.report()
    with appearing(output) as folder:
        write_unlearned(source, model, run.trained, folder)
        if finish is not None:
            finish(folder, report)
    shutil.rmtree(work, ignore_errors=True)
    return report


def unlearn_model(
    model: PreTrainedModel,
    texts: Texts,
    spec: UnlearnSpec = UnlearnSpec(),  # noqa: B008  (a frozen value)
    *,
    scores_LE: Tensor | None = None,
    reporter: ProgressReporter | None = None,
) -> UnlearnReport:
    """:func:`unlearn` of a model in memory, whose trained weights change in place.

    It is left in evaluation mode, and with the weights that it had if the run diverges.

    Args:
        model: the model, on the device to run on.
        texts: what to forget and what to retain.
        spec: how.
        scores_LE: affinities to the forget text, of :func:`attribute_experts`; taken if None.
        reporter: told how far it is.

    Raises:
        SpecError, DataError, DivergedError: as :func:`unlearn`.
    """
    require_texts(texts, spec)
    store = RunStore(None)
    return _Run(model, texts, spec, store, reporter or SilentProgress(), scores_LE).report()


class _Run:
    """One run on a model.

    Attributes:
        trained: what it trains.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        texts: Texts,
        spec: UnlearnSpec,
        store: RunStore,
        reporter: ProgressReporter,
        scores_LE: Tensor | None = None,
    ) -> None:
        self.model, self.texts, self.spec = model, texts, spec
        self.store, self.reporter = store, reporter
        self._scores_LE = scores_LE
        if scores_LE is not None:
            require_scores(scores_LE, block_views(model))
        # Dropout and jitter are off, so that the model before is the same at every step.
        model.eval()  # type: ignore[no-untyped-call]
        self.choice: Choice = choice_of(model, spec.targets, self._scores)
        self.trained = Trained(model, self.choice)

    def report(self) -> UnlearnReport:
        """Train, and say what that changed."""
        loop = Loop(
            self.model,
            self.trained,
            self.choice,
            self.spec,
            self.texts,
            self.store,
            self.reporter,
        )
        ended = loop()
        return UnlearnReport(
            spec=self.spec.to_dict(),
            experts=self._selected(block_views(self.model)),
            steps=ended.steps,
            reached=ended.reached,
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            trained=self.trained.elements,
            changed=self.trained.changed(),
            forget=_sides(ended.forget[0].to_dict(), ended.forget[1].to_dict()),
            retain=_retained(ended),
            overlap=_overlaps(ended),
            looks=ended.looks,
        )

    def _scores(self) -> Tensor:
        if self._scores_LE is None:
            self._scores_LE = attribute_experts(
                self.model,
                self.texts.forget,
                tokens=self.spec.attribution_tokens,
                batch_size=self.spec.batch_size,
                seed=self.spec.seed,
                progress=self._tell,
            )
        return self._scores_LE

    def _tell(self, description: str, done: int, total: int | None) -> None:
        assert total is not None
        if done <= self.spec.batch_size:
            self.reporter.start(total, description)
        self.reporter.update(done, None, None)
        if done == total:
            self.reporter.finish()

    def _selected(self, views: Sequence[BlockView]) -> tuple[SelectedExpert, ...]:
        scores_LE = self._scores_LE
        return tuple(
            SelectedExpert(
                block=views[block].name,
                layer=views[block].index,
                expert=expert,
                affinity=None if scores_LE is None else float(scores_LE[block, expert]),
            )
            for block, expert in self.choice.experts
        )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_finite, value))
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sides(before: dict[str, float], after: dict[str, float]) -> dict[str, dict[str, float]]:
    return {"before": before, "after": after}


def _retained(ended: Outcome) -> dict[str, dict[str, float]] | None:
    if ended.retain is None:
        return None
    return _sides(ended.retain[0].to_dict(), ended.retain[1].to_dict())


def _overlaps(ended: Outcome) -> dict[str, tuple[float, ...]]:
    found = {"forget": ended.forget[0].overlap(ended.forget[1])}
    if ended.retain is not None:
        found["retain"] = ended.retain[0].overlap(ended.retain[1])
    return found


def _loaded(source: Checkpoint, device: str) -> PreTrainedModel:
    if source.is_pruned:
        raise CheckpointError(
            f"{source.folder} has been pruned to other numbers of experts in each layer; unlearn "
            "from the model before"
        )
    for name in source.stored:
        source.read(name)  # names file and tensor where a weight is not finite
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source.folder, dtype=source.dtype)
    return model.to(torch.device(device))  # type: ignore[arg-type]


def _digest(source: Checkpoint, texts: Texts, spec: UnlearnSpec) -> str:
    files = sorted(path for path in source.folder.iterdir() if path.is_file())
    read: list[Iterable[dict[str, Tensor]]] = [
        () if data is None else drawn_blocks(data, spec, seed)
        for data, seed in ((texts.forget, spec.seed), (texts.retain, spec.seed + 1))
    ]
    for held_out in (texts.forget_held_out, texts.retain_held_out):
        read.append(() if held_out is None else _looked_at(held_out, texts, spec))
    blocks = [blocks_digest(part) for part in read]
    return digest_of([_FORMAT, fingerprint_of(files), spec.to_dict(), blocks])


def _looked_at(
    held_out: TokenBlocks, texts: Texts, spec: UnlearnSpec
) -> Iterator[dict[str, Tensor]]:
    batches = texts.held_out_batches
    stop = None if batches is None else batches * spec.batch_size
    for index in range(len(held_out))[:stop]:
        yield held_out[index]
