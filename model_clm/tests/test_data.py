"""Shards and windows: every token once an epoch, whoever reads, and any row by its number alone."""

import json
import os
import pickle
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import psutil
import pytest

from data import (
    ShardWriter,
    Windows,
    WindowsInOrder,
    parse_mixture,
    permute,
    read_manifest,
    read_tokens,
    share_slots,
    verify,
    write_manifest,
)
from rows import UserError

EOS = 2
SOURCES = {"news": 40, "poems": 25, "words": 3}  # documents of each


def write_split(folder, sources: dict[str, int] = SOURCES, shard_tokens: int = 150, dtype: str = "uint16"):
    """Documents of 0 to 30 random tokens in shards of a few documents; the stream of each source, as it should be."""
    rng, streams, writers = np.random.default_rng(0), {}, []
    for source, documents in sources.items():
        writers.append(ShardWriter(folder, source, dtype, EOS, shard_tokens))
        streams[source] = [EOS]
        for _ in range(documents):
            ids = [*rng.integers(3, 60_000, rng.integers(0, 31)).tolist(), EOS]
            streams[source] += ids
            writers[-1].add(np.array(ids), np.array([len(ids)]), len(ids) - 1, 3 * (len(ids) - 1))
    write_manifest(folder, writers, dtype, EOS, 60_000, "hash")
    return streams


def read_row(windows: Windows, number: int) -> dict:
    return windows[number]


def targets(rows: list[dict]) -> Counter:
    """(source, context, target) of every token that is a target."""
    return Counter(
        (row["source"], before, after)
        for row in rows
        for before, after in zip(row["input_ids"], row["input_ids"][1:], strict=False)
    )


def stream_targets(streams: dict[str, list[int]]) -> Counter:
    return targets([{"source": source, "input_ids": stream} for source, stream in streams.items()])


def test_the_stream_and_the_documents_are_what_was_written(tmp_path):
    streams = write_split(tmp_path)
    manifest = read_manifest(tmp_path)
    for source, stream in streams.items():
        assert np.concatenate(list(read_tokens(tmp_path, source))).tolist() == stream
        counts = manifest["sources"][source]
        assert (counts["documents"], counts["tokens"]) == (SOURCES[source], len(stream))
        assert counts["bytes"] == 3 * counts["characters"] == 3 * (len(stream) - SOURCES[source] - 1)
        for number, shard in enumerate(counts["shards"]):
            assert shard["tokens"] <= 150 and (shard["file"], manifest["dtype"]) == (
                f"{source}-{number:05d}.bin",
                "uint16",
            )
            ids = np.fromfile(tmp_path / shard["file"], "<u2")
            starts = np.fromfile((tmp_path / shard["file"]).with_suffix(".documents"), "<i8")
            assert len(starts) == shard["documents"]
            # An EOS stands before each document: in this shard, or as the last token of the one before.
            assert starts[0] == (number == 0) and (ids[starts[1:] - 1] == EOS).all() and ids[-1] == EOS
    assert len(manifest["sources"]["news"]["shards"]) > 3


def test_32_bit_tokens_are_read_back(tmp_path):
    writer = ShardWriter(tmp_path, "a", "uint32", 0, 100)
    writer.add(np.array([200_000, 7, 0]), np.array([3]), 2, 6)
    write_manifest(tmp_path, [writer], "uint32", 0, 250_000, "hash")
    assert WindowsInOrder(tmp_path, 8)[0] == {"input_ids": [0, 200_000, 7, 0], "starts": [0, 3], "source": "a"}


@pytest.mark.parametrize("length", [2, 7, 64, 10_000])
def test_every_token_is_a_target_exactly_once(tmp_path, length):
    streams = write_split(tmp_path)
    windows = WindowsInOrder(tmp_path, length)
    rows = [windows[number] for number in range(len(windows))]
    assert targets(rows) == stream_targets(streams)
    assert all(2 <= len(row["input_ids"]) <= length for row in rows)
    for row in rows:
        assert row["starts"] == [place for place, token in enumerate(row["input_ids"]) if token == EOS]
    only = WindowsInOrder(tmp_path, length, "poems")
    assert [only[number] for number in range(len(only))] == [row for row in rows if row["source"] == "poems"]
    with pytest.raises(IndexError):
        windows[len(windows)]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_the_permutation_is_one(count):
    orders = [[permute(number, count, key) for number in range(count)] for key in ("0", "1")]
    assert all(sorted(order) == list(range(count)) for order in orders)
    if count > 10:
        assert orders[0] != orders[1]
        # What a shuffled order looks like: neighbours are no neighbours any more, and no trend is left.
        assert abs(np.corrcoef(np.arange(count), orders[0])[0, 1]) < 3 / count**0.5


def test_every_window_once_an_epoch_over_any_ranks_and_workers(tmp_path):
    """1 source or 3, dealt to 3 ranks of 2 workers each: the union is every window once, in every epoch anew."""
    streams = write_split(tmp_path)
    windows = Windows(tmp_path, 16, seed=0)
    total = len(windows)
    with ProcessPoolExecutor(6) as pool:
        for epoch in range(2):
            numbers = [list(range(epoch * total + part, (epoch + 1) * total, 6)) for part in range(6)]
            rows = [list(pool.map(read_row, [windows] * len(part), part)) for part in numbers]
            dealt = [row for part in rows for row in part]
            assert len(dealt) == total and targets(dealt) == stream_targets(streams)
    first, second = ([windows[number] for number in range(e * total, (e + 1) * total)] for e in range(2))
    assert first != second and windows[5] != Windows(tmp_path, 16, seed=1)[5]


