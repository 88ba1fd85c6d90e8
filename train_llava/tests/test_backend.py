"""A server's rows and batches are those of its files, bit for bit, also where it is killed in the midst of an epoch."""

import contextlib
import json
import os
import socket
import threading
import time
import urllib.request
from types import SimpleNamespace

import pytest
import torch
from fastapi import FastAPI
from fastapi.responses import RedirectResponse
from ranks import server
from served import serve
from small_processor import IMAGE_TOKENS, ask, make_processor, write_lines, write_mixed_rows, write_pictures
from torch.utils.data import DataLoader
from transformers import CLIPVisionConfig, LlavaConfig, Qwen2Config

import data
import images
import web_dataset
from app import check_host
from batch import BalancedBatchSampler
from collator import LlavaCollator
from data import column, load_encoded, load_splits
from pixels import Pixels
from rows import UserError
from web_dataset_backend import create_app, main

KEY = "sk-data"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for module in (data, images):
            patch.setattr(module, "CACHE_DIR", tmp_path_factory.mktemp("cache") / "cache")
        patch.setenv("API_KEY", KEY)
        yield


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 rows, one of them bad."""
    folder = tmp_path_factory.mktemp("data")
    write_mixed_rows(folder, 10)
    with open(folder / "rows.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"image": "none.png", "messages": ask("<image>", "好")}) + "\n")
    return str(folder)


@pytest.fixture(scope="module")
def address(folder, processor):
    with serve(create_app(folder, processor, 2048, KEY, max_queue=4)) as address:
        yield address


def batches(rows, processor, workers: int = 0):
    """An epoch's batches, shuffled as in training; each is read when it is asked for."""
    collator = LlavaCollator(Pixels(processor.image_processor), processor.image_token_id, IMAGE_TOKENS, True)
    bins = [[number] for number in range(len(rows))]
    sampler = BalancedBatchSampler(column(rows, "length"), bins, 4, 1, 1, 0, seed=3)
    return DataLoader(rows, batch_sampler=sampler, collate_fn=collator, num_workers=workers)


def settings(data_path, **changed) -> SimpleNamespace:
    defaults = {"eval_data_path": None, "validation_split": 0.2, "model_max_length": 2048, "skip_bad_rows": True}
    return SimpleNamespace(**{"data_path": str(data_path)} | defaults | changed)


def assert_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


def test_splits_and_batches_are_those_of_the_files(folder, address, processor, tmp_path):
    """Bad rows are among them and named by the server's file and line; workers read pictures by themselves."""
    here = load_splits(settings(folder), processor, 0, None)
    report = tmp_path / "bad_rows.jsonl"
    there = load_splits(settings(address), processor, 0, str(report))
    assert there[2] == here[2] and there[2]["bad_rows"] == 1 and len(there[0]) == 32
    assert json.loads(report.read_text())["source"] == f"{folder}/rows.jsonl:41"
    for mine, theirs in zip(here[:2], there[:2], strict=True):
        assert mine.remove_columns("images")[:] == theirs.remove_columns("images")[:]
        for one, other in zip(batches(mine, processor), batches(theirs, processor, workers=2), strict=True):
            assert_equal(one, other)
    assert folder not in json.dumps([row["images"] for row in there[0]])


def test_a_server_of_other_settings_or_data_is_refused(folder, address, processor, tmp_path):
    with pytest.raises(UserError, match="started with another model_max_length. Start it with this run's model and"):
        load_encoded(address, processor, 1024)
    with pytest.raises(UserError, match="started with another image processor"):
        load_encoded(address, make_processor(image_mean=[0, 0, 0]), 2048)
    other = make_processor()
    other.tokenizer.chat_template += " "
    with pytest.raises(UserError, match="started with another chat template"):
        load_encoded(address, other, 2048)
    rows, _ = load_encoded(address, processor, 2048)
    write_pictures(tmp_path / "images", 1)
    write_lines(tmp_path / "rows.jsonl", [{"image": "0.png", "messages": ask("<image>", "好")}])
    with serve(create_app(str(tmp_path), processor, 2048)) as changed:
        assert request(f"{changed}/index", Host="a.b") == 403  # without a key: a name of another site that leads here
        place = [{**rows["images"][0][0], "path": rows["images"][0][0]["path"].replace(address, changed)}]
        with pytest.raises(UserError, match="409: other data, or with other settings, is served here now than when"):
            Pixels(processor.image_processor)(place, [0])


def request(address: str, body: bytes | None = None, key: str = KEY, **headers) -> int:
    asked = urllib.request.Request(address, body, {"Authorization": f"Bearer {key}", **headers})
    try:
        with urllib.request.urlopen(asked, timeout=20) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code


def test_requests_need_the_key_and_are_bounded(address, monkeypatch):
    index = f"{address}/index"
    assert request(index) == 200 and request(index, key="other") == request(index, key="") == 401
    base = json.loads(web_dataset.ask(index))["data"]
    pixels = f"{address}/pixels/{base}"
    assert request(pixels, b"[0, 1, 0]") == 200 and request(pixels, b"[0]", key="other") == 401
    for body in (
        b"",
        b"{}",
        b"[]",
        b"[-1]",
        b"[10]",
        b"[true]",
        b"[0.0]",
        b"[" * 60_000,
        json.dumps([0] * 17).encode(),
    ):
        assert request(pixels, body) == 400
    assert request(pixels, b" " * 70_000) == 413 and request(f"{address}/pixels/other", b"[0]") == 409
    assert request(f"{address}/rows/{base}?start=-1") == 422 and request(f"{address}/rows/{base}?start=99") == 200
    assert request(f"{address}/rows/../../etc/passwd") in (404, 409) and request(f"{address}/docs") == 404
    with urllib.request.urlopen(
        urllib.request.Request(index, headers={"Authorization": f"Bearer {KEY}", "Origin": "http://a.b"})
    ) as reply:
        assert "access-control-allow-origin" not in reply.headers
    with pytest.raises(UserError, match=r"--host 0\.0\.0\.0 lets others in: set a key first"):
        check_host("0.0.0.0", None)
    monkeypatch.setenv("API_KEY", "wrong")
    with pytest.raises(UserError, match="401: missing or wrong API key"):
        web_dataset.ask(index)


