"""``moekit generate``: text from a checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn
from transformers import PreTrainedTokenizerBase

from moekit.cli import options as opt
from moekit.cli.checkpoint import load_model
from moekit.compare.record import write_text
from moekit.data import load_tokenizer
from moekit.errors import SpecError

EXAMPLES = """\
  moekit generate runs/moepp/model --prompt "def read(" --tokens 80
  moekit generate runs/moepp/model --temperature 0.8 --top-p 0.9 --samples 3
  moekit generate runs/moepp/model --prompt-file start.txt --beams 4 --json
"""


def generate_command(
    checkpoint: Annotated[
        str, typer.Argument(help="Folder or hub name of a causal language model.")
    ],
    prompt: Annotated[str, typer.Option(help="Text to go on from.")] = "",
    prompt_file: Annotated[Path | None, typer.Option(help="A file with the prompt.")] = None,
    tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among so many tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among tokens of this probability.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 avoids repetition.")] = 1.0,
    beams: Annotated[int, typer.Option(help="Beams of a beam search.")] = 1,
    samples: Annotated[int, typer.Option(help="Continuations to return.")] = 1,
    output: Annotated[Path | None, typer.Option(help="Write the text to this file.")] = None,
    seed: opt.Seed = 0,
    device: opt.Device = "auto",
    as_json: opt.Json = False,
) -> None:
    """Continue a prompt with a causal language model."""
    where = opt.device_of(device)
    _check(tokens, temperature, top_k, top_p, repetition_penalty, beams, samples)
    text = _prompt(prompt, prompt_file)
    if output is not None:
        opt.require_writable(output.parent)
    model: Any = nn.Module.to(load_model(checkpoint), where)
    tokenizer = load_tokenizer(checkpoint)
    ids_1T = _prompt_ids(tokenizer, text).to(where)
    torch.manual_seed(seed)
    sampling = temperature > 0
    choice = {"temperature": temperature, "top_k": top_k, "top_p": top_p} if sampling else {}
    out_ST = model.generate(
        ids_1T,
        attention_mask=torch.ones_like(ids_1T),
        max_new_tokens=tokens,
        do_sample=sampling,
        num_beams=beams,
        num_return_sequences=samples,
        repetition_penalty=repetition_penalty,
        pad_token_id=tokenizer.pad_token_id,
        **choice,
    )
    start = ids_1T.shape[1]
    found = [str(tokenizer.decode(row[start:], skip_special_tokens=True)) for row in out_ST]
    _deliver(text, found, output, as_json)


def _check(
    tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    repetition_penalty: float,
    beams: int,
    samples: int,
) -> None:
    if tokens < 1:
        raise SpecError(f"--tokens is {tokens}; wanted at least 1")
    if not 0 <= temperature < math.inf:
        raise SpecError(f"--temperature is {temperature}; wanted a number from 0")
    if top_k < 0:
        raise SpecError(f"--top-k is {top_k}; wanted 0 or more")
    if not 0 < top_p <= 1:
        raise SpecError(f"--top-p is {top_p}; wanted more than 0 and at most 1")
    if not 0 < repetition_penalty < math.inf:
        raise SpecError(f"--repetition-penalty is {repetition_penalty}; wanted more than 0")
    if beams < 1 or samples < 1:
        raise SpecError("--beams and --samples must be at least 1")
    if temperature == 0 and samples > beams:
        raise SpecError(
            f"{samples} samples without sampling would be equal; set --temperature above 0, "
            "or --beams to at least as many"
        )


def _prompt(prompt: str, prompt_file: Path | None) -> str:
    if prompt_file is None:
        return prompt
    if prompt:
        raise SpecError("give --prompt or --prompt-file, not both")
    try:
        return prompt_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{prompt_file} cannot be read as text: {error}") from None


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """The prompt's ids (1, T); an empty prompt starts from the tokenizer's start of text."""
    if text:
        return tokenizer(text, return_tensors="pt").input_ids
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise SpecError("this tokenizer has no start of text; give a --prompt")
    return torch.tensor([[start]])


def _deliver(prompt: str, found: list[str], output: Path | None, as_json: bool) -> None:
    if as_json:
        text = json.dumps({"prompt": prompt, "continuations": found}, ensure_ascii=False, indent=1)
    else:
        text = "\n\n".join(prompt + continuation for continuation in found)
    if output is not None:
        write_text(output, text + "\n")
    typer.echo(text if as_json or output is None else f"Written to {output}")
