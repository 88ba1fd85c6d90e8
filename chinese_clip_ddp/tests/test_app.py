"""The API over real HTTP: embeddings, search, refusals, places that are freed, failures that tell nothing."""

import base64
import contextlib
import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from PIL import Image
from small_gallery import build_model, draw_gallery, open_index

import app
from files import UserError
from gallery import read_gallery
from images import load_image
from infer import embed_captions, embed_pictures
from server import create_server

KEY = "sk-test-123"


@contextlib.contextmanager
def serve(application):
    """Runs the application on a free port; yields its address."""
    server = create_server(application, log_level="critical")
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gallery") / "scenes"
    return SimpleNamespace(folder=folder, captions=draw_gallery(folder))


@pytest.fixture(scope="module")
def server(loaded, gallery, tmp_path_factory):
    limits = {"max_items": 3, "max_characters": 100, "max_pixels": 10_000, "max_queue": 1, "max_body_bytes": 60_000}
    with open_index(tmp_path_factory.mktemp("index") / "my.db", loaded) as index:
        index.update(read_gallery(str(gallery.folder)))
        application = app.create_app(*loaded, "tiny", index, KEY, **limits)
        with serve(application) as address:
            yield SimpleNamespace(address=address, state=application.state)


@pytest.fixture
def client(server):
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=server.address, headers=headers, timeout=20) as client:
        yield client


@pytest.fixture
def busy(server, monkeypatch):
    """The worker is busy until `release` is set; `seen` are the texts that it was given."""
    release, seen = threading.Event(), []

    def slow(model, tokenizer, texts):
        seen.append(texts)
        release.wait(10)
        return embed_captions(model, tokenizer, texts)

    monkeypatch.setattr(app, "embed_captions", slow)
    yield SimpleNamespace(release=release, seen=seen)
    release.set()


def wait_until(condition, seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def png(image: Image.Image) -> bytes:
    image.save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def test_embeddings_are_those_of_the_model(client, loaded, gallery):
    answer = client.post("/embed", json={"texts": ["一个红色的圆", "天"]}).json()
    assert answer["model"] == "tiny" and len(answer["embeddings"]) == 2
    expected = embed_captions(*loaded[:2], ["一个红色的圆", "天"])
    assert answer["embeddings"][0] == pytest.approx(expected[0].tolist(), abs=1e-5)

    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))  # white to training, so to the server
    files = [(gallery.folder / "images/001.png").read_bytes(), png(clear)]
    answer = client.post("/embed", json={"images": [data_url(data) for data in files]}).json()
    expected = embed_pictures(loaded[0], app.Pixels(loaded[2]), [load_image(data) for data in files])
    assert sum(answer["embeddings"], []) == pytest.approx(expected.flatten().tolist(), abs=1e-5)


def test_search_by_text_and_by_image(client, server, gallery):
    index = server.state.index
    answer = client.post("/search", json={"text": gallery.captions[3], "top_k": 4}).json()
    hits = index.find_images(index.embed_texts([gallery.captions[3]]), 4)
    assert [hit["score"] for hit in answer["images"]] == pytest.approx([hit.score for hit in hits], abs=1e-5)
    assert [hit["path"] for hit in answer["images"]] == [Path(hit.reference.path).name for hit in hits]
    assert "captions" not in answer

    image = data_url((gallery.folder / "images/007.png").read_bytes())
    answer = client.post("/search", json={"image": image}).json()
    first = answer["images"][0]
    assert first == {"score": pytest.approx(1, abs=1e-5), "path": "007.png", "captions": [gallery.captions[7]]}
    assert len(answer["images"]) == len(answer["captions"]) == 10 and answer["captions"][0].keys() == {"score", "text"}


