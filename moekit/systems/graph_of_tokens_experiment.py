"""The check of the paper's claims: steadier routing, better and more robust language models.

Top-2 against the same layers with similarity-aware and attention-aware routing, on bytes of the
standard library's manual, clean and with 2.5% of them replaced at test time. Routing is compared
between the last five checkpoints, over the whole of the validation text. Beside it, the flips of
untrained routers under noise.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moekit.compare import Design, ModelSpec, StudySpec
from moekit.compare.budgets import small_model_study
from moekit.compare.record import write_json
from moekit.compare.run import build_model, on_device
from moekit.compare.summary import Spread
from moekit.compare.survey import survey
from moekit.data import TextData, prepare
from moekit.experts import SwiGLU
from moekit.layer import MoESpec
from moekit.measure import routing_fluctuation
from moekit.models.language import MoEDecoderForCausalLM
from moekit.routing import AttentionAware, RouterSpec, SimilarityAware, SwitchBalance, TopK
from moekit.systems.contaminated_text import SHARE, TEXT, contaminated_loss
from moekit.systems.experiment import Finding, Laboratory, Reproduction, judged
from moekit.systems.graph_of_tokens_stress import TEMPERATURES, flip_rates
from moekit.training import train
from moekit.training.checkpoints import checkpoints

BASELINE = "top-2"
ROUTERS: dict[str, RouterSpec] = {
    BASELINE: TopK(k=2),
    "similarity-aware": SimilarityAware(TopK(k=2)),
    "attention-aware": AttentionAware(TopK(k=2)),
}
MODEL = ModelSpec(width=64, depth=4, heads=4, kv_heads=4)
STEPS, SEEDS, KEPT = 1000, 3, 5
STRESS_SEEDS = 20


@dataclass(frozen=True)
class Score:
    """One trained model.

    Attributes:
        bits_per_byte, contaminated_bits: of the validation text, clean and contaminated.
        entropy: of a token's distribution over experts, in nats, mean over layers.
        changed_slots, changed_tokens: from one of the last checkpoints to the next, mean over
            pairs and layers.
        experts_per_token: mean active experts.
        tokens_per_second: in training.
    """

    bits_per_byte: float
    contaminated_bits: float
    entropy: float
    changed_slots: float
    changed_tokens: float
    experts_per_token: float
    tokens_per_second: float


Scores = Mapping[str, Sequence[Score]]


def experiment(lab: Laboratory) -> Reproduction:
    """Three designs at equal steps, and untrained routers under noise."""
    spec = _study(lab)
    data = prepare(spec.text, progress=lab.progress.preparing())
    found: dict[str, list[Score]] = {name: [] for name in ROUTERS}
    runs = [(design, seed) for seed in spec.seeds for design in spec.designs]
    for index, (design, seed) in enumerate(runs):
        trial = _Trial(spec, data, design, seed, (index, len(runs)))
        found[design.name].append(_stored_or_run(lab, trial))
    flips = [flip_rates(seed) for seed in range(lab.seed, lab.seed + STRESS_SEEDS)]
    return Reproduction(
        system="graph_of_tokens",
        setting=f"{_described(spec)}; contamination replaces {SHARE:.1%} of the bytes by others; "
        f"routing is compared between the last {KEPT} checkpoints, {_spacing(spec)} steps apart. "
        "Untrained: 64 tokens around 8 centres in 32 dimensions, noise of deviation 0.5, top-2 of "
        f"8 experts, {STRESS_SEEDS} draws",
        table=[*(_row(name, scores) for name, scores in found.items()), *_stress_rows(flips)],
        findings=(
            *(_steadier(found, name, lab.quick) for name in list(ROUTERS)[1:]),
            *(_more_certain(found, name, lab.quick) for name in list(ROUTERS)[1:]),
            *(
                _better(found, name, measure, claim, lab.quick)
                for measure, claim in _CLAIMS
                for name in list(ROUTERS)[1:]
            ),
            _fewer_flips(flips, lab.quick),
        ),
    )


def _study(lab: Laboratory) -> StudySpec:
    designs = [_design(name, router) for name, router in ROUTERS.items()]
    spec = small_model_study(designs, quick=lab.quick, seed=lab.seed, seeds=SEEDS, steps=STEPS)
    spec = spec.replace(model=MODEL, text=TEXT)
    training = spec.training.replace(save_every=_spacing(spec), keep=KEPT, eval_every=None)
    return spec.replace(training=training)


def _described(spec: StudySpec) -> str:
    """The setting in a sentence that does not depend on where Python is installed."""
    return spec.describe().replace(spec.text.source, "pydoc_data/topics.py of the standard library")


def _spacing(spec: StudySpec) -> int:
    return max(1, spec.training.steps // 15)


def _design(name: str, router: RouterSpec) -> Design:
    experts = SwiGLU(count=8, hidden=MODEL.width)
    return Design(name, (MoESpec(router, experts, losses=(SwitchBalance(0.01),)),))


@dataclass(frozen=True)
class _Trial:
    """One design of the study with one seed, and which of how many runs it is."""

    spec: StudySpec
    data: TextData
    design: Design
    seed: int
    place: tuple[int, int]

    @property
    def name(self) -> str:
        return f"{self.design.name}-seed{self.seed}"


def _stored_or_run(lab: Laboratory, trial: _Trial) -> Score:
    path = lab.output / f"{trial.name}.json"
    stored = _stored(path, trial.spec)
    if stored is not None:
        lab.progress.found(trial.design.name, trial.seed)
        return stored
    score = _run(lab, trial)
    write_json(path, {"study": trial.spec.to_dict(), "score": asdict(score)})
    return score


def _stored(path: Path, spec: StudySpec) -> Score | None:
    """The score of a finished run of the same study, if there is one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Score(**data["score"]) if data["study"] == spec.to_dict() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _run(lab: Laboratory, trial: _Trial) -> Score:
    spec, data, seed, name = trial.spec, trial.data, trial.seed, trial.design.name
    folder = lab.output / "training" / trial.name
    model = on_device(build_model(trial.design, spec.model, data, seed), lab.device)
    result = train(
        model,
        data,
        spec.training.replace(seed=seed),
        folder,
        progress=lab.progress.run(name, seed, *trial.place),
        description=f"{name}, seed {seed}",
    )
    found = survey(model, data, spec.training.batch_size)
    slots, tokens = _fluctuation(folder, data, lab.device)
    shutil.rmtree(folder)
    return Score(
        bits_per_byte=found.loss / math.log(2),
        contaminated_bits=contaminated_loss(model, data, seed) / math.log(2),
        entropy=found.statistics["entropy"],
        changed_slots=slots,
        changed_tokens=tokens,
        experts_per_token=found.statistics["experts_per_token"],
        tokens_per_second=result.tokens_per_second,
    )


