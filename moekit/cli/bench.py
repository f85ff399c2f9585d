"""``moekit bench``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from moekit.cli import options as opt
from moekit.compare.machine import machine
from moekit.compare.record import write_json
from moekit.errors import SpecError
from moekit.measure.layer_bench import OURS, LayerBench, LayerTiming
from moekit.measure.layer_bench_report import report, results
from moekit.measure.layer_shapes import LayerShape, grid
from moekit.measure.merged_bench import Cost, Sizes, costs
from moekit.measure.roofline import LimitRuns
from moekit.measure.whole_layer_bench import WholeLayerBench
from moekit.measure.zero_computation_bench import ZeroComputationTiming, time_zero_computation

EXAMPLES = """\
  moekit bench layer --quick
  moekit bench layer --tokens 16,2048 --experts 64 --k 8 --dtypes bfloat16
"""
ONE_LAYER = {"experts": 32, "k": 4, "width": 512, "hidden": 512}  # if --tokens says no more
# MEO's rows, on a CPU.
MERGED = {True: Sizes(128, 256, 4, 128), False: Sizes(512, 1024, 8, 128)}
Experts = Annotated[int, typer.Option(help="Experts of that layer.", max=opt.LARGEST)]
TopK = Annotated[int, typer.Option("--k", help="Experts a token.")]
Hidden = Annotated[int, typer.Option(help="Hidden width of each expert.", max=opt.LARGEST)]
MODES = {"forward": (False,), "training": (True,), "both": (False, True)}


def layer_command(
    quick: Annotated[
        bool, typer.Option("--quick", help="Two small layers at few sizes: under a minute.")
    ] = False,
    tokens: Annotated[
        str | None,
        typer.Option(help="Rows, comma-separated, of one layer; nothing else is timed."),
    ] = None,
    experts: Experts = ONE_LAYER["experts"],
    k: TopK = ONE_LAYER["k"],
    width: opt.Width = ONE_LAYER["width"],
    hidden: Hidden = ONE_LAYER["hidden"],
    dtypes: Annotated[
        str, typer.Option(help="Comma-separated: float32, bfloat16, float16.")
    ] = "float32,bfloat16",
    mode: Annotated[str, typer.Option(help="forward, training (with backward) or both.")] = "both",
    whole: Annotated[
        bool, typer.Option("--whole", help="With the router in it: all that a model calls.")
    ] = False,
    all_backends: Annotated[
        bool, typer.Option("--all-backends", help="Time each of our backends, not our choice only.")
    ] = False,
    repeats: Annotated[int, typer.Option(help="Least timed turns of each contender.", min=1)] = 9,
    threads: Annotated[int, typer.Option(help="Threads; 0 for torch's default.", min=0)] = 0,
    output: Annotated[Path, typer.Option(help="Folder for the report and the results.")] = Path(
        "moekit-bench"
    ),
    seed: opt.Seed = 0,
    device: opt.Device = "auto",
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Time the MoE layer against transformers' backends and a dense layer of equal FLOPs.

    All contenders take turns on the same weights, tokens and routing. The report has medians,
    ratios, the share of this machine's measured limits, and memory. Without --whole everyone is
    given the routing. Run it on a machine that does nothing else; a grid of large layers needs
    about 10 GB of memory.
    """
    where = torch.device(opt.device_of(device))
    shapes = _shapes(quick, tokens, experts, k, width, hidden, _dtypes(dtypes), where.type)
    modes = _modes(mode)
    opt.require_writable(output)
    if threads:
        torch.set_num_threads(threads)
    console = Console(stderr=True, quiet=quiet)
    timings = []
    for timing in _timings(shapes, modes, where, repeats, seed, whole, all_backends):
        timings.append(timing)
        console.print(_line(timing), highlight=False, markup=False, soft_wrap=True)
        # Shape by shape, so that an interrupted run keeps what it measured.
        write_json(output / "layer.json", results(timings, [], [], machine(str(where))))
    zero, merged = ([], []) if tokens else _banks(quick, where, repeats, seed)
    found = results(timings, zero, merged, machine(str(where)))
    write_json(output / "layer.json", found)
    command = "moekit bench layer --whole" if whole else "moekit bench layer"
    page = report(timings, zero, merged, machine(str(where)), command)
    page.write(output / "report.html")
    if as_json:
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False))
        return
    _show(timings)
    typer.echo(page.lead)
    typer.echo(f"Report: {output / 'report.html'}")
    typer.echo(f"Results: {output / 'layer.json'}")


