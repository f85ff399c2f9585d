"""Whole models of transformers, with their experts run by each of its implementations and by ours.

Small models of seven families with random weights, unchanged but for the experts implementation.
Each generates tokens (one sequence, then eight), runs a prompt of 512 tokens, and takes a training
step without the optimiser; implementations take turns.

    python benchmarks/transformers_models.py --output benchmarks/results/transformers_models

writes a JSON file and a Markdown table.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from moekit.compare.machine import machine
from moekit.compare.record import write_json, write_text
from moekit.measure.roofline import interleaved
from moekit.surgery import register_experts

CPU = torch.device("cpu")
VOCABULARY, WIDTH, EXPERTS, HIDDEN = 4096, 512, 32, 512
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_experts_per_tok": 4,
    "pad_token_id": 0,
    "eos_token_id": None,
}
LATENT: dict[str, Any] = {
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "kv_lora_rank": 128,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
}
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "Mixtral": lambda: MixtralConfig(
        **SIZES, intermediate_size=HIDDEN, num_local_experts=EXPERTS, head_dim=64
    ),
    "Qwen2-MoE": lambda: Qwen2MoeConfig(
        **SIZES,
        moe_intermediate_size=HIDDEN,
        num_experts=EXPERTS,
        shared_expert_intermediate_size=HIDDEN,
    ),
    "Qwen3-MoE": lambda: Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=HIDDEN, num_experts=EXPERTS, head_dim=64
    ),
    "OLMoE": lambda: OlmoeConfig(**SIZES, intermediate_size=HIDDEN, num_experts=EXPERTS),
    "DeepSeek-V3": lambda: DeepseekV3Config(
        **SIZES, **LATENT, moe_intermediate_size=HIDDEN, n_routed_experts=EXPERTS
    ),
    "GPT-OSS": lambda: GptOssConfig(
        **SIZES, intermediate_size=HIDDEN, num_local_experts=EXPERTS, head_dim=64
    ),
    "Granite-MoE": lambda: GraniteMoeConfig(
        **SIZES, intermediate_size=HIDDEN, num_local_experts=EXPERTS
    ),
}
OURS = "moekit"
THEIRS = ("eager", "batched_mm", "grouped_mm")
NEW_TOKENS = 16
# What is left out for want of patience: an expert's weights are copied for each row, or a gradient
# of all experts' size is made for each of them.
LEFT_OUT = {
    "batched_mm": ("generate, 8 sequences", "prompt of 512", "training step of 512"),
    "eager": ("training step of 512",),
}

Job = Callable[[PreTrainedModel], None]


def tokens(sequences: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, VOCABULARY, (sequences, length), generator=generator)


def generate(sequences: int) -> Job:
    """Tokens for so many sequences, from a cache of what went before."""
    prompt_BT = tokens(sequences, 8)

    def run(model: PreTrainedModel) -> None:
        model.generate(
            input_ids=prompt_BT,
            attention_mask=torch.ones_like(prompt_BT),
            do_sample=False,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
        )

    return run


def prompt(model: PreTrainedModel) -> None:
    """512 tokens at once."""
    with torch.no_grad():
        model(input_ids=tokens(1, 512), use_cache=False)


def training_step(model: PreTrainedModel) -> None:
    """Forward and backward of 512 tokens; all gradients are made anew."""
    token_BT = tokens(4, 128)
    model.zero_grad()
    model(input_ids=token_BT, labels=token_BT, use_cache=False).loss.backward()
    model.zero_grad()


JOBS: dict[str, Job] = {
    "generate, 1 sequence": generate(1),
    "generate, 8 sequences": generate(8),
    "prompt of 512": prompt,
    "training step of 512": training_step,
}


def measure(family: str, dtype: str, repeats: int) -> list[dict[str, Any]]:
    """Median seconds of each job with each implementation."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=getattr(torch, dtype))
    rows = []
    for name, job in JOBS.items():
        names = [n for n in (OURS, *THEIRS) if name not in LEFT_OUT.get(n, ())]
        runs = {n: _run(model, n, job) for n in names}
        seconds = interleaved(runs, CPU, repeats)
        best = min(time for n, time in seconds.items() if n != OURS)
        rows.append(
            {
                "family": family,
                "dtype": dtype,
                "job": name,
                "seconds": seconds,
                "ratio": best / seconds[OURS],
            }
        )
    return rows


def _run(model: PreTrainedModel, implementation: str, job: Job) -> Callable[[], None]:
    def run() -> None:
        model.set_experts_implementation(implementation)
        job(model)

    return run


def table(rows: Iterable[dict[str, Any]]) -> str:
    """One line a family, dtype and job."""
    lines = [
        "| model | dtype | job | moekit, ms | eager, ms | batched_mm, ms | grouped_mm, ms | "
        "× the best of transformers |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        taken = [row["seconds"].get(name) for name in (OURS, *THEIRS)]
        cells = [f"{1e3 * time:.3g}" if time is not None else "" for time in taken]
        head = (row["family"], row["dtype"], row["job"])
        lines.append(f"| {' | '.join((*head, *cells))} | {row['ratio']:.2f} |")
    return "\n".join(lines) + "\n"


def summary(rows: list[dict[str, Any]]) -> str:
    """The geometric mean and the lowest ratio of each job."""
    lines = []
    for job in JOBS:
        ratios = [row["ratio"] for row in rows if row["job"] == job]
        mean = statistics.geometric_mean(ratios)
        lines.append(
            f"- {job}: {mean:.2f} times the best of transformers, {min(ratios):.2f} lowest"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/transformers_models")
    )
    parser.add_argument("--families", nargs="+", choices=tuple(FAMILIES), default=tuple(FAMILIES))
    dtypes = ("float32", "bfloat16")
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes[:1])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    register_experts()
    rows: list[dict[str, Any]] = []
    for dtype in options.dtypes:
        for family in options.families:
            rows += measure(family, dtype, options.repeats)
            print(table(rows[-len(JOBS) :]), flush=True)
    where = machine("cpu")
    head = (
        "# Models of transformers, by experts implementation\n\n"
        "`python benchmarks/transformers_models.py`; medians of "
        f"{options.repeats} turns; {where['device']}, {where['threads']} threads, torch "
        f"{where['torch']}, transformers {where['transformers']}. Four layers, D = {WIDTH}, "
        f"{EXPERTS} experts of H = {HIDDEN}, k = 4, vocabulary of {VOCABULARY}; generating is of "
        f"{NEW_TOKENS} tokens a sequence. Empty cells are contenders that take many times as long "
        "as others and were left out.\n\n"
    )
    write_text(options.output.with_suffix(".md"), head + summary(rows) + "\n" + table(rows))
    write_json(options.output.with_suffix(".json"), {"machine": where, "results": rows})


if __name__ == "__main__":
    main()
