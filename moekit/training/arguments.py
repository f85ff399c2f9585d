"""A training spec in the words of ``transformers.TrainingArguments``."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
    is_flytekit_available,
)

from moekit.errors import MissingExtraError, SpecError
from moekit.training.spec import TrainingSpec

_EXTRA = ("tensorboard", "wandb")  # what moekit[tracking] installs


def training_arguments(
    spec: TrainingSpec, output: Path, device: torch.device, report_to: Sequence[str] = ()
) -> TrainingArguments:
    """The arguments of a run that writes to ``output``; starts the process group under torchrun.

    Args:
        device: where the model is; the CPU, or this process's CUDA device.
        report_to: trackers to log to: ``tensorboard``, ``wandb`` or any that transformers knows.

    Raises:
        SpecError: the batch cannot be split over the processes, or a tracker is unknown.
        MissingExtraError: a tracker is not installed.
    """
    require_trackers(report_to)
    on_cpu = device.type == "cpu"
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun
    micro_batch = spec.micro_batch(processes)
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=spec.steps,
        per_device_train_batch_size=micro_batch,
        per_device_eval_batch_size=micro_batch,
        gradient_accumulation_steps=spec.gradient_accumulation,
        learning_rate=spec.learning_rate,
        lr_scheduler_type="cosine_warmup_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": spec.min_learning_rate_ratio},
        warmup_steps=math.ceil(spec.warmup_share * spec.steps),
        weight_decay=spec.weight_decay,
        adam_beta1=spec.beta1,
        adam_beta2=spec.beta2,
        max_grad_norm=spec.clip,
        bf16=spec.precision == "bfloat16",
        logging_strategy="steps",
        logging_steps=spec.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it hides divergence, and reads every loss back
        eval_strategy="steps",
        eval_steps=spec.eval_every or spec.steps,
        save_strategy="steps",
        save_steps=spec.save_every or spec.steps,
        save_total_limit=spec.keep,
        report_to=list(report_to) or "none",
        seed=spec.seed,
        use_cpu=on_cpu,
        disable_tqdm=True,
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
        ddp_backend="gloo" if on_cpu and processes > 1 else None,
        ddp_find_unused_parameters=False,  # every expert is in every graph, if only with no rows
        **_checkpointing(spec.gradient_checkpointing),
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several would mean DataParallel
    if on_cpu:  # "cpu:0", as processes get it, is no place older versions can load a state to
        vars(arguments)["_setup_devices"] = torch.device("cpu")
    return arguments


def _checkpointing(on: bool) -> dict[str, Any]:
    """The options that switch activation checkpointing, renamed in transformers 5.20 or so."""
    if not on:
        return {}
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing"
    name = name if name in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def require_trackers(report_to: Sequence[str]) -> None:
    """Refuse trackers that cannot be used here, before any work is done.

    Raises:
        SpecError: transformers does not know one.
        MissingExtraError: one is not installed, or not set up.
    """
    available = set(get_available_reporting_integrations())  # type: ignore[no-untyped-call]
    if is_flytekit_available():  # type: ignore[no-untyped-call]
        available.add("flyte")  # which that list leaves out
    for tracker in report_to:
        if tracker not in INTEGRATION_TO_CALLBACK:
            raise SpecError(
                f"report_to has {tracker!r}; known: {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
            )
        if tracker not in available:
            remedy = "run pip install 'moekit[tracking]'" if tracker in _EXTRA else "install it"
            raise MissingExtraError(
                f"report_to has {tracker}, which is not installed or not set up; {remedy} or leave "
                "it out"
            )
