"""From runs to a table and a verdict in words, with its uncertainty."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.special import stdtrit

from moekit.compare.record import RunRecord
from moekit.measure import ExpertPhaseResult

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """A mean over seeds.

    Attributes:
        mean: the mean.
        deviation: sample standard deviation; None for one value.
        half_width: half the 95% confidence interval of the mean (Student's t); None for one value.
    """

    mean: float
    deviation: float | None
    half_width: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of some values."""
        if len(values) < 2:
            return cls(values[0], None, None)
        deviation = statistics.stdev(values)
        quantile = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2))  # Student's t
        return cls(
            statistics.fmean(values), deviation, quantile * deviation / math.sqrt(len(values))
        )


@dataclass(frozen=True)
class DesignSummary:
    """One row of the table: a design over its seeds."""

    design: str
    seeds: int
    causal: bool
    loss: Spread
    bits_per_byte: Spread
    perplexity: Spread
    total_parameters: float
    active_parameters: float
    flops_per_token: float
    training_flops: float
    tokens_per_second: float
    peak_memory_bytes: float
    feed_forward_experts: Spread
    load_violation: Spread | None
    phase: ExpertPhaseResult | None

    def row(self) -> dict[str, Any]:
        """Plain values by column name, for CSV and JSON."""
        row: dict[str, Any] = {
            "design": self.design,
            "seeds": self.seeds,
            "causal": self.causal,
            "validation_loss": self.loss.mean,
            "validation_loss_sd": self.loss.deviation,
            "perplexity": self.perplexity.mean,
            "bits_per_byte": self.bits_per_byte.mean,
            "total_parameters": self.total_parameters,
            "active_parameters": self.active_parameters,
            "flops_per_token": self.flops_per_token,
            "training_flops": self.training_flops,
            "training_tokens_per_second": self.tokens_per_second,
            "peak_memory_bytes": self.peak_memory_bytes,
            "feed_forward_experts_per_token": self.feed_forward_experts.mean,
            "load_violation": None if self.load_violation is None else self.load_violation.mean,
        }
        if self.phase is not None:
            row["expert_phase_seconds_per_token"] = self.phase.seconds_per_token
            row["expert_phase_rows_per_token"] = self.phase.rows_per_token
        return row


def summarise(
    records: Sequence[RunRecord], phases: Mapping[str, ExpertPhaseResult] | None = None
) -> list[DesignSummary]:
    """One summary a design, in the order in which designs first appear."""
    names = list(dict.fromkeys(record.design for record in records))
    timed = phases or {}
    return [_summary([r for r in records if r.design == name], timed.get(name)) for name in names]


def _summary(runs: Sequence[RunRecord], phase: ExpertPhaseResult | None) -> DesignSummary:
    violations = [r.statistics.get("load_violation") for r in runs]
    measured = [float(v) for v in violations if v is not None]
    return DesignSummary(
        design=runs[0].design,
        seeds=len(runs),
        causal=runs[0].causal,
        loss=Spread.of([r.validation_loss for r in runs]),
        bits_per_byte=Spread.of([r.bits_per_byte for r in runs]),
        perplexity=Spread.of([math.exp(r.validation_loss) for r in runs]),
        total_parameters=runs[0].parameters["total"],
        active_parameters=runs[0].parameters["active"],
        flops_per_token=statistics.fmean(r.flops_per_token for r in runs),
        training_flops=statistics.fmean(r.training_flops for r in runs),
        tokens_per_second=statistics.fmean(r.tokens_per_second for r in runs),
        peak_memory_bytes=statistics.fmean(r.peak_memory_bytes for r in runs),
        feed_forward_experts=Spread.of([r.feed_forward_experts for r in runs]),
        load_violation=Spread.of(measured) if measured else None,
        phase=phase,
    )


def paired_difference(records: Sequence[RunRecord], better: str, worse: str) -> Spread:
    """Loss of ``worse`` minus loss of ``better`` over the seeds that both have.

    Runs of one seed share their data order, so their difference varies less than each of them.
    """
    losses = {(r.design, r.seed): r.validation_loss for r in records}
    seeds = sorted({r.seed for r in records})
    return Spread.of(
        [
            losses[worse, seed] - losses[better, seed]
            for seed in seeds
            if (worse, seed) in losses and (better, seed) in losses
        ]
    )
