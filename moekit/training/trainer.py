"""``transformers.Trainer`` for models with MoE layers."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import logging

from moekit.errors import CheckpointError, DivergedError
from moekit.training.checkpoints import (
    STAGING,
    clear_staging,
    keep_newest,
    publish,
    saving_to,
    write_json,
)
from moekit.training.clock import StepClock, WallClock
from moekit.training.decay import decayed_names
from moekit.training.divergence import LossWatch
from moekit.training.evaluation import evaluate, shifted_labels
from moekit.training.flow import RoutingFlow
from moekit.training.order import ShuffledPasses
from moekit.training.rows import flat_row
from moekit.training.window import RoutingWindow


class MoETrainer(transformers.Trainer):
    """A ``transformers.Trainer`` that also runs the routing of an MoE model.

    On top of the base class:

    - after each optimiser step, routers and loss controllers see the step's loads, summed over
      micro-batches and ranks, once;
    - each log row has the cross-entropy, every routing loss, ``routing/...`` figures and the load
      of each expert; ``state.log_history`` keeps them nested under ``routing``;
    - a checkpoint appears under its name only when all of its files are on the disk, a log row is
      closed with it, and it holds nothing but safetensors, JSON and tensors that load without
      running code;
    - a loss or weight that is not finite ends the run with one sentence before it can be saved;
    - ``eval_loss`` is the mean cross-entropy over all predicted tokens, in nats, without routing
      losses;
    - with ``max_steps``, the order of the data does not depend on processes or micro-batches.

    The model is a ``PreTrainedModel`` with the members of
    :class:`~moekit.training.window.MoEModel`, whose output is a
    :class:`~moekit.training.window.MoEModelOutput`. Arguments are those of the base class.

    Example:
        >>> trainer = MoETrainer(model, args, train_dataset=blocks)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        use_cache = model.config.use_cache  # the base class sets it, and checkpoints keep it
        self._own_forward = vars(model).get("forward")
        super().__init__(model, *args, **kwargs)
        model.config.use_cache = use_cache
        self.window = RoutingWindow(cast("Any", model))
        self.watch = LossWatch(self.args.device, _advice(self.args))
        self.clock = StepClock(self.args.device)
        self.wall = WallClock()
        self._saving = False
        self.add_callback(RoutingFlow(self.window, self.watch, self.clock, self.wall))

    def release(self) -> None:
        """Take off the model what mixed precision put around its ``forward``."""
        attributes = vars(self.model)
        attributes.pop("_original_forward", None)
        attributes.pop("forward", None)
        if self._own_forward is not None:
            attributes["forward"] = self._own_forward

    # --- data ------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int] | None:
        data = self.train_dataset if train_dataset is None else train_dataset
        if self.args.max_steps <= 0 or not hasattr(data, "__len__"):
            return cast("Sampler[int] | None", super()._get_train_sampler(train_dataset))
        total = self.args.max_steps * self.get_total_train_batch_size(self.args)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return ShuffledPasses(len(cast("Any", data)), total, seed)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """As the base class; a step begins with it."""
        self.clock.start()
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _get_num_items_in_batch(
        self, batch_samples: list[Any], device: torch.device
    ) -> Tensor | int | None:
        """As the base class, which counts the first token after left padding too."""
        counted = [
            {**batch, "shift_labels": shifted_labels(batch)} if "labels" in batch else batch
            for batch in batch_samples
        ]
        return super()._get_num_items_in_batch(counted, device)

    # --- loss ------------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """One micro-batch forward and backward; its part of the step's loss."""
        self.state.num_input_tokens_seen += inputs["input_ids"].numel() * self.args.world_size
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.watch.add(loss)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's loss; in training, its routing is counted."""
        loss, outputs = super().compute_loss(
            model, {**inputs, "use_cache": False}, True, num_items_in_batch
        )
        if model.training:
            self.window.add(outputs, inputs)
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """None: the base class's 6 N a token counts the experts that a token does not use."""
        return 0

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """See :func:`moekit.training.decays`."""
        return decayed_names(model)

    # --- evaluation and logs ---------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Mean cross-entropy of the evaluation data; the base class's with ``compute_metrics``.

        Raises:
            DivergedError: it is not finite.
        """
        self.watch.check()
        data: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if self.compute_metrics is not None or isinstance(data, dict | str | None):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        began = time.perf_counter()
        assert self.model is not None
        with self.accelerator.autocast():
            loss = evaluate(
                self.model, data, self.args.per_device_eval_batch_size, collate=self.data_collator
            )
        self._require_finite(loss)
        metrics = {
            f"{metric_key_prefix}_loss": loss,
            f"{metric_key_prefix}_runtime": time.perf_counter() - began,
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Add a row to ``state.log_history`` and hand its flat form to the callbacks.

        Raises:
            DivergedError: a loss since the last row was not finite.
        """
        if "loss" in logs:
            self.watch.check()
            logs = {**logs, **self.window.take(), **self._speed()}
        row = {
            "step": self.state.global_step,
            "tokens": self.state.num_input_tokens_seen,
            "seconds": self.wall.read(),
            **logs,
        }
        self.state.log_history.append(row)
        self.control = self.callback_handler.on_log(
            self.args, self.state, self.control, flat_row(row)
        )

    def _speed(self) -> dict[str, float]:
        median = self.clock.take_median()
        if not median:
            return {}
        step = max(self.state.global_step, 1)
        return {"tokens_per_second": self.state.num_input_tokens_seen / step / median}

    def _require_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise DivergedError(
                f"the evaluation loss after step {self.state.global_step} is {loss} "
                f"({self.watch.last_finite()}); {_advice(self.args)}"
            )

    # --- checkpoints -----------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder, STAGING)) if self._saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save under a hidden name, then rename, then delete older checkpoints."""
        output = Path(self._get_output_dir(trial))
        self.watch.check()
        self.watch.check_weights(model, self.state.global_step)
        with saving_to(output):
            if self.args.should_save:
                clear_staging(output)
            self.accelerator.wait_for_everyone()
            try:
                self._stage(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self._publish(output)
            finally:
                if self.args.should_save:
                    clear_staging(output)
            self.accelerator.wait_for_everyone()

    def _stage(self, model: nn.Module, trial: Any) -> None:
        self._saving = True
        try:
            with _without_bars():
                super()._save_checkpoint(model, trial)
        finally:
            self._saving = False

    def _publish(self, output: Path) -> None:
        staged = output / STAGING / f"checkpoint-{self.state.global_step}"
        best = self.state.best_global_step
        if best:  # the base class looked for it in the staging folder
            place = output / f"checkpoint-{best}"
            known = place.is_dir() or best == self.state.global_step
            self.state.best_model_checkpoint = str(place) if known else None
            self.state.save_to_json(str(staged / "trainer_state.json"))
        publish(staged, output)
        if self.args.save_total_limit:
            kept = self.state.best_model_checkpoint
            keep_newest(output, self.args.save_total_limit, None if kept is None else Path(kept))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As the base class, with the arguments as JSON in the place of a pickle."""
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or cast("str", self.args.output_dir))
        pickled = folder / "training_args.bin"
        if self.args.should_save and pickled.exists():
            write_json(folder / "training_args.json", self.args.to_sanitized_dict())
            pickled.unlink()

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise CheckpointError(
                f"{resume_from_checkpoint} is of another model ({reason}); "
                "build the model as it was or give another folder"
            ) from error

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """A weight that is missing or too much means another model, unless it is tied."""
        assert self.model is not None
        shared = _shared_names(self.model)
        missing = [name for name in load_result.missing_keys if name not in shared]
        wrong = missing or load_result.unexpected_keys
        if wrong:
            raise CheckpointError(
                f"the checkpoint {'lacks' if missing else 'has besides'} the weight {wrong[0]}; "
                "it is of another model: build the model as it was or give another folder"
            )


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep ``save_pretrained`` from drawing a bar for every checkpoint."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _shared_names(model: nn.Module) -> set[str]:
    """Names of tensors that are also in the model under another name."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return {name for group in names.values() if len(group) > 1 for name in group}


def _advice(args: TrainingArguments) -> str:
    """What to try when a run with ``args`` diverges."""
    less = [f"a lower learning_rate than {args.learning_rate:g}", "a longer warmup"]
    if not args.max_grad_norm or args.max_grad_norm > 1:
        less.append("clipping gradients to a norm of 1")
    if args.bf16 or args.fp16:
        less.append("float32 precision")
    return f"try {', '.join(less[:-1])} or {less[-1]}"
