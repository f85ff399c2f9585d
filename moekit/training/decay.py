"""Which parameters weight decay shrinks."""

from __future__ import annotations

from torch import nn

from moekit.experts.zero_computation import ConstantExperts


def decays(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether AdamW decays ``parameter``, which ``module`` holds as ``name``.

    Matrices decay, routers and experts included. Norm scales and biases do not, for they set
    scales and offsets that have no reason to be near zero (GPT-3's and Llama's practice);
    embeddings do not, since a rare token's row would shrink between its uses (OLMo 2); nor do the
    output vectors of constant experts, which are biases that a router selects.
    """
    if isinstance(module, nn.Embedding) or parameter.ndim < 2:
        return False
    if isinstance(module, ConstantExperts) and name == "constant":
        return False
    return "bias" not in name


def decayed_names(model: nn.Module) -> list[str]:
    """The full names of the parameters that decay; a shared one counts as its first owner's."""
    found, seen = [], set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix="", recurse=False):
            if parameter in seen:
                continue
            seen.add(parameter)
            if decays(module, name, parameter):
                found.append(f"{prefix}.{name}" if prefix else name)
    return found
