"""Where a model can be adapted: the feed-forward parts and attention of its language model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moekit.errors import SpecError

PROJECTIONS = (nn.Linear, Conv1D)
_FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe")


@dataclass(frozen=True)
class Part:
    """One decoder layer's places, by their paths in the model.

    Attributes:
        feed_forward: the feed-forward part.
        projections: its projections, where it is dense.
        fused: fused parameters of its experts, where it is a mixture.
        attention: the projections of attention.
    """

    feed_forward: str
    projections: tuple[str, ...]
    fused: tuple[str, ...]
    attention: tuple[str, ...]


def parts_of(model: PreTrainedModel) -> list[Part]:
    """The parts of every decoder layer of a model's language model; a vision tower has none.

    Raises:
        SpecError: there are no decoder layers with a feed-forward part that is a module.
    """
    language: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    paths = {id(module): path for path, module in model.named_modules()}
    prefix = paths.get(id(language), "")
    found = []
    for path, layer in language.named_modules(prefix=prefix):
        children = dict(layer.named_children())
        name = next((name for name in _FEED_FORWARD if name in children), None)
        if name is not None and len(children) > 1:
            found.append(_part(f"{path}.{name}", children[name], path, layer))
    if not found:
        raise SpecError(
            f"{type(model).__name__} has no decoder layer with a feed-forward part under one of "
            f"the names {', '.join(_FEED_FORWARD)}; it cannot be adapted"
        )
    return found


def _part(path: str, part: nn.Module, layer_path: str, layer: nn.Module) -> Part:
    fused = tuple(
        f"{path}.{name}"
        for name, parameter in part.named_parameters()
        if parameter.ndim == 3 and name.endswith("_proj")
    )
    linears = tuple(
        f"{layer_path}.{name}"
        for name, module in layer.named_modules()
        if isinstance(module, PROJECTIONS)
    )
    inside = tuple(name for name in linears if name.startswith(f"{path}."))
    outside = tuple(name for name in linears if name not in inside)
    return Part(path, () if fused else inside, fused, outside)
