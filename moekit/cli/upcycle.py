"""``moekit upcycle``: a mixture of experts made of a dense checkpoint."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import PreTrainedModel

from moekit.cli import options as opt
from moekit.cli.checkpoint import load_model
from moekit.compare.record import write_json
from moekit.data import load_tokenizer
from moekit.errors import OutputError
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
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"{output} is there already and would be replaced; choose another place")
    opt.require_writable(output.parent)
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
    _save(grown, tokenizer, found, output)
    inspect_checkpoint(str(output))
    if as_json:
        typer.echo(json.dumps({"output": str(output), **found}, indent=1))
        return
    typer.echo(
        f"{found['architecture']}: {found['parameters']:,} parameters, "
        f"{found['parameters_before']:,} before"
    )
    typer.echo(f"Model: {output} (an ordinary checkpoint of its architecture)")


def _save(model: PreTrainedModel, tokenizer: Any, report: dict[str, Any], output: Path) -> None:
    """All files under another name first, so that ``output`` is complete when it appears."""
    scratch = output.with_name(f".{output.name}.{secrets.token_hex(4)}")
    try:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(str(scratch))
        write_json(scratch / REPORT, report)
        if output.exists():
            output.rmdir()
        os.replace(scratch, output)
    except OSError as error:
        raise OutputError(f"cannot write {output}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
