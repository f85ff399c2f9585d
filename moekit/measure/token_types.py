"""What kind of text a token is."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

TOKEN_TYPES = (
    "whitespace",
    "digits",
    "punctuation",
    "word start",
    "word fragment",
    "capitalised",
    "other",
)
"""The types of :func:`token_type`, in the order in which they are shown."""


def token_type(text: str) -> str:
    """The type of a token from its text, with the space before it where it has one.

    ``whitespace`` has nothing else; without regard to white space around it, ``digits`` has
    nothing but digits; ``punctuation`` has neither letter nor digit; of the others
    ``capitalised`` begins (after marks such as ``(`` or ``_``) with an upper-case letter, and
    ``word start`` and ``word fragment`` tell apart those with and without white space before
    them. ``other`` are special tokens, which have no text, and pieces of a character.
    """
    word = text.strip()
    if not text or "\N{REPLACEMENT CHARACTER}" in text:
        return "other"
    if not word:
        return "whitespace"
    if word.isdigit():
        return "digits"
    if not any(character.isalnum() for character in word):
        return "punctuation"
    if next(character for character in word if character.isalnum()).isupper():
        return "capitalised"
    return "word start" if text[0].isspace() else "word fragment"


def token_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of every token id, with the space before a word; empty for special tokens."""
    special = set(tokenizer.all_special_ids)
    size = max(tokenizer.get_vocab().values()) + 1
    pieces = tokenizer.convert_ids_to_tokens(list(range(size)))
    return ["" if i in special else _text(tokenizer, piece) for i, piece in enumerate(pieces)]


def _text(tokenizer: PreTrainedTokenizerBase, piece: str | None) -> str:
    if piece is None:  # an id that the vocabulary skips
        return ""
    text = str(tokenizer.convert_tokens_to_string([piece]))
    if piece.startswith("▁") and not text[:1].isspace():  # decoders drop a leading space
        return " " + text
    return text
