"""The configuration of the decoder: the usual transformer sizes, and the parts of each block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moekit.errors import SpecError
from moekit.experts import FeedForwardSpec, SwiGLU, attention_heads
from moekit.layer import MoESpec
from moekit.residual import check_stack
from moekit.routing import AttentionAware, SwitchBalance, TopK
from moekit.spec import suggestion

LayerSpec = MoESpec | FeedForwardSpec


@dataclass(frozen=True)
class BlockSpec:
    """The two parts of one block.

    Attributes:
        attention: a mixture of attention modules; None for grouped-query attention with rotary
            positions.
        feed_forward: a mixture, or the bank of one expert that is a dense part.
    """

    attention: MoESpec | None
    feed_forward: LayerSpec

    @property
    def mixtures(self) -> tuple[MoESpec, ...]:
        """Those of the parts that are mixtures, in the order in which they run."""
        parts = (self.attention, self.feed_forward)
        return tuple(part for part in parts if isinstance(part, MoESpec))

    def after_attention(self, previous: int | None) -> int | None:
        """Width of the logits that the feed-forward part is handed, as ``MoESpec.handed_on``."""
        return previous if self.attention is None else self.attention.handed_on(previous)

    def handed_on(self, previous: int | None) -> int | None:
        """Width of the logits that the next block is handed, as ``MoESpec.handed_on``."""
        for spec in self.mixtures:
            previous = spec.handed_on(previous)
        return previous


class MoEDecoderConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Configuration of :class:`~moekit.models.language.MoEDecoderForCausalLM`.

    Attributes:
        vocab_size: number of token ids.
        hidden_size: model width D.
        num_hidden_layers: number of blocks.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads; None for as many as query heads.
        head_dim: width of a head; None for ``hidden_size / num_attention_heads``.
        max_position_embeddings: longest sequence the model is meant for, in tokens.
        rope_parameters: transformers' RoPE parameters, such as ``{"rope_theta": 10000.0}``.
        rms_norm_eps: epsilon of the norms.
        initializer_range: standard deviation of initial weights.
        tie_word_embeddings: whether the output projection is the embedding matrix.
        attention_dropout: dropout of attention weights in training.
        use_cache: whether the model returns a KV cache by default; False where a router looks at
            earlier hidden states, as ``PerChunk`` does.
        layers: the feed-forward part of each block from the first to the last: a
            :class:`~moekit.MoESpec`, or a feed-forward spec with ``count=1`` for a dense block, as
            objects or as their JSON. A single one stands for every block. None is top-2 of 8
            SwiGLU experts of the model's width with a Switch balance loss, in every block.
        attention: the attention of each block: a :class:`~moekit.MoESpec` over
            :class:`~moekit.AttentionHeads` for a mixture of stick-breaking attention modules
            (ModuleFormer), or None for grouped-query attention with rotary positions, of the sizes
            above. A single one stands for every block.

    Raises:
        SpecError: the sizes contradict each other, or ``layers`` or ``attention`` holds an unknown
            or unfit spec.

    Example:
        >>> from moekit import MoESpec, SwiGLU, TopK
        >>> config = MoEDecoderConfig(
        ...     hidden_size=64,
        ...     num_hidden_layers=2,
        ...     num_attention_heads=4,
        ...     layers=[SwiGLU(count=1, hidden=128), MoESpec(TopK(k=2), SwiGLU(8, hidden=64))],
        ... )
        >>> config.layer_specs[1].router.k
        2
    """

    model_type = "moekit_decoder"
    keys_to_ignore_at_inference = ["past_key_values", "cross_entropy", "routing_losses", "moe"]  # noqa: RUF012
    default_theta = 10000.0

    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rope_parameters: dict[str, Any] | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    attention_dropout: float = 0.0
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    layers: Any = None
    attention: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_sizes()
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self._check_heads(self.head_dim, self.num_key_value_heads)
        self.layers = [spec.to_dict() for spec in self._expanded(self.layers)]
        self._store_attention()
        self.use_cache = self.use_cache and not self.routing_needs_past
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        self._check_rope()

    @property
    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """The spec of each block's feed-forward part.

        Raises:
            SpecError: ``layers`` or ``num_hidden_layers`` were changed and disagree.
        """
        return self._expanded(self.layers)

    @property
    def routing_needs_past(self) -> bool:
        """Whether a router looks at earlier hidden states, which a KV cache does not keep."""
        return any(spec.router.needs_past for spec in self.mixture_specs)

    @property
    def attention_specs(self) -> tuple[MoESpec | None, ...]:
        """The mixture of attention modules of each block, or None where attention is dense."""
        entries = _entries("attention", self.attention, self.num_hidden_layers)
        return tuple(_attention_spec(entry, self.hidden_size) for entry in entries)

    @property
    def block_specs(self) -> tuple[BlockSpec, ...]:
        """Both parts of each block."""
        pairs = zip(self.attention_specs, self.layer_specs, strict=True)
        return tuple(BlockSpec(attention, part) for attention, part in pairs)

    @property
    def mixture_specs(self) -> tuple[MoESpec, ...]:
        """The specs of all mixtures, attention before feed-forward part within a block."""
        return tuple(spec for block in self.block_specs for spec in block.mixtures)

    @property
    def is_causal_routing(self) -> bool:
        """Whether every token's routing is independent of later tokens."""
        return all(spec.router.causal for spec in self.mixture_specs)

    def _expanded(self, layers: Any) -> tuple[LayerSpec, ...]:
        if layers is None:
            layers = _default_layer(self.hidden_size)
        entries = _entries("layers", layers, self.num_hidden_layers)
        return tuple(_layer_spec(entry, self.hidden_size) for entry in entries)

    def _store_attention(self) -> None:
        specs = self.attention_specs
        stored = [None if spec is None else spec.to_dict() for spec in specs]
        self.attention = stored if any(stored) else None
        check_stack(tuple(spec.residual for spec in self.mixture_specs))
        for block in self.block_specs:
            _check_graph(block)

    def _check_sizes(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
        ):
            _check_size(name, getattr(self, name))
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise SpecError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}; make it one, or give head_dim"
            )

    def _check_heads(self, head_dim: int, key_value_heads: int) -> None:
        _check_size("head_dim", head_dim)
        _check_size("num_key_value_heads", key_value_heads)
        if head_dim % 2:
            raise SpecError(f"head_dim is {head_dim}; rotary embeddings need an even number")
        if self.num_attention_heads % key_value_heads:
            raise SpecError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {key_value_heads}"
            )

    def _check_rope(self) -> None:
        kind = (self.rope_parameters or {}).get("rope_type")
        known = ["default", *ROPE_INIT_FUNCTIONS]
        if kind not in known:
            raise SpecError(
                f"rope_type {kind!r} is unknown; known: {', '.join(known)}"
                + suggestion(str(kind), known)
            )


