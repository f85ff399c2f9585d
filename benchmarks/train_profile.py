"""Where the time of a training step goes: attention, experts, and what routing adds to them.

A step of `moekit compare`'s model on random tokens: forward, losses, backward, clipping, AdamW and
the routing statistics that training takes. Parts of the forward pass are marked while torch's
profiler looks on, and each piece of the backward pass belongs to the part whose operation it
differentiates: the two have the same sequence number. Steps are also timed without the profiler,
with the experts run by each backend in turn, in random order.

    python benchmarks/train_profile.py --output benchmarks/results/train_profile

writes a JSON file and a Markdown table.
"""

from __future__ import annotations

import argparse
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from moekit.compare import ModelSpec
from moekit.compare.machine import machine
from moekit.compare.record import write_json, write_text
from moekit.dispatch import Dropless
from moekit.layer import MoESpec
from moekit.measure.roofline import interleaved
from moekit.models.language import MoEDecoderConfig, MoEDecoderForCausalLM
from moekit.systems import Shape, find
from moekit.training.window import RoutingWindow

CPU = torch.device("cpu")
SEQUENCES, LENGTH, VOCABULARY = 16, 128, 4096
BACKENDS = ("auto", "grouped_mm", "loop")
PART, WHOLE, REST = "part: ", "whole step", "the rest"
ENGINE = "autograd::engine::evaluate_function"
NESTED = 4  # marks within each other, at most
BOOKKEEPING = ("routing", "plan", "routing losses", "statistics")


class Step:
    """Training steps of one design.

    Args:
        design: name of a top-k design.
        backend: what runs its experts.
    """

    def __init__(self, design: str, backend: str) -> None:
        make = find(design).design
        assert make is not None
        (layer,) = make(Shape()).layers
        assert isinstance(layer, MoESpec)
        self.model = model_of(layer.replace(dispatch=Dropless(backend)))  # type: ignore[arg-type]
        self.window = RoutingWindow(self.model)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        generator = torch.Generator().manual_seed(0)
        self.token_BT = torch.randint(VOCABULARY, (SEQUENCES, LENGTH), generator=generator)

    def __call__(self) -> None:
        batch = {"input_ids": self.token_BT, "labels": self.token_BT}
        out = self.model(**batch, use_cache=False)
        with record_function(PART + "statistics"):
            self.window.add(out, batch)
        out.loss.backward()
        with record_function(PART + "optimiser"):
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimiser.step()
            self.optimiser.zero_grad()
        with record_function(PART + "statistics"):
            self.window.close_step()


def model_of(layer: MoESpec) -> MoEDecoderForCausalLM:
    """`moekit compare`'s decoder with this layer."""
    spec = ModelSpec()
    torch.manual_seed(0)
    config = MoEDecoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=spec.width,
        num_hidden_layers=spec.depth,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        tie_word_embeddings=spec.tie_embeddings,
        layers=layer,
    )
    return MoEDecoderForCausalLM(config).train()


@contextmanager
def marked(model: MoEDecoderForCausalLM) -> Iterator[None]:
    """Name the parts of a model's forward pass for the profiler."""
    undo: list[Callable[[], None]] = []

    def mark(owner: Any, name: str, part: str) -> None:
        own = name in vars(owner) or isinstance(getattr(type(owner), name, None), property)
        run = getattr(owner, name)

        def within(*args: Any, **named: Any) -> Any:
            with record_function(PART + part):
                return run(*args, **named)

        setattr(owner, name, within)
        undo.append(lambda: setattr(owner, name, run) if own else delattr(owner, name))

    for layer in model.moe_layers:
        mark(layer.router, "forward", "routing")
    rows: Any = import_module("moekit.dispatch.dispatch")
    mark(rows, "plan_rows", "plan")
    mark(rows, "feed_forward", "experts")
    mark(model.routing_losses, "forward", "routing losses")
    for block in model.model.layers:
        mark(block.self_attn, "forward", "attention")
    mark(model.lm_head, "forward", "head and cross-entropy")
    mark(model, "loss_function", "head and cross-entropy")
    try:
        yield
    finally:
        for call in reversed(undo):
            call()


