"""The API over real HTTP, by the openai package: replies, refusals, and places that are freed."""

import contextlib
import json
import threading
import time
from types import SimpleNamespace

import httpx
import openai
import pytest
import torch
import uvicorn

import app
from infer import load_trained_model, reply_batch
from rows import UserError

KEY = "sk-test-123"
QUESTION = [{"role": "user", "content": "天地玄黄"}]
CONTEXT = 16384


@pytest.fixture(scope="module")
def chat(tiny_folder):
    """A model that says something else at each step, never ends by itself, and could go on for a minute."""
    model, tokenizer = load_trained_model(tiny_folder)
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.data.normal_(std=0.2, generator=generator)
    model.config.max_position_embeddings = CONTEXT
    model.generation_config.suppress_tokens = [tokenizer.eos_token_id]
    return model, tokenizer


@contextlib.contextmanager
def serve(application):
    """Runs the application on a free port; yields its address."""
    config = uvicorn.Config(application, port=0, log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(chat):
    application = app.create_app(*chat, "tiny", KEY, max_input_tokens=200, max_new_tokens=10000, max_queue=1)
    with serve(application) as address:
        yield SimpleNamespace(address=address, state=application.state)


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key=KEY, max_retries=0, timeout=20) as client:
        yield client


def ask(client, messages=QUESTION, **settings):
    settings = {"model": "tiny", "max_tokens": 20, "temperature": 0, **settings}
    return client.chat.completions.create(messages=messages, **settings)


def expected_reply(chat, messages=QUESTION, max_new_tokens: int = 20) -> str:
    return reply_batch(*chat, [messages], max_new_tokens=max_new_tokens, temperature=0)[0]


