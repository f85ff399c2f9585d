"""The training loop: steps, looks at held-out text, the rule that ends it, and going on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moekit.data.pairs import IGNORED
from moekit.errors import DataError, DivergedError, SpecError
from moekit.measure.observe import TokenBlocks
from moekit.surgery.batch import Batch, batch_of
from moekit.surgery.run_store import RunStore, optimiser_tensors, restore
from moekit.surgery.unlearn.algorithms import Objective, Start
from moekit.surgery.unlearn.anchor import RouterAnchorLoss
from moekit.surgery.unlearn.measure import Reading, read
from moekit.surgery.unlearn.run import Runner
from moekit.surgery.unlearn.spec import UnlearnSpec
from moekit.surgery.unlearn.targets import Choice
from moekit.surgery.unlearn.trained import Trained
from moekit.surgery.view import block_views
from moekit.training.order import ShuffledPasses
from moekit.training.progress import ProgressReporter


@dataclass(frozen=True)
class Texts:
    """The text of a run.

    Attributes:
        forget: what is unlearned.
        retain: what is kept; None where the algorithm does not train on it.
        forget_held_out: other text of the forget kind, which decides when to stop.
        retain_held_out: other text of the retain kind, which utility is measured on; or None.
        held_out_batches: use at most so many batches of each.
    """

    forget: TokenBlocks
    retain: TokenBlocks | None
    forget_held_out: TokenBlocks
    retain_held_out: TokenBlocks | None
    held_out_batches: int | None = None


@dataclass(frozen=True)
class Look:
    """A look at the held-out text.

    Attributes:
        step: after how many steps.
        forget_perplexity, retain_perplexity: on held-out text; the latter None without it.
        loss: forget loss of the last step with the anchor; None before the first.
        forget_nats, retain_nats: logarithms of the perplexities, finite where these are not.
    """

    step: int
    forget_perplexity: float
    retain_perplexity: float | None
    loss: float | None
    forget_nats: float
    retain_nats: float | None


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        steps: steps taken.
        reached: whether perplexity on forget text rose as far as was asked.
        forget, retain: readings (before, after); those of retain text None without it.
        looks: every look, from before the first step on.
    """

    steps: int
    reached: bool
    forget: tuple[Reading, Reading]
    retain: tuple[Reading, Reading] | None
    looks: tuple[Look, ...]


