"""What is kept about prompts files: entries that are complete or absent, bounded in size, and true to the content."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from cluster.runs.prompts_cache import KnownLengths, PromptsCache, known_lengths, tokenizer_digest
from trainers.data.reader import PromptFile, open_prompts
from trainers.tiny_models import make_tokenizer


@pytest.fixture
def cache(tmp_path: Path) -> PromptsCache:
    return PromptsCache(tmp_path / "runs")


def later() -> float:
    """A clock by which every file has been left alone for an hour."""
    return time.time() + 3600


def opened(path: Path, texts: list[str]) -> PromptFile:
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return open_prompts(str(path)).files[0]


# --- entries


def test_an_entry_is_read_as_it_was_written(cache: PromptsCache) -> None:
    assert cache.read("report", "a") is None
    cache.write("report", "a", b"first")
    cache.write("report", "a", b"\x00second")
    cache.write("lengths", "a", b"")
    assert (cache.read("report", "a"), cache.read("lengths", "a")) == (b"\x00second", b"")


@pytest.mark.parametrize("damage", [b"", b"short", b"x" * 40])
def test_a_damaged_entry_does_not_exist_and_is_replaced(cache: PromptsCache, damage: bytes) -> None:
    cache.write("report", "a", b"good")
    (file,) = cache.folder.iterdir()
    file.write_bytes(damage)
    assert cache.read("report", "a") is None
    cache.write("report", "a", b"good")
    assert cache.read("report", "a") == b"good"


def test_the_entries_that_were_used_least_recently_go_first(tmp_path: Path) -> None:
    cache = PromptsCache(tmp_path, most_bytes=3 * 100)
    for age, key in ((3, "a"), (2, "b"), (1, "c")):
        cache.write("report", key, b"x" * 68)  # and its digest of 32 bytes
        os.utime(cache.folder / f"report-{key}", (time.time() - age, time.time() - age))
    assert cache.read("report", "a") is not None  # used now
    cache.write("report", "d", b"x" * 68)
    assert {file.name for file in cache.folder.iterdir()} == {"report-a", "report-c", "report-d"}
    cache.write("report", "e", b"x" * 300)  # larger than all together may be
    assert cache.read("report", "e") is None


def test_a_root_that_cannot_be_written_hinders_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = PromptsCache(tmp_path / "file")
    cache.write("report", "a", b"good")
    assert cache.read("report", "a") is None


# --- the digest of a file's content


def test_a_file_is_read_again_only_if_it_may_have_changed(tmp_path: Path) -> None:
    cache, path = PromptsCache(tmp_path, clock=later), tmp_path / "p.jsonl"
    path.write_text("aaaa")
    assert cache.content_digest(str(path)) == "61be55a8e2f6b4e172338bddf184d6dbee29c98853e0a0485ecee7f27b9af0b4"
    (entry,) = cache.folder.iterdir()
    cache.write(*entry.name.split("-"), b"as noted")  # type: ignore[call-arg]
    assert cache.content_digest(str(path)) == "as noted"
    times = path.stat()
    path.write_text("aaab")  # as long as before, and with the same time of change
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert cache.content_digest(str(path)) not in ("as noted", None)


def test_a_file_that_was_just_written_is_not_trusted_by_its_times(tmp_path: Path) -> None:
    cache, path = PromptsCache(tmp_path), tmp_path / "p.jsonl"
    path.write_text("aaaa")
    assert cache.content_digest(str(path)) is not None
    assert not cache.folder.exists()


def test_what_is_not_a_file_has_no_digest(cache: PromptsCache, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for address in (tmp_path / "fifo", tmp_path, tmp_path / "absent", "s3://bucket/p.jsonl"):
        assert cache.content_digest(str(address)) is None


# --- lengths


def test_lengths_follow_the_content_the_used_prompts_and_the_tokenizer(cache: PromptsCache, tmp_path: Path) -> None:
    first = opened(tmp_path / "a.jsonl", ["a", "b"])
    lengths = np.array([3, -1], dtype=np.int32)
    KnownLengths(cache, "tokenizer").keep(first, lengths, complete=True)
    same = opened(tmp_path / "b.jsonl", ["a", "b"])
    assert KnownLengths(cache, "tokenizer").recall(same).tolist() == [3, -1]
    assert KnownLengths(cache, "another").recall(same).tolist() == []
    assert KnownLengths(cache, "tokenizer").recall(opened(tmp_path / "b.jsonl", ["a", "c"])).tolist() == []
    (tmp_path / "c.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\nbroken\n')
    skipping = open_prompts(str(tmp_path / "c.jsonl"), skip_invalid=True, rejected=tmp_path / "rejected.jsonl")
    assert KnownLengths(cache, "tokenizer").recall(skipping.files[0]).tolist() == []


def test_lengths_are_written_at_the_end_and_now_and_then(cache: PromptsCache, tmp_path: Path) -> None:
    prompts = opened(tmp_path / "a.jsonl", ["a", "b"])
    lengths = np.array([3], dtype=np.int32)
    KnownLengths(cache, "t", keep_every_s=3600).keep(prompts, lengths, complete=False)
    assert KnownLengths(cache, "t").recall(prompts).tolist() == []
    KnownLengths(cache, "t", keep_every_s=0).keep(prompts, lengths, complete=False)
    assert KnownLengths(cache, "t").recall(prompts).tolist() == [3]


def test_a_tokenizer_is_known_by_its_files_and_the_template(cache: PromptsCache, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    for name in ("a", "b"):
        tokenizer.save_pretrained(tmp_path / name)
        (tmp_path / name / "model.safetensors").write_bytes(name.encode())  # weights are not read
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert tokenizer_digest(a, None) == tokenizer_digest(b, None)
    assert tokenizer_digest(a, "{{ messages }}") != tokenizer_digest(a, None)
    (tmp_path / "b" / "chat_template.jinja").write_text("{{ messages }}")
    assert tokenizer_digest(a, None) != tokenizer_digest(b, None)
    assert tokenizer_digest("no/such-model", None) is None
    assert tokenizer_digest(str(tmp_path / "absent"), None) is None
    assert known_lengths(cache, "no/such-model", None) is None
    assert known_lengths(cache, a, None) is not None
