"""``moekit graft``: null experts on a trained mixture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from moekit.cli import options as opt
from moekit.cli.checkpoint import load_base
from moekit.cli.result import require_place, write_model
from moekit.data import load_tokenizer
from moekit.errors import SpecError
from moekit.routing import NullAwareBalance
from moekit.surgery import add_null_experts
from moekit.surgery.grafted import Normalize

REPORT = "moekit_graft.json"
EXAMPLES = """\
  moekit graft my/mixtral --null-experts 8 --k 3 --output runs/adaptive
  moekit graft my/olmoe --null-experts 64 --k 12 --balance 0.02 --output runs/adaptive
"""


def graft_command(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="Folder or hub name of a Mixtral, Qwen2-MoE, Qwen3-MoE or OLMoE, or of a decoder "
            "of moekit's."
        ),
    ],
    null_experts: Annotated[
        int, typer.Option(help="Null experts of each mixture, a multiple of its experts.")
    ],
    k: Annotated[int, typer.Option("--k", help="Picks a token, null experts among them.")],
    balance: Annotated[
        float, typer.Option(help="Weight of the null-aware balance loss in training.")
    ] = 0.02,
    normalize: Annotated[
        str,
        typer.Option(
            help="A token's weights are divided by the sum over its true picks, or over all."
        ),
    ] = "true",
    output: Annotated[Path, typer.Option(help="Folder for the result.")] = Path("moekit-graft"),
    seed: opt.Seed = 0,
    as_json: opt.Json = False,
) -> None:
    """Give a mixture experts that compute nothing, so that tokens use as many experts as they need.

    Each router grows by copies of its own rows (AdaMoE), and a token picks --k of true and null
    experts together; the average number of true ones starts near k E / (E + null experts), and the
    balance loss, which is in the model's loss in training, keeps it there. Train the result before
    use, with any trainer: it is worse than the model it came from at first.
    """
    require_place(output)
    loss = NullAwareBalance(weight=balance)
    model = load_base(checkpoint)
    words = load_tokenizer(checkpoint)
    if normalize not in get_args(Normalize):
        raise SpecError(
            f"--normalize is {normalize!r}; wanted one of {', '.join(get_args(Normalize))}"
        )
    grown = add_null_experts(model, null_experts, k, loss, seed, cast("Normalize", normalize))
    found: dict[str, object] = {
        "source": checkpoint,
        "null_experts": null_experts,
        "k": k,
        "balance": balance,
        "normalize": normalize,
        "seed": seed,
        "parameters_before": model.num_parameters(),
        "parameters": grown.num_parameters(),
    }
    write_model(grown, words, output, {REPORT: found})
    if as_json:
        typer.echo(json.dumps({"output": str(output), **found}, indent=1))
        return
    typer.echo(f"{found['parameters']:,} parameters, {found['parameters_before']:,} before")
    typer.echo(f"Model: {output} ({type(grown).__name__}; loads where moekit is imported)")
