"""hh-rlhf from a server with the hub's addresses: resumed, checked, never twice, and an error says what to do."""

import gzip
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import data01_download_hhrlhf as download
from pairs import read_pairs

REPOSITORY = "/datasets/Anthropic/hh-rlhf/resolve/main/"


def pack(rows: list) -> bytes:
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0)


def make_rows(count: int) -> list[dict]:
    """Two rows in four are no pairs, as in the real files: the same replies, and one that says nothing."""
    rows = []
    for number in range(count):
        opening = f"\n\nHuman: {hashlib.sha256(bytes([number % 256])).hexdigest()} {number}?\n\nAssistant:"
        replies = ("Yes.", ("No.", "Yes.", "", "Never.")[number % 4])
        rows.append(dict(zip(("chosen", "rejected"), (f"{opening} {reply}" for reply in replies), strict=True)))
    return rows


class Hub(BaseHTTPRequestHandler):
    """The hub as it is for large files: a redirect with size and hash to a storage that knows ranges."""

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        server, name = self.server, self.path.removeprefix(REPOSITORY).removeprefix("/storage/")
        server.requests.append((self.command, self.path, self.headers.get("Range")))
        if name not in server.files:
            return self.reply(404, {}, b"")
        content = server.files[name]
        if server.status:
            return self.reply(server.status.pop(), {}, b"")
        if self.path.startswith(REPOSITORY) and server.is_large:
            linked = {"X-Linked-Size": len(content), "X-Linked-ETag": f'"{server.sha256(name)}"'}
            return self.reply(302, linked | {"Location": f"/storage/{name}", "ETag": '"of the redirect"'}, b"")
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        start = start if server.knows_ranges else 0
        status = 206 if self.headers.get("Range") and server.knows_ranges else 200
        self.reply(status, {"ETag": '"of the storage"'}, content[start:])

    def reply(self, status: int, headers: dict, content: bytes):
        self.send_response(status)
        for key, value in ({"Content-Length": len(content)} | headers).items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            breaks_at = self.server.breaks.pop() if content and self.server.breaks else None
            self.wfile.write(content[:breaks_at])
            self.close_connection = True

    def log_message(self, *args):
        pass


@contextmanager
def serve(**changed):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {
        f"{subset}/{split}.jsonl.gz": pack(make_rows(count))
        for subset, split, count in (("harmless-base", "train", 400), ("harmless-base", "test", 8))
    }
    server.is_large = server.knows_ranges = True
    server.requests, server.status, server.breaks = [], [], []
    server.sha256 = lambda name: hashlib.sha256(server.files[name]).hexdigest()
    for name, value in changed.items():
        setattr(server, name, value)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def bring(tmp_path, monkeypatch):
    """Runs the script against a server for one subset, into the folder that it returns."""
    monkeypatch.setattr(download, "SECONDS_BETWEEN", 0)

    def run(server):
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
        download.main(["--subset", "harmless-base", "--output", str(tmp_path / "data")])
        return tmp_path / "data"

    return run


def count_gets(server) -> int:
    return sum(command == "GET" and path.startswith("/storage/") for command, path, _ in server.requests)


def test_files_come_to_their_place_are_counted_and_are_not_brought_again(bring, capsys):
    with serve() as server:
        folder = bring(server)
        train, test = (folder / split / "harmless-base.jsonl.gz" for split in ("train", "test"))
        assert train.read_bytes() == server.files["harmless-base/train.jsonl.gz"]
        assert test.read_bytes() == server.files["harmless-base/test.jsonl.gz"]
        assert sorted(path.name for path in folder.rglob("*.gz")) == ["harmless-base.jsonl.gz"] * 2
        said = capsys.readouterr().out
        assert (
            f"{train}: 200 pairs, 200 rows that are none" in said
            and "harmless-base/train.jsonl.gz: 0.0 of 0.0 MB" in said
        )
        assert f"DATA={train.parent} bash train_zero2.sh --eval_data_path {test.parent} --skip_bad_rows true" in said
        assert count_gets(server) == 2
        bring(server)
        assert count_gets(server) == 2 and f"{test}: is there, 4 pairs, 4 rows" in capsys.readouterr().out
    assert json.loads(next(read_pairs([str(train)], ["utf-8"]))["chosen"])["content"] == "Yes."


