"""Tokenizers: a byte-level BPE trained on the user's own text, or any ``AutoTokenizer``."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moekit.cache import cached
from moekit.data.fingerprint import digest_of
from moekit.errors import CheckpointError, DataError

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
SMALLEST_VOCABULARY = 256 + 2
"""Every byte, the end of text and the padding."""
_FORMAT = 1


def train_tokenizer(texts: Iterable[str], vocab_size: int, cache: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE (Sennrich et al., 2016, on bytes as in GPT-2) trained on ``texts``.

    Every text, whatever its characters, survives encoding and decoding. ``<|endoftext|>`` is both
    end and beginning of text, ``<|pad|>`` the padding. The same texts in the same order give the
    same tokenizer, which is kept in ``cache``.

    Args:
        texts: the texts; read twice if they can be, else held in memory.
        vocab_size: entries wanted, at least 258; short texts may give fewer.
        cache: folder to keep it in.

    Raises:
        DataError: if there is no text, or ``vocab_size`` is too small.
        OutputError: if ``cache`` cannot be written.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise DataError(
            f"a vocabulary of {vocab_size} was given; a byte-level one needs at least "
            f"{SMALLEST_VOCABULARY}"
        )
    if iter(texts) is texts:
        texts = list(texts)
    key = digest_of([_FORMAT, tokenizers.__version__, vocab_size, _texts_digest(texts)])
    folder = cached(
        cache / "tokenizers" / key,
        lambda scratch: _save(_wrap(_train(texts, vocab_size)), scratch),
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, or of a hub name.

    Code that comes with a tokenizer is never run, and a folder never leads to the network.

    Raises:
        CheckpointError: if there is none, or it cannot be loaded.
    """
    path = os.path.expanduser(name_or_path)
    local = os.path.isdir(path)
    if not local and (os.path.exists(path) or _looks_local(name_or_path)):
        what = "is a file" if os.path.exists(path) else "does not exist"
        raise CheckpointError(
            f"tokenizer {name_or_path!r} {what}; give the folder that holds its tokenizer.json, or "
            "a hub name"
        )
    try:
        return _from_pretrained(path if local else name_or_path, local)
    except Exception as error:
        # Missing files, broken JSON, an unreachable hub or a missing package each raise their own
        # kind, from three libraries; all mean that this tokenizer cannot be had.
        advice = (
            "give a folder with the files that save_pretrained writes"
            if local
            else "check the name and the network, or give a local folder"
        )
        raise CheckpointError(
            f"no tokenizer could be loaded from {name_or_path!r} ({_reason(error)}); {advice}"
        ) from error


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, nothing added.

    A special token spelled out in a text is read as the characters it is made of, so that no text
    can forge an end of text.
    """
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def end_of_text_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends a document: the end of sequence, else the separator.

    Raises:
        CheckpointError: if the tokenizer has neither.
    """
    for found in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if isinstance(found, int):
            return found
    raise CheckpointError(
        f"tokenizer {tokenizer.name_or_path!r} has neither an end-of-sequence nor a separator "
        "token; set its eos_token, or choose another"
    )


def _from_pretrained(name: str, local: bool) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=local)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def _texts_digest(texts: Iterable[str]) -> str:
    whole = hashlib.sha256()
    for text in texts:
        data = text.encode()
        whole.update(len(data).to_bytes(8, "little"))
        whole.update(data)
    return whole.hexdigest()


def _train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    if not any(True for _ in texts):
        raise DataError("no text was given to train a tokenizer on; give some")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
    )


def _save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    tokenizer.save_pretrained(folder)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".: ") if lines else type(error).__name__