def wait_until(condition, seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def running(server) -> int:
    """Requests that hold a place: the one being answered and those that wait."""
    return sum(not job.done() for job in server.state.jobs)


def test_plain_reply(chat, client):
    reply = ask(client)
    assert reply.choices[0].message.content == expected_reply(chat)
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason == "length"
    assert reply.model == "tiny"
    assert reply.usage.completion_tokens == 20
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 20


def test_streamed_reply_is_the_plain_one(chat, client):
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == expected_reply(chat)
    assert len(chunks) > 5
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 20
    assert not any(chunk.usage for chunk in ask(client, stream=True))


def test_events_are_server_sent_events(server):
    body = {"model": "tiny", "messages": QUESTION, "stream": True, "max_tokens": 3}
    headers = {"Authorization": f"Bearer {KEY}"}
    response = httpx.post(f"{server.address}/v1/chat/completions", json=body, headers=headers)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = response.text.split("\n\n")
    assert done == "data: [DONE]" and rest == ""
    assert all(json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk" for event in events)


def test_reply_that_ends_has_finish_reason_stop(chat, client):
    model, tokenizer = chat
    ids = tokenizer(expected_reply(chat))["input_ids"]
    ends = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [ids[4]]
    try:
        reply = ask(client)
    finally:
        model.generation_config.eos_token_id = ends
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens < 20


def test_stop_sequences_end_the_reply_and_are_left_out(chat, client):
    whole = expected_reply(chat)
    stop = whole[6:9]
    for reply in (
        ask(client, stop=stop).choices[0],
        ask(client, stop=["not in it", stop]).choices[0],
    ):
        assert reply.message.content == whole[: whole.index(stop)]
        assert reply.finish_reason == "stop"
    chunks = list(ask(client, stop=stop, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole[: whole.index(stop)]


@pytest.mark.parametrize(
    "text, stops, expected",
    [
        ("abc", [], ("abc", "", False)),
        ("abcEN", ["END"], ("abc", "EN", False)),
        ("abcENd", ["END"], ("abcENd", "", False)),
        ("abcENDxEND", ["END"], ("abc", "", True)),
        ("a##b", ["##", "b"], ("a", "", True)),
        ("aab", ["aabx", "ab"], ("a", "", True)),
        ("aab", ["abx"], ("a", "ab", False)),
    ],
)
def test_split_at_stop(text, stops, expected):
    assert app.split_at_stop(text, stops) == expected


def test_parts_roles_and_harmless_parameters_are_accepted(chat, client):
    parts = [{"type": "text", "text": "天地"}, {"type": "text", "text": "玄黄"}]
    reply = ask(client, [{"role": "user", "content": parts}], user="me", n=1, presence_penalty=0, tools=[], seed=None)
    assert reply.choices[0].message.content == expected_reply(chat)
    system = ask(client, [{"role": "system", "content": "宇宙"}, *QUESTION]).choices[0].message.content
    assert ask(client, [{"role": "developer", "content": "宇宙"}, *QUESTION]).choices[0].message.content == system


def test_seed_repeats_a_sampled_reply(client):
    first, second, third = (
        ask(client, temperature=1.0, seed=seed, max_completion_tokens=15).choices[0].message.content
        for seed in (1, 1, 2)
    )
    assert first == second != third


def test_models_and_health(server, client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert httpx.get(f"{server.address}/health").json() == {"status": "ok"}


def test_wrong_or_missing_key_is_refused(server):
    for key in ("wrong", KEY + "x", KEY[:-1]):
        with openai.OpenAI(base_url=f"{server.address}/v1", api_key=key, max_retries=0) as stranger:
            for call in (stranger.models.list, lambda client=stranger: ask(client)):
                with pytest.raises(openai.AuthenticationError) as error:
                    call()
                assert error.value.code == "invalid_api_key"
    url = f"{server.address}/v1/chat/completions"
    assert httpx.post(url, json={}).status_code == 401
    assert httpx.post(url, json={}, headers={"Authorization": "Bearer 钥匙".encode()}).status_code == 401


@pytest.mark.parametrize(
    "change, error, param, message",
    [
        ({"model": "gpt-5"}, openai.NotFoundError, "model", "no model 'gpt-5' here, only 'tiny'"),
        ({"messages": [{"role": "user", "content": "天" * 500}]}, openai.BadRequestError, "messages", "at most 200"),
        ({"max_tokens": 10001}, openai.BadRequestError, "max_tokens", "at most 10000"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens", "greater than or equal to 1"),
        ({"messages": []}, openai.BadRequestError, "messages", "at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, openai.BadRequestError, "messages.0.role", "assistant"),
        ({"temperature": 3}, openai.BadRequestError, "temperature", "less than or equal to 2"),
        ({"stop": ["a", ""]}, openai.BadRequestError, "stop.1", "at least 1 character"),
        ({"n": 2}, openai.BadRequestError, "n", "does not support n"),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "tools", "does not support tools"),
        ({"logprobs": True}, openai.BadRequestError, "logprobs", "does not support logprobs"),
        ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "response_format", "not support"),
        ({"extra_body": {"top_k": 5}}, openai.BadRequestError, "top_k", "not permitted"),
    ],
)
def test_bad_requests_are_refused_in_openai_s_form(client, change, error, param, message):
    with pytest.raises(error) as caught:
        ask(client, **change)
    assert caught.value.param == param
    assert message in caught.value.body["message"]
    assert caught.value.type == "invalid_request_error"


def test_image_parts_are_refused(client):
    image = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}]
    with pytest.raises(openai.BadRequestError, match=r"messages.0.content.0.type: Input should be 'text'"):
        ask(client, [{"role": "user", "content": image}])


@pytest.mark.parametrize(
    "body, status, code",
    [
        (b"{", 400, "invalid_json"),
        (b"[" * 100_000, 400, "invalid_json"),
        (b"\xff", 400, "invalid_json"),
        (b"[]", 400, "invalid_json"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', 400, "invalid_json"),
        (b" " * (1 << 20) + b"{}", 413, "body_too_large"),
    ],
)
def test_bad_bodies(server, body, status, code):
    headers = {"Authorization": f"Bearer {KEY}"}
    response = httpx.post(f"{server.address}/v1/chat/completions", content=body, headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


def test_unknown_paths_and_methods_answer_in_openai_s_form(server):
    assert httpx.get(f"{server.address}/v1/embeddings").json()["error"]["message"] == "Not Found"
    assert httpx.get(f"{server.address}/v1/chat/completions").status_code == 405


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


def test_full_queue_is_refused_and_a_waiting_client_that_goes_away_frees_its_place(server, client):
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
