"""Translations by a fake server: retried, resumed after a kill, nothing asked for twice, each row once and in order."""

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from code04_transdata import UserError, run

RECIPE = Path(__file__).parent.parent


class Translator(http.server.BaseHTTPRequestHandler):
    """Translates by putting 译 before the text; fails as `faults` (text -> statuses to answer first) says."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        with self.server.lock:
            self.server.asked.append(text)
            fault = self.server.faults.get(text) or []
            status = fault.pop(0) if fault else 200
        time.sleep(self.server.delay)
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            status = 401
        answer = "I can't do that" if status == "English" else f"“译 {text}”\n"
        data = json.dumps({"choices": [{"message": {"content": answer}}], "error": "no key"}).encode()
        self.send_response(status if isinstance(status, int) else 200)
        self.send_header("Retry-After", "0.01")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        with self.server.lock:
            self.server.answered.append(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Translator)
    listening.lock, listening.asked, listening.answered = threading.Lock(), [], []
    listening.faults, listening.delay, listening.key = {}, 0, None
    listening.address = f"http://127.0.0.1:{listening.server_port}/v1"
    thread = threading.Thread(target=listening.serve_forever, args=(0.02,))
    thread.start()
    yield listening
    listening.shutdown()
    thread.join()
    listening.server_close()


def flags(server, table, output, **changed) -> SimpleNamespace:
    settings = {"input": str(table), "output": str(output), "base_url": server.address, "model": "m", "key": None}
    settings |= {"concurrency": 4, "chunk_size": 10, "retries": 2, "timeout": 20, "skip_failed": False}
    return SimpleNamespace(**settings | changed)


def write_table(path: Path, count: int) -> list[dict]:
    rows = [{"file_path": f"{number}.jpg", "prompt": f"picture {number}"} for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_row_gets_its_translation_and_what_is_there_is_not_asked_for(server, tmp_path):
    rows = write_table(tmp_path / "t.jsonl", 25)
    more = [{"image": "a.jpg", "text": "picture 3"}, {"image": "b.jpg", "text": ["cat", "dog"]}]
    more += [{"file_path": "c.jpg", "prompt": "done", "zh_prompt": "有"}, {"image": "d.jpg", "text": "12"}]
    with (tmp_path / "t.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in more)
    said = run(flags(server, tmp_path / "t.jsonl", tmp_path / "zh.jsonl"))
    assert said == f"{tmp_path}/zh.jsonl: 29 rows, 0 left out, 28 captions asked for"
    found = read(tmp_path / "zh.jsonl")
    assert found[:25] == [row | {"zh_prompt": f"译 {row['prompt']}"} for row in rows]
    assert found[26] == more[1] | {"zh_prompt": ["译 cat", "译 dog"]} and found[27] == more[2]
    assert max(Counter(server.asked).values()) == 1 and "done" not in server.asked


def test_what_fails_for_a_while_is_tried_again_and_what_goes_on_failing_is_named(server, tmp_path):
    rows = write_table(tmp_path / "t.jsonl", 6)
    server.faults |= {"picture 1": [500, 429], "picture 2": ["English"], "picture 4": [503] * 3}
    with pytest.raises(UserError, match=r"1 captions have no translation, the first: .*t.jsonl:5: .*503"):
        run(flags(server, tmp_path / "t.jsonl", tmp_path / "zh.jsonl"))
    assert not (tmp_path / "zh.jsonl").exists()
    server.faults["picture 4"] = ["English"] * 3
    left_out = run(flags(server, tmp_path / "t.jsonl", tmp_path / "zh.jsonl", skip_failed=True))
    assert left_out.endswith("5 rows, 1 left out, 1 captions asked for")
    assert [row["file_path"] for row in read(tmp_path / "zh.jsonl")] == [
        row["file_path"] for row in rows if row["prompt"] != "picture 4"
    ]
    assert Counter(server.asked) == {f"picture {n}": {1: 3, 2: 2, 4: 6}.get(n, 1) for n in range(6)}


def test_a_wrong_key_or_a_server_that_is_not_there_stops_it(server, tmp_path, monkeypatch):
    write_table(tmp_path / "t.jsonl", 50)
    server.key = "right"
    with pytest.raises(UserError, match=r"/v1/chat/completions answers 401: .*no key"):
        run(flags(server, tmp_path / "t.jsonl", tmp_path / "zh.jsonl"))
    assert len(server.asked) < 20
    monkeypatch.setenv("OPENAI_API_KEY", "right")
    run(flags(server, tmp_path / "t.jsonl", tmp_path / "zh.jsonl"))
    with pytest.raises(UserError, match="is there already"):
        run(flags(server, tmp_path / "t.jsonl", tmp_path / "zh.jsonl"))
    with pytest.raises(UserError, match="2 captions have no translation.*ConnectError"):
        write_table(tmp_path / "t.jsonl", 2)
        nobody = SimpleNamespace(address="http://127.0.0.1:9/v1")
        run(flags(nobody, tmp_path / "t.jsonl", tmp_path / "other.jsonl", retries=0))


@pytest.mark.parametrize("line", ['{"file_path": "a"}', '{"prompt": " "}', "[1]", "{"])
def test_rows_without_a_caption_are_named_before_anything_is_asked(server, tmp_path, line):
    (tmp_path / "t.jsonl").write_text('{"prompt": "good"}\n' + line + "\n")
    with pytest.raises(UserError, match=r"t.jsonl:2: "):
        run(flags(server, tmp_path / "t.jsonl", tmp_path / "zh.jsonl"))
    assert not server.asked


def test_killed_and_started_again_it_asks_for_nothing_twice(server, tmp_path):
    rows, server.delay = write_table(tmp_path / "t.jsonl", 80), 0.01
    command = [
        sys.executable,
        str(RECIPE / "code04_transdata.py"),
        str(tmp_path / "t.jsonl"),
        str(tmp_path / "zh.jsonl"),
    ]
    command += ["--base_url", server.address, "--model", "m", "--concurrency", "4"]
    answers = tmp_path / "zh.jsonl.answers.jsonl"
    for enough in (15, 40):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while not answers.exists() or answers.read_bytes().count(b"\n") < enough:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "zh.jsonl").exists()
        whole = answers.read_bytes().rpartition(b"\n")[0].splitlines()
        known = {json.loads(line)[0] for line in whole}
        assert len(known) >= enough
        with answers.open("a") as file:
            file.write('["picture 79", "half a l')  # what a kill may leave
        time.sleep(0.1)  # the requests that were on their way
        asked_for_known = sum(text in known for text in server.asked)
    said = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert said.returncode == 0, said.stderr
    assert read(tmp_path / "zh.jsonl") == [row | {"zh_prompt": f"译 {row['prompt']}"} for row in rows]
    assert sum(text in known for text in server.asked) == asked_for_known  # nothing that was known
    assert len(server.asked) <= 80 + 2 * 4 and set(server.asked) == {row["prompt"] for row in rows}  # on their way: 4