SMALL = data_url(png(Image.new("RGB", (9, 9))))
BROKEN = data_url(png(Image.effect_noise((60, 60), 50))[:900])


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        ("/embed", b"no json", "the body is no JSON"),
        ("/embed", b"[1]", "the body is no JSON object"),
        ("/embed", b'{"texts": ["\\ud83d"]}', "the body is no JSON"),
        ("/embed", {}, "give either texts or images"),
        ("/embed", {"texts": ["a"], "images": [SMALL]}, "give either texts or images"),
        ("/embed", {"texts": []}, "texts: List should have at least 1 item"),
        ("/embed", {"texts": "a"}, "texts: Input should be a valid list"),
        ("/embed", {"texts": ["a"], "model": "b"}, "model: Extra inputs are not permitted"),
        ("/embed", {"texts": ["a", " "]}, "texts.1 is empty"),
        ("/embed", {"texts": ["a" * 101]}, "texts.0 has 101 characters, at most 100 are accepted"),
        ("/embed", {"texts": ["a"] * 4}, "4 texts, at most 3 are accepted in a request"),
        ("/embed", {"images": ["http://127.0.0.1/a.png"]}, "images.0 is no data URL"),
        ("/embed", {"images": [SMALL, "data:image/png;base64,~"]}, "images.1: broken Base64"),
        ("/embed", {"images": [data_url(b"no picture")]}, "images.0: no picture of JPEG, PNG"),
        ("/embed", {"images": [BROKEN]}, "images.0: PNG, broken or truncated"),
        ("/embed", {"images": [data_url(png(Image.new("L", (101, 100))))]}, "101 x 100 pixels, at most 10000"),
        ("/embed", {"images": [data_url(png(Image.new("L", (1, 101))))]}, "one side is more than 100 times the other"),
        ("/search", {"top_k": 3}, "give either text or image"),
        ("/search", {"text": "a", "top_k": 101}, "top_k: Input should be less than or equal to 100"),
        ("/search", {"text": "a", "top_k": True}, "top_k: Input should be a valid integer"),
        ("/search", {"text": ""}, "text is empty"),
        ("/search", {"image": "/etc/passwd"}, "image is no data URL"),
    ],
)
def test_bad_requests_are_told_why(path, body, reason, client):
    answer = client.post(path, **({"content": body} if isinstance(body, bytes) else {"json": body}))
    assert answer.status_code == 400 and reason in answer.json()["error"]["message"]
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_the_key_the_size_the_site_and_the_path_are_checked(client, loaded, monkeypatch):
    for headers in ({"Authorization": ""}, {"Authorization": "Bearer wrong"}):
        for path in ("/embed", "/search"):
            answer = client.post(path, json={"texts": ["天"]}, headers=headers)
            assert answer.status_code == 401 and "API key" in answer.json()["error"]["message"]
    assert client.get("/health", headers={"Authorization": ""}).json() == {"status": "ok"}
    assert client.get("/nothing").status_code == 404 and client.get("/embed").status_code == 405
    answer = client.post("/embed", content=b"a" * 60_001)
    assert answer.status_code == 413 and "60001 bytes, at most 60000" in answer.json()["error"]["message"]

    with serve(app.create_app(*loaded, "tiny")) as address, httpx.Client(base_url=address) as anyone:
        assert anyone.post("/embed", json={"texts": ["天"]}).status_code == 200
        assert anyone.post("/search", json={"text": "天"}).json()["error"]["code"] == "no_index"
        for foreign in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
            assert anyone.post("/embed", json={"texts": ["天"]}, headers=foreign).status_code == 403
    with pytest.raises(UserError, match="lets others in: set a key first"):
        app.check_host("0.0.0.0", None)
    app.check_host("0.0.0.0", KEY)
    monkeypatch.delenv("API_KEY", raising=False)
    with pytest.raises(SystemExit, match="--host 0.0.0.0 lets others in"):
        app.main(["nothing", "--host", "0.0.0.0"])


def test_a_full_queue_is_refused_and_a_client_that_goes_away_frees_its_place(server, client, busy):
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(client.post, "/embed", json={"texts": ["天"]})
        wait_until(lambda: busy.seen)
        with pytest.raises(httpx.ReadTimeout):  # waits, since one place is free, until it has had enough
            client.post("/embed", json={"texts": ["地"]}, timeout=0.3)
        wait_until(lambda: sum(not job.done() for job in server.state.jobs) == 1)
        waiting = pool.submit(client.post, "/embed", json={"texts": ["玄"]})
        wait_until(lambda: sum(not job.done() for job in server.state.jobs) == 2)
        refused = client.post("/embed", json={"texts": ["黄"]})
        busy.release.set()
        assert first.result().status_code == waiting.result().status_code == 200
    assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full"
    assert busy.seen == [["天"], ["玄"]]


def test_a_failure_is_logged_and_told_without_details(client, monkeypatch):
    def fail(*args):
        raise RuntimeError("the secret path /home/me")

    monkeypatch.setattr(app, "embed_captions", fail)
    answer = client.post("/embed", json={"texts": ["天"]})
    assert (
        answer.status_code == 500 and "secret" not in answer.text and answer.json()["error"]["type"] == "server_error"
    )
    monkeypatch.undo()
    assert client.post("/embed", json={"texts": ["天"]}).status_code == 200


def test_waiting_clients_are_told_when_the_server_ends(loaded, busy):
    application = app.create_app(*loaded, "tiny")
    with ThreadPoolExecutor(1) as pool:
        with serve(application) as address:
            asked = pool.submit(httpx.post, f"{address}/embed", json={"texts": ["宙"]}, timeout=20)
            wait_until(lambda: ["宙"] in busy.seen)
        assert asked.result().status_code == 503
    busy.release.set()
