"""The API over real HTTP: scores, refusals, requests that are classified together, and places that are freed."""

import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest
import uvicorn

import app
from conftest import make_reviews
from infer import load_trained_model, predict_probabilities
from rows import UserError

KEY = "sk-test-123"
TEXTS = [text for text, _ in make_reviews(12, seed=3)]


@pytest.fixture(scope="module")
def loaded(classifier_folder):
    return load_trained_model(classifier_folder)


@contextlib.contextmanager
def serve(application):
    """Runs the application on a free port; yields its address."""
    config = uvicorn.Config(application, port=0, log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
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
def server(loaded):
    application = app.create_app(
        *loaded, "tiny", KEY, max_texts=20, max_characters=100, max_queue=2, max_body_bytes=20_000, max_body_seconds=0.5
    )
    with serve(application) as address:
        yield SimpleNamespace(address=address, state=application.state)


@pytest.fixture
def client(server):
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=server.address, headers=headers, timeout=20) as client:
        yield client


@pytest.fixture
def busy(server, monkeypatch):
    """The model takes its time until `release` is set; `batches` are the texts that it was given."""
    release, batches = threading.Event(), []

    def slow(model, tokenizer, texts):
        batches.append(texts)
        release.wait(10)
        return predict_probabilities(model, tokenizer, texts)

    monkeypatch.setattr(app, "predict_probabilities", slow)
    yield SimpleNamespace(release=release, batches=batches)
    release.set()


def wait_until(condition, seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def test_many_texts_and_one(loaded, client):
    expected, _ = predict_probabilities(*loaded, TEXTS)
    answer = client.post("/classify", json={"texts": TEXTS}).json()
    assert answer["model"] == "tiny" and len(answer["results"]) == 12
    for row, result in zip(expected, answer["results"], strict=True):
        assert result["scores"] == pytest.approx({"好评": row[0], "差评": row[1]}, abs=1e-5)
        assert result["label"] == ("好评" if row[0] > row[1] else "差评")
        assert result["probability"] == pytest.approx(max(row), abs=1e-5)
    (alone,) = client.post("/classify", json={"texts": TEXTS[0]}).json()["results"]
    assert client.post("/classify", content=b'\xef\xbb\xbf{"texts": "a"}').status_code == 200  # Windows writes a BOM
    assert alone["scores"] == pytest.approx(answer["results"][0]["scores"], abs=1e-5)


def test_requests_that_wait_are_classified_together(loaded, client, busy):
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(client.post, "/classify", json={"texts": TEXTS[:1]})
        wait_until(lambda: busy.batches)
        others = [pool.submit(client.post, "/classify", json={"texts": TEXTS[i : i + 2]}) for i in (2, 4)]
        time.sleep(0.3)
        busy.release.set()
        answers = [request.result().json()["results"] for request in (first, *others)]
    assert [len(batch) for batch in busy.batches] == [1, 4]
    expected, _ = predict_probabilities(*loaded, TEXTS)
    got = [[result["scores"]["好评"] for result in results] for results in answers]
    assert got == [pytest.approx(expected[part, 0].tolist(), abs=1e-5) for part in ([0], [2, 3], [4, 5])]


def test_too_many_requests_are_turned_away(client, busy):
    with ThreadPoolExecutor(4) as pool:
        pool.submit(client.post, "/classify", json={"texts": "a"})
        wait_until(lambda: busy.batches)
        waiting = [pool.submit(client.post, "/classify", json={"texts": "b"}) for _ in range(2)]
        time.sleep(0.3)
        refused = client.post("/classify", json={"texts": "c"})
        busy.release.set()
        assert [request.result().status_code for request in waiting] == [200, 200]
    assert refused.status_code == 429 and refused.json()["error"]["type"] == "rate_limit_error"


def test_a_client_that_goes_away_is_not_classified(server, client, busy):
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.post, "/classify", json={"texts": "天"})
        wait_until(lambda: busy.batches)
        with pytest.raises(httpx.ReadTimeout):
            client.post("/classify", json={"texts": "地"}, timeout=0.3)
        time.sleep(0.4)
        busy.release.set()
        assert first.result().status_code == 200
    assert client.post("/classify", json={"texts": "玄"}).status_code == 200
    assert busy.batches == [["天"], ["玄"]]


def test_a_failure_is_logged_and_told_without_details(client, monkeypatch):
    def fail(*args):
        raise RuntimeError("the secret path /home/me")

    monkeypatch.setattr(app, "predict_probabilities", fail)
    answer = client.post("/classify", json={"texts": "天"})
    assert answer.status_code == 500 and "secret" not in answer.text
    monkeypatch.undo()
    assert client.post("/classify", json={"texts": "天"}).status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"no json", 400, "the body is no JSON"),
        (b"[1]", 400, "the body is no JSON object"),
        (b"{}", 400, "texts: Field required"),
        (b'{"texts": []}', 400, "texts: List should have at least 1 item"),
        (b'{"texts": [1]}', 400, "texts.0: Input should be a valid string"),
        (b'{"texts": "a", "top_k": 3}', 400, "top_k: Extra inputs are not permitted"),
        (b'{"texts": ["a", " "]}', 400, "texts.1 is empty"),
        (b'{"texts": "\\ud83d"}', 400, "the body is no JSON"),
        (b'{"texts": "' + b"a" * 101 + b'"}', 400, "texts.0 has 101 characters, at most 100 are accepted"),
        (b'{"texts": [' + b'"a",' * 20 + b'"a"]}', 400, "21 texts, at most 20 are accepted in a request"),
        (b'{"texts": "' + b"a" * 20_000 + b'"}', 413, "the body has 20013 bytes, at most 20000 are accepted"),
    ],
)
def test_bad_requests_are_told_why(body, status, reason, client):
    answer = client.post("/classify", content=body)
    assert answer.status_code == status and reason in answer.json()["error"]["message"]


def test_the_key_is_asked_for(client):
    for given in ("", "Bearer wrong", KEY, f"Basic {KEY}"):
        for answer in (
            client.post("/classify", json={"texts": "天"}, headers={"Authorization": given}),
            client.get("/openapi.json", headers={"Authorization": given}),
        ):
            assert answer.status_code == 401 and "API key" in answer.json()["error"]["message"]
    assert client.get("/health", headers={"Authorization": ""}).json() == {"status": "ok"}
    assert client.get("/nothing").status_code == 404


def test_the_api_describes_itself(client):
    document = client.get("/openapi.json").json()
    operation = document["paths"]["/classify"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert schema["required"] == ["texts"] and operation["security"] == [{"HTTPBearer": []}]
    assert document["components"]["schemas"]["Result"]["properties"].keys() == {"label", "probability", "scores", "cut"}


def test_a_text_that_is_too_long_says_that_it_was_cut(client):
    results = client.post("/classify", json={"texts": ["天", "地" * 90]}).json()["results"]
    assert [result["cut"] for result in results] == [False, True]


def test_a_body_that_never_comes_is_not_waited_for(server):
    host, port = server.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        head = f"POST /classify HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 99\r\n\r\n{{"
        connection.sendall(head.encode())
        answer = connection.makefile().read()  # until the server closes
    assert answer.startswith("HTTP/1.1 408") and "did not come within 0.5 s" in answer


def test_a_public_address_needs_a_key():
    with pytest.raises(UserError, match="lets others in: set a key first"):
        app.check_host("0.0.0.0", None)
    app.check_host("0.0.0.0", KEY)
    app.check_host("127.0.0.1", None)
    app.check_host("localhost", None)