class Spans:
    """Which part each moment of the forward pass belongs to."""

    def __init__(self, events: Sequence[Any]) -> None:
        marks = [e for e in events if e.name.startswith(PART)]
        self.marks = sorted(marks, key=lambda e: e.time_range.start)
        self.starts = [e.time_range.start for e in self.marks]

    def at(self, moment: float) -> str:
        """The part that is under way; inner marks come later than those around them."""
        for mark in reversed(self.marks[: bisect_right(self.starts, moment)][-NESTED:]):
            if moment <= mark.time_range.end:
                return str(mark.name[len(PART) :])
        return REST


def parts_of(step: Step, steps: int) -> dict[str, tuple[float, float]]:
    """Milliseconds a step by part, forward and backward."""
    with marked(step.model):
        for _ in range(3):
            step()
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            for _ in range(steps):
                with record_function(WHOLE):
                    step()
    events = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CPU]
    spans, backward = Spans(events), [e for e in events if e.name.startswith(ENGINE)]
    # An operation that records nothing shows the number of the next one that does, so the last
    # event of a number is the one that it belongs to.
    forward = sorted(events, key=lambda e: e.time_range.start)
    part_of = {
        e.sequence_nr: spans.at(e.time_range.start)
        for e in forward
        if e.sequence_nr >= 0 and not e.is_async and "Backward" not in e.name
    }
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for mark in spans.marks:
        found[mark.name[len(PART) :]][0] += mark.time_range.elapsed_us()
    for event in backward:
        found[part_of.get(event.sequence_nr, REST)][1] += event.time_range.elapsed_us()
    whole = sum(e.time_range.elapsed_us() for e in events if e.name == WHOLE)
    found[REST][0] = whole - sum(sum(both) for both in found.values())
    return {name: (a / steps / 1e3, b / steps / 1e3) for name, (a, b) in found.items()}


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/train_profile"))
    parser.add_argument("--design", default="topk")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    runs: dict[str, Callable[[], Tensor | None]] = {
        name: Step(options.design, name) for name in BACKENDS
    }
    seconds = interleaved(runs, CPU, options.steps)
    parts = parts_of(Step(options.design, "auto"), options.steps)
    where = machine("cpu")
    tokens = SEQUENCES * LENGTH
    whole = sum(sum(both) for both in parts.values())
    books = sum(sum(parts.get(name, (0.0, 0.0))) for name in BOOKKEEPING)
    lines = [
        f"# Where a training step goes: {options.design}",
        "",
        f"`python benchmarks/train_profile.py`; the default model of `moekit compare`, {SEQUENCES} "
        f"sequences of {LENGTH} tokens a step, float32; {where['device']}, {where['threads']} "
        f"threads, torch {where['torch']}; medians of {options.steps} steps in random order.",
        "",
        "| experts run by | ms a step | tokens/s |",
        "|---|---:|---:|",
        *(f"| `{n}` | {1e3 * s:.1f} | {tokens / s:,.0f} |" for n, s in seconds.items()),
        "",
        f"Under torch's profiler, which adds to it, a step with `auto` took {whole:.1f} ms:",
        "",
        "| part | forward, ms | backward, ms | share |",
        "|---|---:|---:|---:|",
        *(
            f"| {name} | {there:.2f} | {back:.2f} | {(there + back) / whole:.1%} |"
            for name, (there, back) in sorted(parts.items(), key=lambda item: -sum(item[1]))
        ),
        "",
        f"Routing, plan, routing losses and statistics together: {books / whole:.1%}. Backward, "
        f"{REST} is embedding, norms, residuals and adding up gradients.",
        "",
    ]
    write_text(options.output.with_suffix(".md"), "\n".join(lines))
    write_json(
        options.output.with_suffix(".json"),
        {"machine": where, "seconds": seconds, "parts_ms": parts, "tokens_a_step": tokens},
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
