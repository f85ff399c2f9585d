"""One run of a study: build, train, measure, and keep the measurements."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moekit.compare.design import Design, ModelSpec
from moekit.compare.record import RunRecord, write_json
from moekit.data import PackedDataset, TextData
from moekit.errors import CheckpointError
from moekit.measure import (
    ExpertPhaseResult,
    compare_expert_phase,
    count_flops,
    parameter_counts,
    survey,
    token_report,
)
from moekit.models.language import MoEDecoderForCausalLM
from moekit.training import ProgressReporter, TrainingResult, TrainingSpec, train

PHASE_BATCHES = 4
PHASE_REPEATS = 7


@dataclass(frozen=True)
class RunPlace:
    """The folder of one run.

    Attributes:
        runs: folder of all runs of the study.
        design, seed: which run.
    """

    runs: Path
    design: str
    seed: int

    @property
    def folder(self) -> Path:
        """Everything of the run: checkpoints, the model, the record."""
        return self.runs / f"{folder_name(self.design)}-seed{self.seed}"

    @property
    def model(self) -> Path:
        """The trained model, loadable by transformers."""
        return self.folder / "model"

    def finished(self) -> RunRecord | None:
        """The record of the run if it is finished.

        Raises:
            CheckpointError: there is a record that cannot be read.
        """
        path = self.folder / "record.json"
        if not path.exists():
            return None
        try:
            return RunRecord.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{path} is not the record of a run ({error}); delete it to run it again"
            ) from None

    def finish(self, record: RunRecord) -> None:
        """Keep the record, and drop the training state, which nobody needs any more."""
        write_json(self.folder / "record.json", record.to_dict())
        shutil.rmtree(self.folder / "training", ignore_errors=True)


def folder_name(design: str) -> str:
    """A file name for a design: letters, digits, dots and dashes."""
    return re.sub(r"[^A-Za-z0-9.=-]+", "-", design).strip("-.") or "design"


def build_model(
    design: Design, model: ModelSpec, data: TextData, seed: int
) -> MoEDecoderForCausalLM:
    """The untrained language model of a design."""
    length = data.train[0]["input_ids"].shape[0]
    config = design.config(model, len(data.tokenizer), length)
    config.bos_token_id = data.tokenizer.bos_token_id
    config.eos_token_id = data.tokenizer.eos_token_id
    config.pad_token_id = data.tokenizer.pad_token_id
    torch.manual_seed(seed)
    return MoEDecoderForCausalLM(config)


def run_design(
    design: Design,
    model_spec: ModelSpec,
    training: TrainingSpec,
    data: TextData,
    place: RunPlace,
    reporter: ProgressReporter,
    device: str = "cpu",
    report_to: Sequence[str] = (),
) -> RunRecord:
    """Train one design with one seed, measure it, save it, and return its record."""
    model = build_model(design, model_spec, data, training.seed).to(device)
    result = train(
        model,
        data,
        training,
        place.folder / "training",
        report_to=tuple(report_to),
        progress=reporter,
    )
    record = _measured(design, model, training, data, result)
    _save(model, data, place.model)
    place.finish(record)
    return record


def measure_phases(
    places: Mapping[str, RunPlace], dataset: PackedDataset, batch_size: int, device: str
) -> dict[str, ExpertPhaseResult]:
    """Time the expert phase of trained models on the same batches, in one interleaved run."""
    models = {
        name: MoEDecoderForCausalLM.from_pretrained(place.model).to(device).eval()
        for name, place in places.items()
    }
    count = min(PHASE_BATCHES, math.ceil(len(dataset) / batch_size))
    batches = [_batch(dataset, i * batch_size, batch_size).to(device) for i in range(count)]
    return compare_expert_phase(models, batches, repeats=PHASE_REPEATS)


def _measured(
    design: Design,
    model: MoEDecoderForCausalLM,
    training: TrainingSpec,
    data: TextData,
    result: TrainingResult,
) -> RunRecord:
    model.eval()
    found = survey(model, data.validation, training.batch_size)
    parameters = parameter_counts(model)
    flops = count_flops(model, _batch(data.validation, 0, training.batch_size).to(model.device))
    return RunRecord(
        design=design.name,
        seed=training.seed,
        causal=design.causal,
        validation_loss=found.loss,
        bits_per_byte=found.loss / math.log(2) / data.validation.bytes_per_token,
        parameters=parameters.to_dict(),
        flops_per_token=flops,
        training_flops=3 * flops * result.tokens,
        tokens=result.tokens,
        tokens_per_second=result.tokens_per_second,
        peak_memory_bytes=result.peak_memory_bytes,
        statistics=found.statistics,
        tokens_report=token_report(model, data.validation, data.tokenizer),
        history=list(result.history),
        group_losses=found.group_losses,
    )


def _batch(dataset: PackedDataset, start: int, size: int) -> torch.Tensor:
    stop = min(start + size, len(dataset))
    return torch.stack([dataset[i]["input_ids"] for i in range(start, stop)])


def _save(model: MoEDecoderForCausalLM, data: TextData, folder: Path) -> None:
    """Save model and tokenizer under a temporary name, then rename."""
    scratch = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    model.save_pretrained(scratch)
    data.tokenizer.save_pretrained(str(scratch))
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)

