"""The server under strain: clients that go, wait, are slow or idle; failures inside; its end; who may ask it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from ranks import RECIPE
from served import CONTEXT, KEY, ask, connect, running, serve, wait_until

import app
from infer import encode_prompts
from rows import UserError


def test_client_that_goes_away_frees_the_model(server, client):
    stream = ask(client, stream=True, max_tokens=10000)
    next(iter(stream))
    assert running(server) == 1
    stream.close()
    wait_until(lambda: running(server) == 0, seconds=2)
    assert ask(client, max_tokens=3).usage.completion_tokens == 3


def test_client_of_a_plain_reply_that_goes_away_frees_the_model(server, client):
    with pytest.raises(openai.APITimeoutError):
        ask(client, max_tokens=10000, timeout=0.5)
    wait_until(lambda: running(server) == 0, seconds=2)


def test_full_queue_is_refused_and_a_waiting_client_that_goes_away_frees_its_place(server, client, monkeypatch):
    encoded = []
    monkeypatch.setattr(app, "encode_prompts", lambda *args: encoded.append(args) or encode_prompts(*args))
    stream = ask(client, stream=True, max_tokens=10000)
    next(iter(stream))
    with pytest.raises(openai.APITimeoutError):  # waits, since one place is free, until it has had enough
        ask(client, timeout=0.5)
    wait_until(lambda: running(server) == 1)

    replies = []
    waiting = threading.Thread(target=lambda: replies.append(ask(client)))
    waiting.start()
    wait_until(lambda: running(server) == 2)
    with pytest.raises(openai.RateLimitError) as error:
        ask(client)
    assert error.value.code == "queue_full"
    assert httpx.get(f"{server.address}/health").status_code == 200
    stream.close()
    waiting.join(5)
    assert replies[0].usage.completion_tokens == 20
    assert len(encoded) == 2  # of the stream and of the one who waited to the end


def test_failure_inside_is_a_500_that_tells_nothing(server, client, chat, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("a secret")

    monkeypatch.setattr(chat[0], "forward", fail)
    with pytest.raises(openai.InternalServerError) as error:
        ask(client)
    assert "secret" not in str(error.value) and error.value.type == "server_error"
    with pytest.raises(openai.InternalServerError):
        ask(client, stream=True)


def test_failure_in_the_middle_of_a_stream_is_told(client, chat, monkeypatch):
    forward, calls = chat[0].forward, []

    def fail_later(*args, **kwargs):
        calls.append(1)
        if len(calls) > 10:
            raise RuntimeError("a secret")
        return forward(*args, **kwargs)

    monkeypatch.setattr(chat[0], "forward", fail_later)
    with pytest.raises(openai.APIError, match="the server failed"):
        list(ask(client, stream=True))


def test_context_bounds_prompt_and_reply_together(chat):
    model, tokenizer = chat
    with serve(app.create_app(model, tokenizer, "tiny", max_new_tokens=10**6)) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none is needed", max_retries=0)
        with pytest.raises(openai.BadRequestError) as error:
            ask(client, max_tokens=CONTEXT)
    assert error.value.code == "context_length_exceeded"


def test_server_ends_while_a_stream_runs(chat):
    with serve(app.create_app(*chat, "tiny", max_new_tokens=10000)) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none is needed", max_retries=0)
        stream = ask(client, stream=True, max_tokens=10000)
        next(iter(stream))
    # `serve` has seen the server end within its time; the client is told, not left waiting.
    with pytest.raises((openai.APIError, httpx.HTTPError)):
        list(stream)


@pytest.mark.parametrize(
    "headers, status",
    [
        ({}, 200),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "[::1]"}, 200),
        ({"Host": "My.Host:80", "Origin": "https://localhost:3000"}, 200),
        ({"Origin": "https://page.example"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost.evil.example:80"}, 403),
        ({"Host": "[::1].evil.example"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_foreign_sites_are_refused_where_there_is_no_key(keyless, headers, status):
    response = httpx.get(f"{keyless}/v1/models", headers=headers)
    assert response.status_code == status
    assert status == 200 or response.json()["error"]["code"] == "foreign_site"
    allowed = response.headers.get("access-control-allow-origin")
    assert allowed == ("https://page.example" if "page.example" in headers.get("Origin", "") else None)


@pytest.fixture(scope="module")
def keyless(chat):
    with serve(app.create_app(*chat, "tiny", host="my.host", cors_origin="https://page.example/")) as address:
        yield address


def test_a_key_lets_every_host_in_and_no_page(server):
    headers = {"Authorization": f"Bearer {KEY}", "Host": "any.example", "Origin": "https://page.example"}
    response = httpx.get(f"{server.address}/v1/models", headers=headers)
    assert response.status_code == 200 and "access-control-allow-origin" not in response.headers


def test_slow_clients_are_dropped(keyless, monkeypatch):
    monkeypatch.setattr("server.HEADER_SECONDS", 0.3)
    monkeypatch.setattr("api.BODY_SECONDS", 0.3)
    post = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"
    with connect(keyless) as silent, connect(keyless, post[:20]) as slow, connect(keyless, post) as bodiless:
        for _ in range(3):
            time.sleep(0.1)
            slow.sendall(b"x")
        assert silent.recv(1) == b"" == slow.recv(1)
        answer = bodiless.recv(1000) + bodiless.recv(1000)
        assert answer.startswith(b"HTTP/1.1 408 ") and b"body_timeout" in answer
        time.sleep(0.2)
        bodiless.sendall(b"x")
        assert bodiless.recv(1) == b""


def test_idle_connections_deny_nobody(keyless, monkeypatch):
    monkeypatch.setattr("server.SPARE_CONNECTIONS", -8)  # beside the 16 of the queue
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connect(keyless)) for _ in range(20)]
        assert httpx.get(f"{keyless}/health").status_code == 200
        assert idle[0].recv(1) == b""
        idle[-1].sendall(b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n")
        assert idle[-1].recv(12) == b"HTTP/1.1 200"


def test_sigterm_tells_every_client_and_ends_well(chat, tmp_path):
    model, tokenizer = chat
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "app.py", str(tmp_path / "tiny"), "--port", str(port), "--max_new_tokens", "10000"]
    environment = {name: value for name, value in os.environ.items() if name != "API_KEY"}
    with (
        open(tmp_path / "log", "w") as log,
        subprocess.Popen(command, cwd=RECIPE, stderr=log, env=environment) as process,
    ):
        address = f"http://127.0.0.1:{port}"
        with contextlib.ExitStack() as stack:
            stack.callback(process.kill)
            wait_until(lambda: "Uvicorn running" in (tmp_path / "log").read_text(), seconds=60)
            client = stack.enter_context(openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0))
            stream = ask(client, stream=True, max_tokens=10000)
            next(iter(stream))
            pool = stack.enter_context(ThreadPoolExecutor())
            waiting = [pool.submit(ask, client) for _ in range(3)]
            for _ in range(300):
                stack.enter_context(connect(address))
            post = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"
            stack.enter_context(connect(address, post))
            time.sleep(1)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(openai.APIError, match="the server shuts down"):
                list(stream)
            for job in waiting:
                assert isinstance(job.exception(), openai.InternalServerError)
                assert (job.exception().status_code, job.exception().code) == (503, "shutting_down")
            assert process.wait(8) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_public_address_needs_a_key(host, monkeypatch):
    with pytest.raises(UserError, match="set a key first"):
        app.check_host(host, None)
    app.check_host(host, KEY)
    monkeypatch.delenv("API_KEY", raising=False)
    with pytest.raises(SystemExit, match="set a key first"):
        app.main(["output", "--host", host])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_this_machine_needs_no_key(host):
    app.check_host(host, None)