def _fluctuation(folder: Path, data: TextData, device: str) -> tuple[float, float]:
    """Shares of slots and tokens that changed between the kept checkpoints, mean over all."""
    paths = checkpoints(folder)[-KEPT:]
    models = (on_device(MoEDecoderForCausalLM.from_pretrained(p), device) for p in paths)
    pairs = routing_fluctuation(models, data.validation)
    layers = [layer for pair in pairs for layer in pair]
    return (
        statistics.fmean(layer.changed_slots for layer in layers),
        statistics.fmean(layer.changed_tokens for layer in layers),
    )


# --- findings -----------------------------------------------------------------------------------

_CLAIMS = (
    ("bits_per_byte", "predicts clean text slightly better (WikiText-103)"),
    ("contaminated_bits", "predicts contaminated text better (word-swap attack)"),
)


def _values(found: Scores, name: str, measure: str) -> list[float]:
    return [getattr(score, measure) for score in found[name]]


def _listed(found: Scores, name: str, measure: str) -> str:
    return f"{name} " + ", ".join(f"{value:.4f}" for value in _values(found, name, measure))


def _in_every_seed(
    found: Scores, name: str, measure: str, claim: str, unit: str, quick: bool
) -> Finding:
    pairs = zip(_values(found, name, measure), _values(found, BASELINE, measure), strict=True)
    return Finding(
        claim=claim,
        measured=f"{unit} by seed: {_listed(found, name, measure)}; "
        f"{_listed(found, BASELINE, measure)}",
        verdict=judged(all(ours < plain for ours, plain in pairs), quick=quick),
    )


def _steadier(found: Scores, name: str, quick: bool) -> Finding:
    claim = f"{name} routing fluctuates less late in training than top-2; here: in every seed"
    unit = "share of slots that change between checkpoints"
    return _in_every_seed(found, name, "changed_slots", claim, unit, quick)


def _more_certain(found: Scores, name: str, quick: bool) -> Finding:
    claim = f"{name} routing has a lower entropy than top-2; here: in every seed"
    return _in_every_seed(found, name, "entropy", claim, "nats", quick)


def _better(found: Scores, name: str, measure: str, claim: str, quick: bool) -> Finding:
    """Undecided within the 95% interval of the paired gains."""
    pairs = zip(_values(found, BASELINE, measure), _values(found, name, measure), strict=True)
    gain = Spread.of([plain - ours for plain, ours in pairs])
    interval = "" if gain.half_width is None else f" ± {gain.half_width:.4f} (95%)"
    share = gain.mean / statistics.fmean(_values(found, BASELINE, measure))
    return Finding(
        claim=f"{name} {claim}",
        measured=f"{measure.replace('_', ' ')} of top-2 minus that of {name}: "
        f"{gain.mean:+.4f}{interval}, {share:+.2%}, paired by seed, {len(found[name])} runs",
        verdict=judged(
            gain.mean > 0,
            quick=quick,
            decided=gain.half_width is not None and abs(gain.mean) > gain.half_width,
        ),
    )


def _fewer_flips(flips: Sequence[Mapping[str, float]], quick: bool) -> Finding:
    smooth = f"τ {TEMPERATURES[-1]:g}"
    gain = Spread.of([draw["top-2"] - draw[smooth] for draw in flips])
    assert gain.half_width is not None
    means = {name: statistics.fmean(draw[name] for draw in flips) for name in flips[0]}
    return Finding(
        claim="averaging over similar tokens makes routing robust to noise, untrained too; here: "
        f"at {smooth} fewer slots flip",
        measured="share of slots that flip: "
        + ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())
        + f"; top-2 minus {smooth}: {gain.mean:+.3f} ± {gain.half_width:.3f} (95%)",
        verdict=judged(gain.mean > 0, quick=quick, decided=abs(gain.mean) > gain.half_width),
    )


def _row(name: str, scores: Sequence[Score]) -> dict[str, Any]:
    row: dict[str, Any] = {"design": name, "seeds": len(scores)}
    for measure in asdict(scores[0]):
        row[measure] = statistics.fmean(getattr(score, measure) for score in scores)
    return row


def _stress_rows(flips: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    return [
        {
            "design": f"untrained {name}",
            "seeds": len(flips),
            "changed_slots": statistics.fmean(draw[name] for draw in flips),
            "experts_per_token": 2.0,
        }
        for name in flips[0]
    ]
