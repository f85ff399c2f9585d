"""Unlearning one domain of text: one attributed expert against all experts, by each algorithm.

The checkpoints are those of benchmarks/domain_models.py, with the text that they were trained on.
Every arm forgets the same domain until perplexity on its held-out text is four times what it was.
What is compared is the perplexity of the other domains at that point: between the two looks around
it the logarithm of one perplexity is interpolated linearly in that of the other.

    python benchmarks/unlearning.py runs/domains --forget shakespeare --seeds 3

writes a JSON file, a Markdown table and a plot; runs that are done are not run again.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from moekit.compare.machine import machine
from moekit.compare.record import write_json, write_text
from moekit.data import load_tokenizer, read_documents
from moekit.errors import DivergedError
from moekit.surgery import block_views
from moekit.surgery.unlearn import (
    GA,
    NPO,
    RMU,
    Algorithm,
    AllExperts,
    Attributed,
    Everything,
    GDiff,
    RandomExperts,
    Routers,
    Targets,
    Texts,
    UnlearnSpec,
    attribute_experts,
    select_experts,
    unlearn_model,
)

UNTIL, STEPS, LENGTH = 4.0, 60, 128
FEW, WIDE, EVERY = 1e-3, 3e-4, 1e-4  # learning rates: a few experts, all of them, all parameters
RMU_WEIGHT = 1.0  # the paper's 1200 holds models of this size so firmly that nothing is forgotten


class Blocks:
    """Sequences of one length from the documents of one kind.

    Args:
        rows: token ids.
    """

    def __init__(self, rows: Sequence[list[int]]) -> None:
        self.rows = [torch.tensor(row) for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index]}


@dataclass(frozen=True)
class Arm:
    """One way to unlearn.

    Attributes:
        algorithm, trained: its row.
        spec: the run.
    """

    algorithm: str
    trained: str
    spec: UnlearnSpec


def arms(layer: int, layers: tuple[int, ...]) -> Iterator[Arm]:
    """Every algorithm on one expert and on all, then the baselines under gradient ascent.

    Args:
        layer: whose output RMU steers.
        layers: those that RMU trains all experts of.
    """
    rmu = RMU(layer=layer, weight=RMU_WEIGHT)
    one, every = Attributed(), AllExperts()
    for algorithm in (GA(), GDiff(), NPO(), rmu):
        wide = AllExperts(layers=layers) if isinstance(algorithm, RMU) else every
        yield _arm("one expert, α = 1", algorithm, one, FEW)
        yield _arm("all experts", algorithm, wide, WIDE)
    ga = GA()
    yield _arm("one expert, α = 0", ga, one, FEW, anchor=0.0)
    yield _arm("one expert, router frozen", ga, Attributed(router=False), FEW)
    yield _arm("random expert, α = 1", ga, RandomExperts(), FEW)
    yield _arm("three experts, same layer", ga, Attributed(count=3, scope="layer"), FEW)
    yield _arm("three experts, any layer", ga, Attributed(count=3), FEW)
    yield _arm("routers", ga, Routers(), FEW)
    yield _arm("all parameters", ga, Everything(), EVERY)


def _arm(
    name: str, algorithm: Algorithm, targets: Targets, rate: float, anchor: float = 1.0
) -> Arm:
    spec = UnlearnSpec(
        algorithm=algorithm,
        targets=targets,
        anchor=anchor,
        steps=STEPS,
        until=UNTIL,
        check_every=2,
        learning_rate=rate,
        batch_size=8,
        accumulate=1,
    )
    return Arm(algorithm.name, name, spec)


def texts_of(path: Path, tokenizer: Any, domain: str) -> Texts:
    """The domain to forget, and all others, in training and held-out parts."""
    documents = list(read_documents(str(path)))
    random.Random(0).shuffle(documents)

    def blocks(split: str, forget: bool, count: int) -> Blocks:
        rows: list[list[int]] = []
        for document in documents:
            if document.split == split and (document.group == domain) == forget:
                ids = tokenizer(document.text)["input_ids"]
                # At most ten blocks a document, so that long ones do not crowd the others out.
                rows += [ids[i : i + LENGTH] for i in range(0, len(ids) - LENGTH + 1, LENGTH)][:10]
        random.Random(1).shuffle(rows)
        return Blocks(rows[:count])

    return Texts(
        forget=blocks("train", True, 800),
        retain=blocks("train", False, 800),
        forget_held_out=blocks("test", True, 24),
        retain_held_out=blocks("test", False, 64),
    )


def measured(folder: Path, arm: Arm, texts: Texts, seed: int) -> dict[str, Any]:
    """One run."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(folder)
    spec = arm.spec.replace(seed=seed)
    if isinstance(spec.targets, RandomExperts):
        spec = spec.replace(targets=spec.targets.replace(seed=seed))
    started = time.perf_counter()
    try:
        report = unlearn_model(model, texts, spec)
    except DivergedError as error:
        return {"diverged": str(error)}
    return {
        "seconds": time.perf_counter() - started,
        "matched_retain": report.retain_perplexity_at(UNTIL),
        **report.to_dict(),
    }


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean over seeds of what the table shows."""
    done = [run for run in runs if "diverged" not in run]
    reached = [run for run in done if run["matched_retain"] is not None]

    def spread(values: list[float]) -> tuple[float, float] | None:
        if not values:
            return None
        return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0

    overlaps = [statistics.mean(run["overlap"]["forget"]) for run in done]
    kept = [statistics.mean(run["overlap"]["retain"]) for run in done]
    return {
        "seeds": len(runs),
        "reached": len(reached),
        "forget": spread([run["forget"]["after"]["perplexity"] for run in done]),
        "retain": spread([run["matched_retain"] for run in reached]),
        "overlap_forget": spread(overlaps),
        "overlap_retain": spread(kept),
        "share": spread([run["changed_share"] for run in done]),
        "steps": spread([run["steps"] for run in done]),
        "experts": sorted({f"{e['layer']}:{e['expert']}" for r in done for e in r["experts"]}),
    }


def table(name: str, rows: Sequence[dict[str, Any]], before: tuple[float, float]) -> str:
    """One model's arms as Markdown."""
    lines = [
        f"## {name}",
        "",
        f"Before: perplexity {before[0]:.1f} on the domain, {before[1]:.1f} on the others.",
        "",
        "| algorithm | trained | others' perplexity at 4x | reached | overlap, forget text | "
        "overlap, other text | parameters changed | steps | layer:expert |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        found = row["summary"]
        experts = ", ".join(found["experts"]) if len(found["experts"]) <= 4 else "several"
        share = "" if found["share"] is None else f"{found['share'][0]:.2%}"
        lines.append(
            f"| {row['algorithm']} | {row['trained']} | {_pm(found['retain'], '.2f')} | "
            f"{found['reached']}/{found['seeds']} | {_pm(found['overlap_forget'], '.3f')} | "
            f"{_pm(found['overlap_retain'], '.3f')} | {share} | "
            f"{_pm(found['steps'], '.0f')} | {experts} |"
        )
    return "\n".join(lines) + "\n"


def _pm(value: tuple[float, float] | None, form: str) -> str:
    return "" if value is None else f"{value[0]:{form}} ± {value[1]:{form}}"


def plot(results: dict[str, Any], path: Path) -> None:
    """Perplexity of the others over that of the domain, along each run of the first seed."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(results), 4, figsize=(15, 3.6 * len(results)), squeeze=False, sharex="row", sharey="row"
    )
    for line, (name, found) in zip(axes, results.items(), strict=True):
        for axis, algorithm in zip(line, ("ga", "gdiff", "npo", "rmu"), strict=True):
            for row in found["rows"]:
                looks = row["runs"][0].get("looks", [])
                if row["algorithm"] == algorithm and row["trained"] != "routers":
                    axis.plot(
                        [look["forget_perplexity"] for look in looks],
                        [look["retain_perplexity"] for look in looks],
                        label=row["trained"],
                        marker=".",
                    )
            axis.axvline(UNTIL * found["before"][0], color="gray", linestyle=":")
            axis.set(xscale="log", yscale="log", title=f"{name}, {algorithm}")
            axis.set_xlabel("perplexity, forgotten domain")
            axis.legend(fontsize=7)
        line[0].set_ylabel("perplexity, other domains")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def study(folder: Path, texts: Texts, seeds: int, work: Path) -> dict[str, Any]:
    """All arms on one model."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    moe = [view.index for view in block_views(model)]
    scores_LE = attribute_experts(model, texts.forget)
    best = moe[select_experts(scores_LE)[0][0]]
    layer = max(best, min(2, moe[-1]))
    layers = tuple(index for index in moe if layer - 2 <= index <= layer)
    rows = []
    for arm in arms(layer, layers):
        runs = []
        for seed in range(seeds):
            label = f"{folder.name}-{arm.algorithm}-{arm.trained}-{seed}"
            path = work / f"{label.replace(' ', '_').replace(',', '')}.json"
            if not path.exists():
                write_json(path, measured(folder, arm, texts, seed))
            runs.append(json.loads(path.read_text()))
            print(label, runs[-1].get("matched_retain"), runs[-1].get("steps"), flush=True)
        rows.append(
            {
                "algorithm": arm.algorithm,
                "trained": arm.trained,
                "summary": summary(runs),
                "runs": runs,
            }
        )
    first = rows[0]["runs"][0]
    before = tuple(first[side]["before"]["perplexity"] for side in ("forget", "retain"))
    return {
        "before": before,
        "parameters": first["parameters"],
        "affinity": scores_LE.tolist(),
        "rows": rows,
    }


def main() -> None:
    """Run the study, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, help="output folder of benchmarks/domain_models.py")
    parser.add_argument("--names", nargs="+", default=["olmoe", "deepseek"])
    parser.add_argument("--forget", default="shakespeare", help="domain to forget")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/unlearning"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/unlearning"))
    options = parser.parse_args()
    disable_progress_bar()
    set_verbosity_error()
    results = {}
    for name in options.names:
        folder = options.models / name
        tokenizer = load_tokenizer(str(folder))
        texts = texts_of(options.models / "texts.jsonl", tokenizer, options.forget)
        results[name] = study(folder, texts, options.seeds, options.work / options.forget)
    where = machine("cpu")
    head = (
        f"# Unlearning {options.forget}: one expert against all\n\n"
        f"`python benchmarks/unlearning.py ... --forget {options.forget} --seeds {options.seeds}`; "
        f"{where['device']}, {where['threads']} threads, torch {where['torch']}. Batches of 8 "
        f"sequences of {LENGTH} tokens, AdamW, learning rate {FEW:g} for a few experts and "
        f"routers, {WIDE:g} for all experts, {EVERY:g} for all parameters, at most {STEPS} steps, "
        f"a look every second. RMU's retain weight is {RMU_WEIGHT:g}. Every arm is compared where "
        f"perplexity on held-out text of the domain is {UNTIL:g} times what it was; overlap and "
        "parameters are of the end of the run, which is a step or two later. ± is the standard "
        "deviation over seeds of data order (and of the random expert).\n\n"
    )
    parts = [table(name, found["rows"], found["before"]) for name, found in results.items()]
    write_text(options.output.with_suffix(".md"), head + "\n".join(parts))
    write_json(options.output.with_suffix(".json"), {"machine": where, "models": results})
    plot(results, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