class Loop:
    """A run of unlearning on a model, whose weights change in place.

    Args:
        model: the model.
        trained: what is trained of it.
        choice: the same, by blocks.
        spec: the run.
        texts: its text.
        store: keeps what is done.
        reporter: told how far it is.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        trained: Trained,
        choice: Choice,
        spec: UnlearnSpec,
        texts: Texts,
        store: RunStore,
        reporter: ProgressReporter,
    ) -> None:
        self.model, self.trained, self.spec = model, trained, spec
        self.texts, self.store, self.reporter = texts, store, reporter
        self._choice = repr(choice)
        anchored = choice.anchored() if spec.anchor > 0 else {}
        self.anchors = {
            block: RouterAnchorLoss(experts, spec.anchor_reduction)
            for block, experts in anchored.items()
        }
        self.run = Runner(model, trained, tuple(self.anchors))
        self.optimiser = torch.optim.AdamW(
            trained.leaves, lr=spec.learning_rate, weight_decay=spec.weight_decay
        )
        self.objective = self._objective(choice)
        self._forget = _Draw(texts.forget, spec, spec.seed, model.device)
        self._retain = None
        if self.objective.retain_weight > 0:
            assert texts.retain is not None
            self._retain = _Draw(texts.retain, spec, spec.seed + 1, model.device)

    def __call__(self) -> Outcome:
        """Run to the end.

        Raises:
            DivergedError: a loss or gradient is not finite.
        """
        before = self._read(self.texts.forget_held_out)
        utility = self._utility()
        looks = [self._look(0, before, utility, None)]
        step, looks = self._resume(looks)
        self.reporter.start(self.spec.steps, f"unlearning ({self.spec.algorithm.name})")
        try:
            with self.trained.training():
                step, forget, retain = self._train(step, looks)
        except DivergedError:
            self.trained.restore()
            raise
        finally:
            self.reporter.finish()
        return Outcome(
            steps=step,
            reached=self._reached(looks),
            forget=(before, forget),
            retain=None if utility is None or retain is None else (utility, retain),
            looks=tuple(looks),
        )

    def _train(self, step: int, looks: list[Look]) -> tuple[int, Reading, Reading | None]:
        """Step until the end, and look; the last step and what was read after it."""
        last: tuple[Reading, Reading | None] | None = None
        while not self._ended(step, looks):
            self._skip_to(step)
            loss = self._step(step + 1)
            step += 1
            self.reporter.update(step, loss, None)
            if step % self.spec.check_every == 0 or step == self.spec.steps:
                last = self._read(self.texts.forget_held_out), self._utility()
                looks.append(self._look(step, *last, loss))
                self._save(step, looks)
        if last is None:  # a run that had ended is taken up again
            last = self._read(self.texts.forget_held_out), self._utility()
        return step, *last

    def _objective(self, choice: Choice) -> Objective:
        views = block_views(self.model)
        blocks = range(len(views)) if choice.everything else choice.blocks
        start = first_learned(self.texts.forget) or 0
        stop = min(start + self.spec.batch_size, len(self.texts.forget))
        first = batch_of(self.texts.forget, range(start, stop), self.model.device)
        given = Start(
            run=self.run,
            batch=first,
            layers=(0,) if choice.everything else tuple(views[block].index for block in blocks),
            selected=tuple(sorted({views[block].index for block, _ in choice.experts})),
            seed=self.spec.seed,
        )
        return self.spec.algorithm.start(given)

    def _step(self, number: int) -> float:
        """One optimiser step; the mean of what was minimised on forget text."""
        self.optimiser.zero_grad(set_to_none=True)
        total = 0.0
        for _ in range(self.spec.accumulate):
            total += self._forget_pass(self._forget.next()) / self.spec.accumulate
            if self._retain is not None:
                self._retain_pass(self._retain.next())
        self.trained.gather_gradients()
        leaves = self.trained.leaves
        norm = nn.utils.clip_grad_norm_(leaves, self.spec.max_grad_norm)
        if not math.isfinite(total) or not bool(norm.isfinite()):
            raise DivergedError(
                f"step {number}: the loss is {total:.4g}, the gradient's norm {float(norm):.4g}; "
                "nothing is written. Use a lower learning rate, a smaller until or fewer steps"
            )
        self.optimiser.step()
        self.trained.write()
        return total

    def _forget_pass(self, batch: Batch) -> float:
        seen, loss = self.objective.forget(self.run, batch)
        valid_N = batch.valid_BT.flatten()
        for block, anchor in self.anchors.items():
            loss = loss + self.spec.anchor * anchor(seen.probabilities[block], valid_N)
        (loss / self.spec.accumulate).backward()
        return float(loss.detach())

    def _retain_pass(self, batch: Batch) -> None:
        """Its own backward pass, so that one graph is in memory at a time."""
        loss = self.objective.retain(self.run, batch)
        scaled = self.objective.retain_weight * loss / self.spec.accumulate
        scaled.backward()

    def _utility(self) -> Reading | None:
        held_out = self.texts.retain_held_out
        return None if held_out is None else self._read(held_out)

    def _read(self, data: TokenBlocks) -> Reading:
        found = read(self.model, data, self.spec.batch_size, self.texts.held_out_batches)
        if not math.isfinite(found.loss):
            raise DivergedError(
                "the loss on held-out text is not finite; nothing is written. Use a lower learning "
                "rate or a smaller until, or mend the checkpoint if this was before the first step"
            )
        return found

    def _look(self, step: int, forget: Reading, retain: Reading | None, loss: float | None) -> Look:
        return Look(
            step,
            forget.perplexity,
            None if retain is None else retain.perplexity,
            loss,
            forget.loss,
            None if retain is None else retain.loss,
        )

    def _reached(self, looks: list[Look]) -> bool:
        until = self.spec.until
        if until is None:
            return False
        return looks[-1].forget_nats >= math.log(until) + looks[0].forget_nats

    def _ended(self, step: int, looks: list[Look]) -> bool:
        return step >= self.spec.steps or (looks[-1].step == step and self._reached(looks))

    def _skip_to(self, step: int) -> None:
        """Draw what the steps before drew, where the run goes on."""
        for draw in (self._forget, self._retain):
            if draw is not None:
                draw.skip_to(step * self.spec.sequences)

    def _save(self, step: int, looks: list[Look]) -> None:
        facts = {
            "step": step,
            "choice": self._choice,
            "looks": [dataclasses.asdict(look) for look in looks],
        }
        self.store.save(facts, optimiser_tensors(self.optimiser, self.trained.leaves))

    def _resume(self, looks: list[Look]) -> tuple[int, list[Look]]:
        stored = self.store.load()
        if stored is None:
            return 0, looks
        facts, tensors = stored
        if facts["choice"] != self._choice:  # other experts were attributed: another run
            return 0, looks
        restore(self.optimiser, self.trained.leaves, tensors)
        self.trained.write()
        return int(facts["step"]), [Look(**look) for look in facts["looks"]]


class _Draw:
    """Batches of a text in the order of a seed."""

    def __init__(
        self, data: TokenBlocks, spec: UnlearnSpec, seed: int, device: torch.device
    ) -> None:
        self._data, self._size, self._device = data, spec.batch_size, device
        self._order: Iterator[int] = iter(order_of(data, spec, seed))
        self._drawn = 0

    def next(self) -> Batch:
        """The next batch."""
        indices = [next(self._order) for _ in range(self._size)]
        self._drawn += self._size
        return batch_of(self._data, indices, self._device)

    def skip_to(self, drawn: int) -> None:
        """Draw and drop until so many sequences are drawn."""
        while self._drawn < drawn:
            next(self._order)
            self._drawn += 1


def order_of(data: TokenBlocks, spec: UnlearnSpec, seed: int) -> ShuffledPasses:
    """The order in which a run draws its sequences."""
    return ShuffledPasses(len(data), spec.steps * spec.sequences, seed)


def require_texts(texts: Texts, spec: UnlearnSpec) -> None:
    """Refuse text that is missing.

    Raises:
        DataError: a text that is needed is empty.
        SpecError: the algorithm trains on retain text, and there is none.
    """
    if spec.algorithm.retain_weight > 0 and texts.retain is None:
        raise SpecError(
            f"{spec.algorithm.name} also trains on text to retain, and none is given; give it, or "
            "set weight to 0"
        )
    named: dict[str, Any] = {
        "the forget text": texts.forget,
        "the retain text": texts.retain,
        "the held-out forget text": texts.forget_held_out,
        "the held-out retain text": texts.retain_held_out,
    }
    for name, data in named.items():
        if data is not None and len(data) == 0:
            raise DataError(f"{name} is empty; give more of it, or shorter sequences")
        if data is not None and first_learned(data) is None:
            raise DataError(
                f"{name} has no token to predict: all of it is padding, or labels are -100"
            )


def first_learned(data: TokenBlocks) -> int | None:
    """The first sequence with a token to predict, None if there is none."""
    learned = (bool((batch_of(data, [i]).target_BT != IGNORED).any()) for i in range(len(data)))
    return next((index for index, is_learned in enumerate(learned) if is_learned), None)


def drawn_blocks(data: TokenBlocks, spec: UnlearnSpec, seed: int) -> Iterator[dict[str, Tensor]]:
    """The sequences that a run would draw, each once, to tell runs on other text apart."""
    for index in sorted(set(order_of(data, spec, seed))):
        yield data[index]
