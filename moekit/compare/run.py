"""One run of a study: build, train, measure, and keep the measurements."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moekit.compare.design import Design
from moekit.compare.model import ModelSpec
from moekit.compare.record import RunRecord, write_json
from moekit.compare.survey import survey
from moekit.data import PackedDataset, TextData
from moekit.errors import CheckpointError, first_line
from moekit.layer import MoE
from moekit.measure import (
    ExpertPhaseResult,
    compare_expert_phase,
    count_flops,
    parameter_counts,
    token_routing,
)
from moekit.measure.report import plain_routing
from moekit.models.language import MoEDecoderForCausalLM
from moekit.training import ProgressReporter, TrainingResult, TrainingSpec, train
from moekit.training.checkpoints import saving_to

PHASE_BATCHES = 4
TOKEN_BATCHES = 40
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
        """Keep the record and the tracker's logs, and drop the training state."""
        training = self.folder / "training"
        if (training / "runs").is_dir():  # where transformers puts TensorBoard's files
            shutil.copytree(training / "runs", self.folder / "logs", dirs_exist_ok=True)
        write_json(self.folder / "record.json", record.to_dict())
        shutil.rmtree(training, ignore_errors=True)


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
    model = on_device(build_model(design, model_spec, data, training.seed), device)
    result = train(
        model,
        data,
        training,
        place.folder / "training",
        report_to=tuple(report_to),
        progress=reporter,
        description=f"{design.name}, seed {training.seed}",
    )
    record = _measured(design, model, training, data, result)
    save_model(model, data, place.model)
    place.finish(record)
    return record


def measure_phases(
    places: Mapping[str, RunPlace], dataset: PackedDataset, batch_size: int, device: str
) -> dict[str, ExpertPhaseResult]:
    """Time the expert phase of trained models on the same batches, in one interleaved run."""
    models = {name: load_trained(place, device) for name, place in places.items()}
    batches = evaluation_batches(dataset, batch_size, torch.device(device))
    return compare_expert_phase(models, batches, repeats=PHASE_REPEATS)


def load_trained(place: RunPlace, device: str) -> MoEDecoderForCausalLM:
    """The trained model of a finished run, in evaluation mode.

    Raises:
        CheckpointError: it was damaged or removed since.
    """
    try:
        model = MoEDecoderForCausalLM.from_pretrained(place.model, local_files_only=True)
    except Exception as error:  # transformers and safetensors raise a dozen kinds
        raise CheckpointError(
            f"{place.model} cannot be loaded ({first_line(error)}); "
            f"delete {place.folder} to run it again"
        ) from None
    return on_device(model, device)


def on_device(model: MoEDecoderForCausalLM, device: str) -> MoEDecoderForCausalLM:
    """The model on a device, in evaluation mode; transformers' own methods have no types."""
    return nn.Module.eval(nn.Module.to(model, device))


def evaluation_batches(
    dataset: PackedDataset, batch_size: int, device: torch.device
) -> list[torch.Tensor]:
    """The first few batches of token ids, for timing."""
    count = min(PHASE_BATCHES, math.ceil(len(dataset) / batch_size))
    return [_batch(dataset, i * batch_size, batch_size).to(device) for i in range(count)]


def _measured(
    design: Design,
    model: MoEDecoderForCausalLM,
    training: TrainingSpec,
    data: TextData,
    result: TrainingResult,
) -> RunRecord:
    found = survey(model, data, training.batch_size)
    rows = [layer["rows_per_token"] for layer in found.statistics.get("layers", [])]
    flops = count_flops(model, _batch(data.validation, 0, training.batch_size).to(model.device))
    return RunRecord(
        design=design.name,
        seed=training.seed,
        causal=design.causal,
        validation_loss=found.loss,
        bits_per_byte=found.loss / math.log(2) / data.validation.bytes_per_token,
        parameters=dataclasses.asdict(parameter_counts(model, rows)),
        flops_per_token=flops,
        training_flops=_training_flops(model, flops, rows, result),
        tokens=result.tokens,
        tokens_per_second=result.tokens_per_second,
        peak_memory_bytes=result.peak_memory_bytes,
        statistics=found.statistics,
        tokens_report=_token_report(model, training, data),
        history=list(result.history),
        group_losses=found.group_losses,
    )


def _training_flops(
    model: MoEDecoderForCausalLM, flops: float, rows: Sequence[float], result: TrainingResult
) -> float:
    """Forward and backward operations of a run, three times the forward ones.

    ``flops`` were counted at ``rows`` product rows a token and layer; training may have computed
    more, as ReMoE does while its gates are dense, so the difference in logged rows is added.
    """
    if not model.moe_layers:
        return 3 * flops * result.tokens
    a_row = [2 * _matrix_parameters(layer) for layer in model.moe_layers]
    extra = (_rows_in_training(result) - statistics.fmean(rows)) * sum(a_row)
    return 3 * (flops + extra) * result.tokens


def _rows_in_training(result: TrainingResult) -> float:
    """Product rows a token and layer, mean over steps; a log row covers those since the last."""
    logged = [row for row in result.history if "routing" in row]
    steps = [row["step"] for row in logged]
    lengths = [now - before for before, now in zip([0, *steps], steps, strict=False)]
    return statistics.fmean([row["routing"]["rows_per_token"] for row in logged], lengths)


def _matrix_parameters(layer: MoE) -> float:
    """Matrix entries that one dispatched row meets, mean over the dispatched experts."""
    matrices = [p for p in layer.experts.parameters() if p.dim() == 3 and p.shape[1] > 2]
    return sum(p.numel() for p in matrices) / layer.experts.dispatched


def _token_report(
    model: MoEDecoderForCausalLM, training: TrainingSpec, data: TextData
) -> dict[str, Any]:
    """Experts a token by token type, and the tokens of each expert, as plain values."""
    if not model.moe_layers:
        return {}
    found = token_routing(
        model,
        data.validation,
        data.tokenizer,
        data.groups,
        batch_size=training.batch_size,
        max_batches=TOKEN_BATCHES,
    )
    return plain_routing(found)


def _batch(dataset: PackedDataset, start: int, size: int) -> torch.Tensor:
    stop = min(start + size, len(dataset))
    return torch.stack([dataset[i]["input_ids"] for i in range(start, stop)])


def save_model(model: MoEDecoderForCausalLM, data: TextData, folder: Path) -> None:
    """Save model and tokenizer whole or not at all, as a checkpoint that transformers loads.

    Raises:
        OutputError: the folder cannot be written.
    """
    scratch = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    with saving_to(folder):
        model.save_pretrained(scratch)
        data.tokenizer.save_pretrained(str(scratch))
        for weights in scratch.glob("*.safetensors"):  # safetensors makes them private
            shutil.copymode(scratch / "config.json", weights)
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
