"""Real text in, packed blocks of tokens out.

>>> from moekit.data import TextSpec, prepare
>>> data = prepare(TextSpec(source="stdlib", limit_bytes=2_000_000))  # doctest: +SKIP
>>> data.train[0]["input_ids"].shape  # doctest: +SKIP
torch.Size([256])
"""

from moekit.data.blocks import PackedDataset
from moekit.data.document import Document
from moekit.data.packed import ProgressHook, TextData, TextSpec, prepare
from moekit.data.pairs import PairData, PairSpec, prepare_pairs
from moekit.data.sources import read_documents
from moekit.data.tokenizer import load_tokenizer, train_tokenizer

__all__ = [
    "Document",
    "PackedDataset",
    "PairData",
    "PairSpec",
    "ProgressHook",
    "TextData",
    "TextSpec",
    "load_tokenizer",
    "prepare",
    "prepare_pairs",
    "read_documents",
    "train_tokenizer",
]