def test_an_interrupted_transfer_is_gone_on_with_in_this_run_and_in_the_next(bring, tmp_path, capsys, monkeypatch):
    with serve(breaks=[700, 500]) as server:
        folder = bring(server)
        content = server.files["harmless-base/train.jsonl.gz"]
        assert (folder / "train" / "harmless-base.jsonl.gz").read_bytes() == content
        ranges = [sent for command, path, sent in server.requests if command == "GET" and "storage" in path]
        assert ranges[:3] == ["bytes=0-", "bytes=500-", "bytes=1200-"]
        assert f"the connection ended at byte 500 of {len(content)}; try 2 of 6 in 0 s" in capsys.readouterr().out
    (folder / "train" / "harmless-base.jsonl.gz").rename(folder / "train" / ".harmless-base.jsonl.gz")
    monkeypatch.setattr(download, "TRIES", 1)
    with serve(breaks=[300]) as server:
        (folder / "train" / ".harmless-base.jsonl.gz").write_bytes(content[:1000])
        with pytest.raises(SystemExit, match=f"the connection ended at byte 1300 of {len(content)}. Try again"):
            bring(server)
        bring(server)
        assert (folder / "train" / "harmless-base.jsonl.gz").read_bytes() == content
        ranges = [sent for command, path, sent in server.requests if command == "GET" and "storage" in path]
        assert ranges == ["bytes=1000-", "bytes=1300-"]
    (folder / "train" / "harmless-base.jsonl.gz").rename(folder / "train" / ".harmless-base.jsonl.gz")
    with serve() as server:  # whole, but its process ended before the check
        bring(server)
        assert count_gets(server) == 0 and (folder / "train" / "harmless-base.jsonl.gz").exists()


def test_a_server_without_ranges_hashes_or_patience_is_enough(bring):
    with serve(knows_ranges=False, is_large=False, breaks=[500], status=[503, 503]) as server:
        folder = bring(server)
        content = server.files["harmless-base/train.jsonl.gz"]
        assert (folder / "train" / "harmless-base.jsonl.gz").read_bytes() == content


GOOD = pack(make_rows(8))


@pytest.mark.parametrize(
    ("content", "changed", "reason"),
    [
        (GOOD[:-9] + b"\0" + GOOD[-8:], {"sha256": lambda name: hashlib.sha256(GOOD).hexdigest()}, "SHA-256"),
        (GOOD[:-9] + b"\0" + GOOD[-8:], {}, "no whole .jsonl.gz"),
        (GOOD[:40] + b"\xff" * 9 + GOOD[49:], {"is_large": False}, "no whole .jsonl.gz"),
        (GOOD[:-20], {"is_large": False}, "no whole .jsonl.gz"),
        (b"<html>log in</html>", {"is_large": False}, "no whole .jsonl.gz"),
        (pack([]), {}, "no whole .jsonl.gz .*no row in it"),
        (pack([{"transcript": "\n\nHuman: a"}]), {}, "holds no pair .first row: neither chosen nor rejected"),
    ],
)
def test_a_broken_or_another_file_is_refused_and_deleted(bring, tmp_path, content, changed, reason):
    with serve(**changed) as server:
        server.files["harmless-base/train.jsonl.gz"] = content
        path = tmp_path / "data" / "train" / "harmless-base.jsonl.gz"
        advice = f"Try again. In China, set HF_ENDPOINT=https://hf-mirror.com; or download it by hand to {path}."
        with pytest.raises(SystemExit, match=f"^error: http.*train.jsonl.gz: the file.*{reason}") as refusal:
            bring(server)
        assert str(refusal.value).endswith(advice) and "\n" not in str(refusal.value)
        assert not any(path.parent.iterdir())


def test_a_file_brought_by_hand_is_checked_and_kept(bring, tmp_path):
    path = tmp_path / "data" / "train" / "harmless-base.jsonl.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"<html>log in</html>")
    with serve() as server, pytest.raises(SystemExit, match="the file is no whole .jsonl.gz .*by hand to"):
        bring(server)
    assert path.exists() and not server.requests


def test_a_file_too_long_is_refused(bring, tmp_path):
    partial = tmp_path / "data" / "train" / ".harmless-base.jsonl.gz"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"0" * 100_000)
    with serve() as server, pytest.raises(SystemExit, match="the file has 100000 bytes in place of"):
        bring(server)
    assert not partial.exists()


def test_no_server_and_no_file_say_so_in_one_line(bring, capsys):
    with serve(files={}) as server:
        with pytest.raises(SystemExit, match="^error: http.*: HTTP Error 404: Not Found. Try again. In China, set HF_"):
            bring(server)
        assert len(server.requests) == 1
    with pytest.raises(SystemExit, match="^error: http.*Connection refused.*by hand to"):
        bring(server)
    assert "try 6 of 6" in capsys.readouterr().out