def _timings(
    shapes: list[LayerShape],
    modes: tuple[bool, ...],
    device: torch.device,
    repeats: int,
    seed: int,
    whole: bool,
    all_backends: bool,
) -> Iterator[LayerTiming]:
    limit_runs = {
        name: LimitRuns(device, getattr(torch, name)) for name in {s.dtype for s in shapes}
    }
    for shape in shapes:
        bench = (WholeLayerBench if whole else LayerBench)(shape, device, seed)
        for training in modes:
            names = set(bench.contenders(training))
            if not all_backends:
                names -= set(OURS) - {"moekit"}
            yield bench.time(limit_runs[shape.dtype], training, repeats, names)


def _banks(
    quick: bool, device: torch.device, repeats: int, seed: int
) -> tuple[list[ZeroComputationTiming], list[Cost]]:
    """What zero-computation experts save, and merged ones."""
    tokens = 512 if quick else 2048
    zero = time_zero_computation(device, tokens=tokens, repeats=repeats, seed=seed)
    merged = [] if device.type != "cpu" else costs(MERGED[quick], (1, 2, 4, 8), repeats)
    return zero, merged


def _shapes(
    quick: bool,
    tokens: str | None,
    experts: int,
    k: int,
    width: int,
    hidden: int,
    dtypes: list[str],
    device: str,
) -> list[LayerShape]:
    if tokens is None:
        for name, value in (("experts", experts), ("k", k), ("width", width), ("hidden", hidden)):
            if value != ONE_LAYER[name]:
                raise SpecError(f"--{name} is for one layer, not for the grid; add --tokens")
        return grid(quick, dtypes, device)
    if k > experts:
        raise SpecError(f"--k is {k} and there are {experts} experts; k is at most that")
    for name, value in (("experts", experts), ("k", k), ("width", width), ("hidden", hidden)):
        if value < 1:
            raise SpecError(f"--{name} is {value}; wanted at least 1")
    sizes = [_positive(text) for text in tokens.split(",")]
    return [LayerShape(n, experts, k, width, hidden, d) for d in dtypes for n in sizes]


def _positive(text: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise SpecError(f"--tokens has {text!r}; wanted numbers of at least 1, comma-separated")
    return int(text)


def _dtypes(names: str) -> list[str]:
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in ("float32", "bfloat16", "float16"):
            raise SpecError(f"--dtypes has {name!r}; known: float32, bfloat16, float16")
    if not wanted:
        raise SpecError("--dtypes is empty; give one, such as float32")
    return wanted


def _modes(mode: str) -> tuple[bool, ...]:
    if mode not in MODES:
        raise SpecError(f"--mode is {mode!r}; wanted one of {', '.join(MODES)}")
    return MODES[mode]


def _line(timing: LayerTiming) -> str:
    mode = "training" if timing.training else "forward"
    return (
        f"{timing.shape} {mode}: {1e3 * timing.seconds['moekit']:.3g} ms, "
        f"{timing.ratio:.2f} times transformers, {timing.share:.0%} of the {timing.bound} limit"
    )


def _show(timings: list[LayerTiming]) -> None:
    table = Table("shape", "mode", title="Speed of the MoE layer", box=box.SIMPLE_HEAD)
    for name in ("ms", "times\ntransformers", "of the\nlimit", "limit"):
        table.add_column(name, justify="right", no_wrap=True)
    for t in timings:
        table.add_row(
            str(t.shape),
            "training" if t.training else "forward",
            f"{1e3 * t.seconds['moekit']:.3g}",
            f"{t.ratio:.2f}",
            f"{t.share:.0%}",
            t.bound,
        )
    Console(highlight=False).print(table)
