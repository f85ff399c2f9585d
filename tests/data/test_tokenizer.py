"""Tokenizers: nothing is lost, nothing depends on the process, nothing needs the network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moekit.data import load_tokenizer, train_tokenizer
from moekit.data.tokenizer import encode, end_of_text_id
from moekit.errors import CheckpointError, DataError, OutputError

TEXTS = [f"The router sends token {n} to expert {n % 7}; café 世界 🙂.\n" * 3 for n in range(50)]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 320, tmp_path_factory.mktemp("cache"))


@settings(deadline=None, max_examples=300)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_round_trip(trained: PreTrainedTokenizerFast, text: str) -> None:
    (ids,) = encode(trained, [text])
    assert trained.decode(ids) == text
    assert all(0 <= one < len(trained) for one in ids)


@pytest.mark.parametrize(
    "text",
    ["", " ", "\n\n  x", "do n't .", "a , b ?", "\x00\x01", "é", "e\u0301", "\u2028", "\U0010ffff"],
)
def test_awkward_text_survives_the_round_trip(trained: PreTrainedTokenizerFast, text: str) -> None:
    assert trained.decode(encode(trained, [text])[0]) == text


def test_a_special_token_in_a_text_is_only_text(trained: PreTrainedTokenizerFast) -> None:
    text = "a<|endoftext|>b<|pad|>"
    (ids,) = encode(trained, [text])
    assert not {trained.eos_token_id, trained.pad_token_id} & set(ids)
    assert trained.decode(ids) == text


def test_special_tokens(trained: PreTrainedTokenizerFast) -> None:
    assert trained.eos_token == trained.bos_token == "<|endoftext|>"
    assert trained.pad_token == "<|pad|>"
    assert len({trained.eos_token_id, trained.pad_token_id}) == 2
    assert end_of_text_id(trained) == trained.eos_token_id
    assert len(trained) == 320


def test_merges_are_learned_from_the_texts(trained: PreTrainedTokenizerFast) -> None:
    (ids,) = encode(trained, [TEXTS[0]])
    assert len(ids) < len(TEXTS[0].encode()) / 3
    assert len(encode(trained, ["router"])[0]) < len(encode(trained, ["zygote"])[0])


def test_every_byte_is_in_the_smallest_vocabulary(tmp_path: Path) -> None:
    smallest = train_tokenizer(TEXTS, 258, tmp_path)
    assert len(smallest) == 258
    text = "".join(map(chr, range(0x250))) + "世🙂"
    (ids,) = encode(smallest, [text])
    assert len(ids) == len(text.encode())
    assert smallest.decode(ids) == text


def test_a_list_and_an_iterator_train_alike(tmp_path: Path) -> None:
    first = train_tokenizer(TEXTS, 300, tmp_path / "a")
    second = train_tokenizer((text for text in TEXTS), 300, tmp_path / "b")
    assert first.get_vocab() == second.get_vocab()


def test_the_cache_is_used_and_depends_on_texts_and_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train_tokenizer(TEXTS, 300, tmp_path)
    passes = 0

    class Counted:
        def __iter__(self) -> Iterator[str]:
            nonlocal passes
            passes += 1
            return iter(TEXTS)

    again = train_tokenizer(Counted(), 300, tmp_path)
    assert again.get_vocab() == first.get_vocab()
    assert passes <= 2  # told apart from an iterator, and hashed, but not trained on
    monkeypatch.setattr(Tokenizer, "train_from_iterator", _never)
    assert train_tokenizer(TEXTS, 300, tmp_path).get_vocab() == first.get_vocab()
    for texts, size in ((TEXTS, 301), (TEXTS[1:], 300), (["".join(TEXTS)], 300)):
        with pytest.raises(AssertionError, match="trained again"):
            train_tokenizer(texts, size, tmp_path)


def _never(*_: object, **__: object) -> None:
    raise AssertionError("trained again")


def test_a_damaged_cache_is_trained_again(tmp_path: Path) -> None:
    first = train_tokenizer(TEXTS, 300, tmp_path)
    (path,) = tmp_path.rglob("tokenizer.json")
    whole = path.read_bytes()
    for damage in (whole[:-50], b"", whole.replace(b"router", b"rooter")):
        path.write_bytes(damage)
        assert train_tokenizer(TEXTS, 300, tmp_path).get_vocab() == first.get_vocab()
        assert path.read_bytes() == whole


def test_training_does_not_depend_on_the_process(tmp_path: Path) -> None:
    script = (
        "import sys, json; from pathlib import Path; from moekit.data import train_tokenizer\n"
        "texts = json.loads(Path(sys.argv[1]).read_text())\n"
        "made = train_tokenizer(texts, 700, Path(sys.argv[2]))\n"
        "print(json.dumps(made.backend_tokenizer.to_str()))\n"
    )
    # many pairs of equal frequency, so that the order of a hash table would show
    texts = [f"{a}{b} {b}{a}" for a in "abcdefghijkl" for b in "mnopqrstuvwx"]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    outputs = set()
    for seed in ("0", "1"):
        arguments = [str(tmp_path / "texts.json"), str(tmp_path / f"cache{seed}")]
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        outputs.add(
            subprocess.run(
                [sys.executable, "-c", script, *arguments],
                env=environment,
                capture_output=True,
                check=True,
            ).stdout
        )
    assert len(outputs) == 1


@pytest.mark.parametrize("size", [-1, 0, 257])
def test_too_small_a_vocabulary_is_an_error(tmp_path: Path, size: int) -> None:
    with pytest.raises(DataError, match="at least 258"):
        train_tokenizer(TEXTS, size, tmp_path)


def test_no_text_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text was given"):
        train_tokenizer([], 300, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        train_tokenizer(TEXTS, 300, tmp_path / "file")


# --- loading


def test_a_saved_tokenizer_is_loaded_without_the_network(
    trained: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    trained.save_pretrained(tmp_path / "mine")
    loaded = load_tokenizer(str(tmp_path / "mine"))
    assert loaded.get_vocab() == trained.get_vocab()
    assert encode(loaded, TEXTS) == encode(trained, TEXTS)


def test_a_missing_or_broken_tokenizer_is_one_clear_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text('{"version": "1.0", ')
    (broken / "tokenizer_config.json").write_text("{}")
    expected = {
        str(tmp_path / "nothing"): "does not exist; give the folder",
        "./nothing": "does not exist; give the folder",
        str(broken / "tokenizer.json"): "is a file; give the folder",
        str(tmp_path / "empty"): "save_pretrained writes",
        str(broken): "save_pretrained writes",
    }
    for name, said in expected.items():
        with pytest.raises(CheckpointError) as caught:
            load_tokenizer(name)
        assert said in str(caught.value)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_code_that_comes_with_a_tokenizer_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}})
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    with pytest.raises(CheckpointError):
        load_tokenizer(str(tmp_path))
    assert not marker.exists()


def test_an_unreachable_hub_is_one_clear_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="check the name and the network"):
        load_tokenizer("owner/name-that-nobody-has")


def test_the_separator_ends_a_text_where_there_is_no_end_of_sequence() -> None:
    model = Tokenizer(models.WordLevel({"[UNK]": 0, "[SEP]": 1}, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    bare = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="[UNK]")
    with pytest.raises(CheckpointError, match="neither an end-of-sequence nor a separator"):
        end_of_text_id(bare)
    with_separator = PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="[UNK]", sep_token="[SEP]"
    )
    assert end_of_text_id(with_separator) == 1
