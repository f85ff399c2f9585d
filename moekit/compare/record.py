"""What is kept of a run and of a study: plain numbers that go to JSON and CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moekit.errors import OutputError


@dataclass(frozen=True)
class RunRecord:
    """The measurements of one design with one seed.

    Attributes:
        design, seed: which run.
        causal: False if a router looked at later tokens, which flatters the losses.
        validation_loss: mean nats a token on the whole validation split.
        bits_per_byte: the same in bits a byte of text, comparable across tokenizers.
        parameters: ``total``, ``active`` (expected) and parts, see
            :class:`moekit.measure.ParameterCounts`.
        flops_per_token: counted forward floating-point operations a token on validation text.
        training_flops: forward and backward operations of the whole run, three times the forward
            ones, from the rows that were really computed at each step.
        tokens: tokens trained on.
        tokens_per_second: median over the training steps.
        peak_memory_bytes: highest memory during the training: of torch's tensors on a GPU, on a
            CPU of the process, which is the run's own if the study ran them ``apart``.
        statistics: routing statistics on validation text; empty for dense designs.
        tokens_report: experts a token by token type and the tokens of each expert.
        history: one row a logged step.
        group_losses: validation loss of each group of documents, where the data has groups.
    """

    design: str
    seed: int
    causal: bool
    validation_loss: float
    bits_per_byte: float
    parameters: dict[str, float]
    flops_per_token: float
    training_flops: float
    tokens: int
    tokens_per_second: float
    peak_memory_bytes: int
    statistics: dict[str, Any] = field(default_factory=dict)
    tokens_report: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    group_losses: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunRecord:
        """The record that :meth:`to_dict` wrote."""
        return cls(**data)

    @property
    def feed_forward_experts(self) -> float:
        """Feed-forward experts a token, mean over MoE layers; 1 for a dense model."""
        return float(self.statistics.get("feed_forward_experts_per_token", 1.0))


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        OutputError: the folder cannot be written.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_text(text, encoding="utf-8", newline="\n")
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(
            f"cannot write {path} ({error.strerror or error}); give a place that can be written"
        ) from None


def write_json(path: Path, data: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of like columns as CSV, whole or not at all."""
    text = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
