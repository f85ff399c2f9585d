"""Every experts module that transformers decorates, built small."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers.models
from torch import nn

DECORATOR = "@use_experts_implementation"
FAMILIES = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
)


def configuration(experts: int, width: int, hidden: int) -> SimpleNamespace:
    """What the constructors of experts modules read, under the name that each model has for it."""
    sizes = dict.fromkeys(FAMILIES, experts)
    sizes |= dict.fromkeys(("hidden_size", "moe_hidden_size", "moe_latent_size"), width)
    sizes |= dict.fromkeys(("intermediate_size", "moe_intermediate_size"), hidden)
    sizes |= dict.fromkeys(("ffn_hidden_size", "expert_ffn_hidden_size"), hidden)
    names = ("hidden_act", "hidden_activation", "mlp_hidden_act")
    return SimpleNamespace(
        **sizes,
        **dict.fromkeys(names, "silu"),
        swiglu_limit=1.0,
        swiglu_alpha=1.7,
        swiglu_beta=1.0,
        mlp_gate_softcap=2.0,
        mlp_up_softcap=2.0,
        post_norm_eps=1e-5,
        rms_norm_eps=1e-5,
        _experts_implementation="eager",
    )


def decorated() -> list[str]:
    """``package:Class`` of every decorated experts module, found in the sources."""
    found = []
    for package in pkgutil.iter_modules(transformers.models.__path__):
        folder = Path(transformers.models.__path__[0]) / package.name
        source = folder / f"modeling_{package.name}.py"
        if package.ispkg and source.exists() and f"\n{DECORATOR}" in source.read_text("utf-8"):
            lines = source.read_text("utf-8").splitlines()
            marked = [i for i, line in enumerate(lines) if line.startswith(DECORATOR)]
            for i in marked:
                name = next(line for line in lines[i:] if line.startswith("class "))
                found.append(f"{package.name}:{name[6:].split('(')[0].rstrip(':')}")
    return found


def build(name: str, experts: int, width: int, hidden: int, dtype: torch.dtype) -> nn.Module:
    """The experts module ``name`` with random parameters."""
    package, cls = name.split(":")
    module = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    kind = getattr(module, cls)
    assert next(iter(inspect.signature(kind.__init__).parameters)) == "self"
    built: nn.Module = kind(configuration(experts, width, hidden))
    generator = torch.Generator().manual_seed(experts * 1000 + width)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return built.to(dtype)
