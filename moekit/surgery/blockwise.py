"""A checkpoint run block by block, in about the memory of one block.

The model's own code runs: it is built without weights, one decoder layer at a time is given its
tensors, and in every forward pass the other layers are stand-ins that hand on what they are given.
So masks, positions and scalings are those of the architecture, whatever they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moekit.measure.memory import release_freed_memory
from moekit.measure.observe import TokenBatch
from moekit.surgery.checkpoint import Checkpoint
from moekit.surgery.view import BlockView
from moekit.surgery.view_architecture import Architecture

State = tuple[Any, ...]
"""What one decoder layer hands to the next: the hidden states, and a carry where there is one."""


class BlockwiseModel:
    """A checkpoint whose parts are loaded, run and dropped one after the other.

    At its highest the memory is that of one decoder layer's weights, or of the embedding or the
    output projection where those are larger, and of the activations of one batch, beside whatever
    states the caller keeps: (tokens, D) for one layer of all of its batches.

    Args:
        checkpoint: what to run.
        device: where to compute.

    Attributes:
        checkpoint: the checkpoint.
        layers: the decoder layers, empty but for those loaded.
        blocks: the view of each layer's MoE block; None for a dense layer.
    """

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu") -> None:
        self.checkpoint = checkpoint
        self.device = torch.device(device)
        self._model: Any = checkpoint.skeleton().eval()  # type: ignore[no-untyped-call]
        inner: Any = getattr(self._model, "inner", self._model)
        self._base: Any = inner.base_model
        path = next(name for name, m in self._model.named_modules() if m is self._base)
        self._prefix = f"{path}."
        self.layers: list[nn.Module] = list(self._base.layers)
        self.blocks = [self._view(index) for index in range(len(self.layers))]
        rotary = self._base.rotary_emb
        self._base.rotary_emb = type(rotary)(config=self._base.config).to(self.device)
        self._embed, self._norm = self._base.embed_tokens, self._base.norm

    @property
    def largest_layer_bytes(self) -> int:
        """Size of the largest decoder layer in the type that the model computes in."""
        size = self.checkpoint.dtype.itemsize
        return size * max(sum(p.numel() for p in layer.parameters()) for layer in self.layers)

    @contextmanager
    def loaded(self, index: int, as_stored: bool = False) -> Iterator[nn.Module]:
        """The decoder layer with its weights, which it loses afterwards.

        Args:
            index: its number.
            as_stored: leave the weights in the types that they are stored in, which may not fit
                each other.
        """
        path = f"{self._prefix}layers.{index}"
        with self._filled(self.layers[index], path, as_stored) as layer:
            yield layer

    @torch.inference_mode()
    def embed(self, batches: list[TokenBatch]) -> list[State]:
        """The state of each batch before the first layer."""
        with self._filled(self._embed, f"{self._prefix}embed_tokens") as embedding:
            return [self._embedded(batch, embedding) for batch in batches]

    @torch.inference_mode()
    def step(self, index: int, batch: TokenBatch, state: State) -> State:
        """The state after the layer ``index``, which must be loaded."""
        stand_in = _Run(self.checkpoint.architecture, self.layers[index], self._here(state))
        self._pass(batch, index, stand_in)
        return _at(stand_in.handed_on, torch.device("cpu"))

    @contextmanager
    def head(self) -> Iterator[None]:
        """Loads what :meth:`logits` needs."""
        head = self._model.get_output_embeddings()
        name = next(name for name, module in self._model.named_modules() if module is head)
        with self._filled(self._norm, f"{self._prefix}norm"), self._filled(head, name):
            yield

    @torch.inference_mode()
    def logits(self, batch: TokenBatch, state: State) -> Tensor:
        """Next-token logits (B, T, V) of a state after the last layer, within :meth:`head`."""
        last = len(self.layers) - 1
        stand_in = _Given(self.checkpoint.architecture, self._here(state))
        output = self._pass(batch, last, stand_in, whole=True)
        return output.logits

    def _view(self, index: int) -> BlockView | None:
        architecture, layer = self.checkpoint.architecture, self.layers[index]
        if not architecture.is_moe(layer):
            return None
        return BlockView(architecture, self._base.config, layer, index, f"{self._prefix}layers")

    @contextmanager
    def _filled(self, module: nn.Module, path: str, as_stored: bool = False) -> Iterator[nn.Module]:
        state = self.checkpoint.read_state(module, path)
        if not as_stored:
            state = {name: self._cast(name, tensor) for name, tensor in state.items()}
        module.load_state_dict(state, assign=True)
        del state
        try:
            yield module
        finally:
            module.to("meta")
            release_freed_memory()

    def _cast(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor where and in what the model computes, as transformers would load it."""
        strict = self._model._keep_in_fp32_modules_strict or ()
        if not tensor.is_floating_point() or any(part in name for part in strict):
            return tensor.to(self.device)
        return tensor.to(self.device, self.checkpoint.dtype)

    def _embedded(self, batch: TokenBatch, embedding: nn.Module) -> State:
        stand_in = _Taken(self.checkpoint.architecture)
        self._pass(batch, 0, stand_in, embedding)
        return _at(stand_in.args, torch.device("cpu"))

    def _pass(
        self,
        batch: TokenBatch,
        index: int,
        stand_in: nn.Module,
        embedding: nn.Module | None = None,
        whole: bool = False,
    ) -> Any:
        """One forward pass with ``stand_in`` as layer ``index`` and nothing in all others."""
        tokens = batch.token_BT.to(self.device)
        mask = None if batch.mask_BT is None else batch.mask_BT.to(self.device)
        layers: list[nn.Module] = [_Skip(self.checkpoint.architecture)] * len(self.layers)
        layers[index] = stand_in
        self._base.layers = nn.ModuleList(layers)
        width = self._base.config.hidden_size
        self._base.embed_tokens = embedding or _Zeros(width, self.checkpoint.dtype)
        self._base.norm = self._norm if whole else nn.Identity()
        given: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask, "use_cache": False}
        if not whole:
            return self._base(**given)
        if getattr(self._model.config, "output_router_logits", False):
            given["output_router_logits"] = False  # there are none of layers that are not here
        return self._model(**given)

    def _here(self, state: State) -> State:
        return _at(state, self.device)


class _Skip(nn.Module):
    """Hands on what it is given."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture

    def forward(self, *args: Any, **_: Any) -> Any:
        return self.architecture.skip(args)


class _Taken(_Skip):
    """Keeps what it is given."""

    args: State = ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.args = args
        return super().forward(*args)


class _Given(_Skip):
    """Hands on a state of its own."""

    def __init__(self, architecture: Architecture, state: State) -> None:
        super().__init__(architecture)
        self.state = state

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*self.state)


class _Run(_Given):
    """Runs a layer on a state of its own and keeps what the layer hands on."""

    handed_on: State = ()

    def __init__(self, architecture: Architecture, layer: nn.Module, state: State) -> None:
        super().__init__(architecture, state)
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.layer(*self.state, *args[len(self.state) :], **kwargs)
        self.handed_on = self.architecture.handed_on(output, self.state)
        return super().forward(*args)


class _Zeros(nn.Module):
    """An embedding that need not be loaded, since what it returns is not used."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.width = width
        self.dtype = dtype

    def forward(self, token_BT: Tensor) -> Tensor:
        return torch.zeros(*token_BT.shape, self.width, dtype=self.dtype, device=token_BT.device)


def _at(state: State, device: torch.device) -> State:
    return tuple(part.to(device) for part in state)