def check_causal_model(mixtures: Iterable[MoESpec]) -> None:
    """Refuse routers that make no sense in a causal language model.

    Raises:
        SpecError: a router decides for whole sequences, later tokens included.
    """
    for spec in mixtures:
        if spec.router.bidirectional:
            raise SpecError(
                f"{type(spec.router).__name__} looks at whole sequences, which a causal language "
                "model must not, and of which it sees one token at a time when it generates; "
                "use PerChunk or PerTask"
            )


def _check_graph(block: BlockSpec) -> None:
    """Refuse a router that looks at attention which its block does not have."""
    if block.attention is None:
        return
    for spec in block.mixtures:
        if isinstance(spec.router, AttentionAware):
            raise SpecError(
                "AttentionAware looks at the attention before its layer by queries and keys, and a "
                "mixture of attention modules has no such; use SimilarityAware, or dense attention"
            )


def _entries(name: str, given: Any, layers: int) -> tuple[Any, ...]:
    """One entry a layer."""
    if given is None or isinstance(given, LayerSpec | Mapping):
        given = [given]
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise SpecError(f"{name} is {given!r}; wanted one spec, or a list with one a layer")
    entries = tuple(given) * (layers if len(given) == 1 else 1)
    if len(entries) != layers:
        raise SpecError(
            f"{name} holds {len(entries)} specs but num_hidden_layers is {layers}; "
            "give one spec a layer, or one for all"
        )
    return entries


def _default_layer(width: int) -> MoESpec:
    return MoESpec(TopK(k=2), SwiGLU(count=8, hidden=width), losses=(SwitchBalance(),))


def _check_size(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SpecError(f"{name} is {value!r}; wanted a whole number of at least 1")


def _layer_spec(entry: Any, width: int) -> LayerSpec:
    """The spec that one entry of ``layers`` describes, refused if it cannot be a block's part."""
    spec = entry if isinstance(entry, LayerSpec) else _from_json(entry)
    if isinstance(spec, FeedForwardSpec) and spec.count != 1:
        raise SpecError(
            f"a dense layer is a bank of one expert, but {type(spec).__name__} has count "
            f"{spec.count}; set count=1, or wrap it in an MoESpec with a router"
        )
    banks = (spec,) if isinstance(spec, FeedForwardSpec) else (spec.experts, spec.shared)
    for bank in banks:
        if bank is not None and bank.out_width(width) != width:
            raise SpecError(
                f"a layer's output has width {bank.out_width(width)} but hidden_size is {width}; "
                "make them equal by leaving the field out of the bank unset"
            )
    if isinstance(spec, MoESpec) and attention_heads(spec.experts) is not None:
        raise SpecError(
            "layers holds a bank of attention modules, which without attention are two linear "
            "maps; give it as attention"
        )
    return spec


def _attention_spec(entry: Any, width: int) -> MoESpec | None:
    """The mixture that one entry of ``attention`` describes, refused if it is none."""
    if entry is None:
        return None
    spec = entry if isinstance(entry, LayerSpec) else _from_json(entry)
    modules = attention_heads(spec.experts) if isinstance(spec, MoESpec) else None
    if not isinstance(spec, MoESpec) or modules is None:
        raise SpecError(
            f"attention holds {type(spec).__name__} without attention modules; wanted an MoESpec "
            "over AttentionHeads, or None for dense attention"
        )
    if spec.shared is not None:
        raise SpecError(
            "a shared expert beside attention modules would be a feed-forward part; "
            "set shared in layers"
        )
    modules.inner_width(width)
    return spec


def _from_json(entry: Any) -> LayerSpec:
    kind = entry.get("kind") if isinstance(entry, Mapping) else None
    if kind in MoESpec.kinds():
        return MoESpec.from_dict(entry)
    if kind in FeedForwardSpec.kinds():
        return FeedForwardSpec.from_dict(entry)
    known = [*MoESpec.kinds(), *FeedForwardSpec.kinds()]
    given = repr(entry) if kind is None else repr(kind)
    raise SpecError(
        f"{given} is not the spec of a layer; known kinds: {', '.join(known)}"
        + suggestion(str(kind), known)
    )