def test_a_run_goes_on_bit_for_bit_wherever_it_stopped_also_twice(tmp_path):
    write_split(tmp_path)
    for mixture in (None, {"news": 0.6, "words": 0.4}):
        whole = [Windows(tmp_path, 16, 3, mixture)[number] for number in range(300)]
        parts = []
        for begin, end in ((0, 77), (77, 140), (140, 300)):
            windows = pickle.loads(pickle.dumps(Windows(tmp_path, 16, 3, mixture)))
            parts += [windows[number] for number in range(begin, end)]
        assert parts == whole


def test_a_mixture_keeps_its_shares_and_each_source_its_epochs(tmp_path):
    streams = write_split(tmp_path)
    windows = Windows(tmp_path, 16, 0, {"news": 0.7, "poems": 0.3})
    rows = [windows[number] for number in range(2000)]
    for cycle in range(2):
        sources = [row["source"] for row in rows[1000 * cycle : 1000 * cycle + 1000]]
        assert Counter(sources) == {"news": 700, "poems": 300}
        assert 340 < sum(a != b for a, b in zip(sources, sources[1:], strict=False)) < 500  # 420 by chance
    for source in ("news", "poems"):
        count = windows.counts[windows.sources.index(source)]
        seen = Counter(tuple(row["input_ids"]) for row in rows if row["source"] == source)
        epochs = {"news": 1400, "poems": 600}[source] / count
        assert len(seen) == count and set(seen.values()) <= {int(epochs), int(epochs) + 1}
    assert len(windows) == len(WindowsInOrder(tmp_path, 16)) and set(streams) == set(windows.sources)


def test_a_mixture_that_cannot_be_kept_is_refused():
    assert share_slots({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, ["a", "b", "c"]) == [334, 333, 333]
    assert share_slots(parse_mixture("a=0.8, b=.2"), ["a", "b", "c"]) == [800, 200, 0]
    for mixture, message in {
        "x=1": "x; the prepared sources are a, b",
        "a=0.8": "sum to 1, these to 0.8",
        "a=1.5,b=-0.5": "0 or more",
        "a=nan": "sum to 1",
        "a=0.9999,b=0.0001": "b has a share below 0.001",
        "a": "write it as in news=0.8",
        "a=viel": "write it as in news=0.8",
    }.items():
        with pytest.raises(UserError, match=message):
            share_slots(parse_mixture(mixture), ["a", "b"])


def test_a_shard_that_changed_is_named(tmp_path):
    write_split(tmp_path)
    verify(tmp_path)
    shard = tmp_path / "news-00001.bin"
    raw, time = shard.read_bytes(), shard.stat().st_mtime_ns
    shard.write_bytes(raw[:-2])
    with pytest.raises(UserError, match=f"news-00001.bin: has {len(raw) - 2} bytes, it was prepared with {len(raw)}"):
        verify(tmp_path)
    with pytest.raises(UserError, match="news-00001.bin: is shorter"):
        [row for row in map(WindowsInOrder(tmp_path, 16).__getitem__, range(40))]
    shard.write_bytes(bytes([raw[0] ^ 1]) + raw[1:])
    with pytest.raises(UserError, match="news-00001.bin: changed since"):
        verify(tmp_path)
    shard.write_bytes(raw)
    verify(tmp_path)
    os.utime(shard, ns=(time, time))
    shard.unlink()
    with pytest.raises(UserError, match="news-00001.bin: the shard is missing"):
        verify(tmp_path)


def test_a_shard_is_hashed_once(tmp_path, monkeypatch):
    write_split(tmp_path)
    verify(tmp_path)
    hashed = []
    monkeypatch.setattr("data.hash_file", lambda path: hashed.append(path.name))
    verify(tmp_path)
    assert hashed == []
    os.utime(tmp_path / "news-00001.bin")  # perhaps another file by now
    with pytest.raises(UserError, match="news-00001.bin: changed since"):
        verify(tmp_path)
    assert hashed == ["news-00001.bin"]


def test_a_folder_that_was_not_prepared_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no manifest.json"):
        Windows(tmp_path, 16, 0)
    write_split(tmp_path)
    with pytest.raises(UserError, match="no source prose in it, there are news, poems, words"):
        WindowsInOrder(tmp_path, 16, "prose")
    (tmp_path / "manifest.json").write_text('{"sources": ')
    with pytest.raises(UserError, match="manifest.json: broken"):
        read_manifest(tmp_path)


def test_memory_stays_flat_over_shards_larger_than_it(tmp_path):
    """128 MB of shards read all over: by a memory map they would all be resident in the end."""
    writer = ShardWriter(tmp_path, "a", "uint16", EOS, 1 << 23)
    block = np.random.default_rng(0).integers(3, 60_000, 1 << 22)
    for _ in range(16):
        writer.add(block, np.array([len(block)]), 0, 0)
    write_manifest(tmp_path, [writer], "uint16", EOS, 60_000, "hash")
    windows = Windows(tmp_path, 512, 0)
    process = psutil.Process()
    windows[0]
    before = process.memory_info().rss
    for number in range(20_000):
        windows[number]
    assert process.memory_info().rss - before < 10e6
    assert len(json.loads((tmp_path / "manifest.json").read_text())["sources"]["a"]["shards"]) == 9
