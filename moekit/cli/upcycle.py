"""``moekit upcycle``: a mixture of experts made of a dense checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from moekit.cli import options as opt
from moekit.cli.checkpoint import load_base
from moekit.cli.result import require_place, write_model
from moekit.compare.record import write_json
from moekit.data import load_tokenizer
from moekit.errors import SpecError
from moekit.experts import FeedForwardSpec
from moekit.layer import MoESpec
from moekit.measure import inspect_checkpoint
from moekit.measure.inspect import read_config
from moekit.models.language import MoEDecoderConfig, MoEDecoderForCausalLM
from moekit.routing import TopK
from moekit.surgery import Upcycling, local_folder, upcycle, upcycle_checkpoint
from moekit.training import RichProgress, SilentProgress

REPORT = "moekit_upcycle.json"
EXAMPLES = """\
  moekit upcycle my/llama --experts 8 --k 2 --output runs/mixture
  moekit upcycle my/qwen3 --experts 16 --k 4 --layers every-other --output runs/mixture
  moekit upcycle my/mistral --reinit 0.5 --seed 1 --output runs/dropped
"""


def upcycle_command(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="Folder or hub name of a dense Llama, Mistral, Qwen2 or Qwen3, or a "
            "dense decoder of moekit's."
        ),
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
    quiet: opt.Quiet = False,
) -> None:
    """Write a mixture whose experts start as copies of a dense model's feed-forward parts.

    Llama and Mistral become Mixtral, Qwen2 becomes Qwen2-MoE, Qwen3 becomes Qwen3-MoE, and
    transformers loads the result as such; a dense decoder of moekit's becomes one with mixtures.
    Without --reinit and --noise it computes what the dense model does, to rounding, until it is
    trained. One layer is in memory at a time, and the checkpoint that you give is only read.
    """
    spec = Upcycling(experts, k, layers, router_std, reinit, noise, seed)  # type: ignore[arg-type]
    require_place(output)
    folder = local_folder(checkpoint)
    reporter = SilentProgress() if quiet else RichProgress()
    config = read_config(str(folder), is_local=True)
    found: dict[str, Any] = {}

    def add_report(made: Path) -> None:
        grown = inspect_checkpoint(str(made))
        found.update(
            source=checkpoint,
            architecture=grown.architecture,
            upcycling=spec.to_dict(),
            parameters_before=inspect_checkpoint(str(folder)).total,
            parameters=grown.total,
        )
        write_json(made / REPORT, found)

    if isinstance(config, MoEDecoderConfig):
        _own_decoder(str(folder), spec, output, add_report)
    else:
        upcycle_checkpoint(folder, output, spec, reporter, add_report)
    if as_json:
        typer.echo(json.dumps({"output": str(output), **found}, indent=1))
        return
    typer.echo(
        f"{found['architecture']}: {found['parameters']:,} parameters, "
        f"{found['parameters_before']:,} before"
    )
    typer.echo(f"Model: {output} (an ordinary checkpoint of its architecture)")


def _own_decoder(
    folder: str, spec: Upcycling, output: Path, finish: Callable[[Path], None]
) -> None:
    """A dense decoder of moekit's, in memory."""
    plain = Upcycling(spec.experts, spec.k, seed=spec.seed)
    if spec != plain:
        raise SpecError(
            "a decoder of moekit's is upcycled in all layers by plain copies; leave --layers, "
            "--router-std, --reinit and --noise out"
        )
    dense = load_base(folder)
    assert isinstance(dense, MoEDecoderForCausalLM)
    bank, *others = set(dense.config.layer_specs)
    if others or not isinstance(bank, FeedForwardSpec):
        raise SpecError(f"{folder} is no decoder whose layers are all dense and alike")
    layer = MoESpec(TopK(k=spec.k), bank.replace(count=spec.experts))
    write_model(upcycle(dense, layer, spec.seed), load_tokenizer(folder), output, finish=finish)