def test_no_other_server_is_told_the_key(address):
    app = FastAPI()
    app.get("/moved")(lambda: RedirectResponse(address.replace("127.0.0.1", "localhost") + "/index"))
    with serve(app) as other, pytest.raises(UserError, match="401: missing or wrong API key"):
        web_dataset.ask(f"{other}/moved")


def test_too_many_requests_are_told_to_come_back_and_do(folder, processor, monkeypatch):
    app = create_app(folder, processor, 2048, KEY, max_queue=1)
    read, started = app.state.pixels.read, threading.Event()
    app.state.pixels.read = lambda pictures: started.set() or time.sleep(0.3) or read(pictures)
    with serve(app) as address:
        pixels = f"{address}/pixels/{app.state.index['data']}"
        first = threading.Thread(target=request, args=(pixels, b"[0]"))
        first.start()
        started.wait(5)
        assert request(pixels, b"[1]") == 503
        assert len(web_dataset.ask(pixels, b"[1]")) > 0
        first.join()


def test_nobody_there_is_told_after_a_time(monkeypatch, tmp_path, processor):
    monkeypatch.setattr(web_dataset, "FIND_SECONDS", 0.5)
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9/index: no answer for 0\.5 seconds .*refused.*again\.$"):
        load_encoded("http://127.0.0.1:9", processor, 2048)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:8")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(UserError, match=r"through the proxy http://127\.0\.0\.1:8: export no_proxy=127\.0\.0\.1,"):
        load_encoded("http://127.0.0.1:9", processor, 2048)
    monkeypatch.setattr(web_dataset, "ask", lambda *args, **settings: b"<html>")
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9: what answers there is no web_dataset_backend\.py"):
        load_encoded("http://127.0.0.1:9", processor, 2048)
    monkeypatch.undo()
    monkeypatch.setattr(web_dataset, "WAIT_SECONDS", 0.5)
    with pytest.raises(UserError, match="no answer for 0.5 seconds"):
        web_dataset.fetch_pixels("http://127.0.0.1:9/pixels/a", [1], (3, 2, 2))


@pytest.fixture(scope="module")
def model_folder(processor, tmp_path_factory):
    """A model's folder without weights, which no server needs."""
    folder = tmp_path_factory.mktemp("model")
    vision = CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_attention_heads=2, image_size=24, patch_size=8)
    text = Qwen2Config(vocab_size=300, hidden_size=8, intermediate_size=8, num_attention_heads=2, num_key_value_heads=2)
    LlavaConfig(vision_config=vision, text_config=text, image_token_index=processor.image_token_id).save_pretrained(
        folder
    )
    processor.save_pretrained(folder)
    return str(folder)


def run_command(flags: list[str]) -> None:
    os.environ["API_KEY"] = KEY
    main(flags)


@contextlib.contextmanager
def started(flags: list[str], address: str):
    """The command as a process of its own, there when it answers; killed, not ended."""
    process = server.Process(target=run_command, args=(flags,))
    process.start()
    end = time.monotonic() + 120
    while True:
        assert process.is_alive() and time.monotonic() < end
        with contextlib.suppress(OSError):
            socket.create_connection(address.removeprefix("http://").split(":")).close()
            break
        time.sleep(0.1)
    try:
        yield process
    finally:
        process.kill()
        process.join()


def test_killed_and_started_again_in_mid_epoch_every_row_comes_once(folder, model_folder, tmp_path):
    """Started twice on one port, while two workers read on."""
    from model import load_processor

    processor = load_processor(model_folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [model_folder, folder, "--port", str(port)]
    rows = load_splits(settings(folder), processor, 0, None)[0]
    expected = list(batches(rows, processor))
    found = []
    with started(command, address):
        there = load_splits(settings(address), processor, 0, None)[0]
        loader = iter(batches(there, processor, workers=2))
        found.append(next(loader))
    waiting = threading.Thread(target=lambda: found.extend(loader))
    waiting.start()
    time.sleep(1)
    assert waiting.is_alive() and len(found) < len(expected)  # the workers wait for the server
    with started(command, address) as again:
        waiting.join(60)
        assert not waiting.is_alive() and again.is_alive()
    assert len(found) == len(expected) == 8
    for one, other in zip(found, expected, strict=True):
        assert_equal(one, other)


def test_bad_data_ends_the_command_with_its_reason(model_folder, tmp_path):
    with pytest.raises(SystemExit, match="error: .*nothing: there is no such file or folder"):
        main([model_folder, str(tmp_path / "nothing")])
    with pytest.raises(SystemExit, match="error: --host 0.0.0.0 lets others in"), pytest.MonkeyPatch.context() as patch:
        patch.delenv("API_KEY")
        main([model_folder, str(tmp_path), "--host", "0.0.0.0"])
