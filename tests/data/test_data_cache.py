"""The cache of prepared text: hit, rebuilt, shared, and never half-written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from packing import small, stream

from moekit.data import packed, prepare
from moekit.errors import OutputError

ROOT = Path(__file__).resolve().parents[2]
Writer = Callable[..., Path]


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(packed._Preparation, "build", never)


def test_the_cache_is_hit_until_something_changes(
    write_corpus: Writer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_corpus()
    spec = small(source)
    first = prepare(spec, cache)
    with monkeypatch.context() as patch:
        forbid(patch)
        again = prepare(spec, cache)
        assert again.report == first.report
        assert stream(again.train) == stream(first.train)
        longer = prepare(spec.replace(sequence_length=32), cache)  # needs no other files
        assert longer.train[0]["input_ids"].tolist() == stream(first.train)[:32]
        for change in (
            {"seed": 1},
            {"vocab_size": 301},
            {"test_share": 0.1},
            {"limit_bytes": 9**5},
        ):
            with pytest.raises(AssertionError, match="built again"):
                prepare(spec.replace(**change), cache)
    (source / "000.txt").write_text("other words entirely")
    assert prepare(spec, cache).report["bytes"] != first.report["bytes"]
    (source / "new.txt").write_text("one more")
    assert sum(prepare(spec, cache).report["documents"].values()) == 61


@pytest.mark.parametrize(
    "name",
    [
        "train.tokens",
        "test.documents.npy",
        "meta.json",
        "manifest.json",
        "tokenizer/tokenizer.json",
    ],
)
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_damaged_cache_is_built_again(
    write_corpus: Writer, cache: Path, name: str, damage: str
) -> None:
    spec = small(write_corpus(count=30))
    first = prepare(spec, cache)
    expected, report = stream(first.train), first.report
    (folder,) = (path for path in (cache / "text").iterdir() if path.is_dir())
    path = folder / name
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    again = prepare(spec, cache)
    assert stream(again.train) == expected
    assert again.report == report


def test_threads_share_one_build(
    write_corpus: Writer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = small(write_corpus())
    builds = []
    build = packed._Preparation.build

    def counted(self: Any, folder: Path) -> None:
        builds.append(folder)
        build(self, folder)

    monkeypatch.setattr(packed._Preparation, "build", counted)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: stream(prepare(spec, cache).train), range(4)))
    assert len(builds) == 1
    assert all(one == found[0] for one in found)


SCRIPT = """
import hashlib, json, sys
from pathlib import Path
from moekit.data import TextSpec, prepare
def progress(description, done, total):
    print(description, flush=True)
    if description == sys.argv[3]:
        import time; time.sleep(60)
spec = TextSpec(source=sys.argv[1], vocab_size=300, sequence_length=16)
data = prepare(spec, Path(sys.argv[2]), progress)
whole = hashlib.sha256()
for split in (data.train, data.validation, data.test):
    for block in split:
        whole.update(block["input_ids"].numpy().tobytes())
print(json.dumps([whole.hexdigest(), data.report], sort_keys=True))
"""


def start(source: Path, cache: Path, stop_at: str = "", seed: str = "0") -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(source), str(cache), stop_at],
        env=environment,
        stdout=subprocess.PIPE,
    )


def last_line(process: subprocess.Popen[bytes]) -> bytes:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return output.splitlines()[-1]


def test_processes_with_one_cache_or_two_agree(write_corpus: Writer, tmp_path: Path) -> None:
    source = write_corpus()
    shared, own = tmp_path / "shared", tmp_path / "own"
    running = [start(source, shared, seed="1"), start(source, shared, seed="2")]
    running.append(start(source, own, seed="3"))
    assert len({last_line(process) for process in running}) == 1


def test_a_killed_build_leaves_nothing_that_loads(write_corpus: Writer, cache: Path) -> None:
    source = write_corpus()
    process = start(source, cache, stop_at="packing validation")
    assert process.stdout is not None
    while b"packing validation" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = {path.name for path in (cache / "text").iterdir() if path.is_dir()}
    assert left
    assert all(name.startswith(".") for name in left)
    data = prepare(small(source), cache)  # the lock died with its holder
    assert sum(data.report["documents"].values()) == 60
    folders = [path.name for path in (cache / "text").iterdir() if path.is_dir()]
    assert len(folders) == 1
    assert not folders[0].startswith(".")


def test_an_interrupted_build_cleans_up(write_corpus: Writer, cache: Path) -> None:
    def interrupt(description: str, _: int, __: int | None) -> None:
        if description == "packing test":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(small(write_corpus()), cache, interrupt)
    assert not [path for path in (cache / "text").iterdir() if path.is_dir()]


def test_the_default_cache_is_where_the_environment_says(
    write_corpus: Writer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEKIT_CACHE", str(cache))
    prepare(small(write_corpus()))
    assert {path.name for path in cache.iterdir()} == {"text", "tokenizers"}


def test_a_cache_that_cannot_be_written_is_an_error(write_corpus: Writer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="set MOEKIT_CACHE"):
        prepare(small(write_corpus()), tmp_path / "file")


def test_progress_is_told(write_corpus: Writer, cache: Path) -> None:
    told: list[tuple[str, int, int | None]] = []
    spec = small(write_corpus())
    prepare(spec, cache, lambda *step: told.append(step))
    assert list(dict.fromkeys(description for description, _, _ in told)) == [
        "reading documents",
        "training the tokenizer",
        "packing train",
        "packing validation",
        "packing test",
    ]
    for description in {step[0] for step in told}:
        steps = [step for step in told if step[0] == description]
        assert [done for _, done, _ in steps] == sorted(done for _, done, _ in steps)
        assert steps[-1][1] == steps[-1][2]
    told.clear()
    prepare(spec, cache, lambda *step: told.append(step))
    assert told == []
