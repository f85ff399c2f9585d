"""``moekit upcycle``: a mixture of experts made of a dense checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from moekit.cli import options as opt
from moekit.cli.checkpoint import load_model
from moekit.cli.result import require_free, write_model
from moekit.data import load_tokenizer
from moekit.measure import inspect_checkpoint
from moekit.surgery.upcycle_dense import Upcycling, upcycle_dense

REPORT = "moekit_upcycle.json"
EXAMPLES = """\
  moekit upcycle my/llama --experts 8 --k 2 --output runs/mixture
  moekit upcycle my/qwen3 --experts 16 --k 4 --layers every-other --output runs/mixture
  moekit upcycle my/mistral --reinit 0.5 --seed 1 --output runs/dropped
"""


def upcycle_command(
    checkpoint: Annotated[
        str, typer.Argument(help="Folder or hub name of a dense Llama, Mistral or Qwen3.")
    ],
    experts: Annotated[int, typer.Option(help="Experts of each mixture.")] = 8,
    k: Annotated[int, typer.Option("--k", help="Experts a token.")] = 2,
    layers: Annotated[
        str,
        typer.Option(
            help="Layers that become mixtures: all, every-other or last-half; Llama and Mistral: "
            "all."
        ),
    ] = "all",
    router_std: Annotated[
        float, typer.Option(help="Standard deviation of the routers' weights.")
    ] = 0.02,
    reinit: Annotated[
        float, typer.Option(help="Share of each expert's hidden neurons that is drawn anew.")
    ] = 0.0,
    noise: Annotated[
        float,
        typer.Option(help="Standard deviation of noise on expert weights, in their own."),
    ] = 0.0,
    output: Annotated[Path, typer.Option(help="Folder for the result.")] = Path("moekit-upcycle"),
    seed: opt.Seed = 0,
    as_json: opt.Json = False,
) -> None:
    """Write a mixture whose experts start as copies of a dense model's feed-forward parts.

    Llama and Mistral become Mixtral, Qwen3 becomes Qwen3-MoE, and transformers loads the result as
    such. Without --reinit and --noise it computes what the dense model does, to rounding, until it
    is trained. Both models are in memory at once.
    """
    spec = Upcycling(experts, k, layers, router_std, reinit, noise, seed)  # type: ignore[arg-type]
    require_free(output)
    dense = load_model(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    grown = upcycle_dense(dense, spec)
    found = {
        "source": checkpoint,
        "architecture": type(grown).__name__,
        "upcycling": spec.to_dict(),
        "parameters_before": dense.num_parameters(),
        "parameters": grown.num_parameters(),
    }
    write_model(grown, tokenizer, output, {REPORT: found})
    inspect_checkpoint(str(output))
    if as_json:
        typer.echo(json.dumps({"output": str(output), **found}, indent=1))
        return
    typer.echo(
        f"{found['architecture']}: {found['parameters']:,} parameters, "
        f"{found['parameters_before']:,} before"
    )
    typer.echo(f"Model: {output} (an ordinary checkpoint of its architecture)")
