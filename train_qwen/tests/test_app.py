"""The API over real HTTP, by the openai package: replies, refusals, and places that are freed."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import openai
import pytest
import torch
from ranks import RECIPE

import app
from infer import encode_prompts, load_trained_model, reply_batch
from rows import UserError

KEY = "sk-test-123"
QUESTION = [{"role": "user", "content": "天地玄黄"}]
CONTEXT = 16384
# As Qwen3's: knows tools and thoughts.
TEMPLATE = """{% if tools %}{{ tools | tojson }}
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}{{ message.content }}
{%- for call in message.tool_calls %}[{{ call.function.name }}:{{ call.function.arguments.city }}]{% endfor %}
{{- message.tool_call_id }}<|im_end|>
{% endfor %}<|im_start|>assistant
{% if enable_thinking %}<think>
{% endif %}"""
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"city": "昃"}'}}


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
    server = app.create_server(application, log_level="error")
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


@pytest.fixture
def script(chat, monkeypatch):
    """Sets what the model replies, piece by piece, and its template; returns the list of prompts and settings asked."""

    def write(reply: list[str], template: str = TEMPLATE) -> list[tuple[str, dict]]:
        model, tokenizer = chat
        asked = []

        def stream_tokens(model, inputs, settings, stop):
            asked.append((tokenizer.decode(inputs["input_ids"][0]), settings))
            for piece in reply:
                yield from tokenizer(piece)["input_ids"]

        monkeypatch.setattr(app, "stream_tokens", stream_tokens)
        monkeypatch.setattr(tokenizer, "chat_template", template)
        return asked

    return write


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


def test_what_clients_send_back_of_a_reply_is_accepted(chat, client, script):
    empty = {"refusal": None, "annotations": [], "audio": None, "function_call": None}
    history = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "宇宙", **empty},
        {"role": "tool", "tool_call_id": "c1", "name": "f", "content": "宙"},
        {"role": "assistant", "content": "洪荒", "tool_calls": None, "reasoning_content": None, **empty},
        QUESTION[0],
    ]
    asked = script(["好"])
    assert ask(client, history, tools=[TOOL], tool_choice="auto").choices[0].message.content == "好"
    ask(client, tools=[TOOL], tool_choice="none")
    user, start = "<|im_start|>user\n天地玄黄<|im_end|>\n", "<|im_start|>assistant\n"
    assert asked[0][0] == (
        f"{json.dumps([TOOL])}\n{user}{start}<think>宇宙</think>[f:昃]<|im_end|>\n"
        f"<|im_start|>tool\n宙c1<|im_end|>\n{start}洪荒<|im_end|>\n{user}{start}"
    )
    assert asked[1][0] == user + start


def test_sampling_parameters_and_template_variables(client, script):
    asked = script(["好"])
    ask(client, temperature=1, extra_body={"top_k": 5, "min_p": 0.1, "chat_template_kwargs": {"enable_thinking": True}})
    ask(client, temperature=1, extra_body={"top_k": -1})
    ask(client, temperature=1e-45, extra_body={"top_k": 5, "min_p": 0.1})
    assert asked[0][0].endswith("<think>\n") and not asked[1][0].endswith("<think>\n")
    assert (asked[0][1]["top_k"], asked[0][1]["min_p"]) == (5, 0.1)
    assert asked[1][1]["top_k"] == 0 and "min_p" not in asked[1][1]
    assert not asked[2][1]["do_sample"] and "min_p" not in asked[2][1]


def test_extremes_of_sampling_are_no_failure(chat, client):
    assert ask(client, temperature=1e-38).choices[0].message.content == expected_reply(chat)
    settings = {"temperature": 1e-5, "extra_body": {"top_k": 10**30, "min_p": 1, "repetition_penalty": 0.01}}
    assert ask(client, max_tokens=3, **settings).usage.completion_tokens == 3


@pytest.mark.parametrize(
    "thinking, pieces, thought, content",
    [
        (True, ["宇<", "/thi", "nk>\n", "\n天\n", "地"], "宇", "天\n地"),
        (True, ["宇</thi", "宙"], "宇</thi宙", ""),
        (True, ["</think>"], "", ""),
        (False, ["\n<th", "ink>宇", "</think>天</think>"], "宇", "天</think>"),
        (False, ["<thi", "天"], None, "<thi天"),
        (False, ["天<think>宇</think>"], None, "天<think>宇</think>"),
    ],
)
def test_thoughts_are_apart(client, script, thinking, pieces, thought, content):
    script(pieces)
    settings = {"extra_body": {"chat_template_kwargs": {"enable_thinking": thinking}}}
    message = ask(client, **settings).choices[0].message.model_dump()
    deltas = [chunk.choices[0].delta.model_dump() for chunk in ask(client, stream=True, **settings)]
    assert (message.get("reasoning_content"), message["content"]) == (thought, content)
    for field, text in (("reasoning_content", thought), ("content", content)):
        assert "".join(delta.get(field) or "" for delta in deltas) == (text or "")


def test_models_and_health(server, client):
    assert [model.id for model in client.models.list()] == ["tiny"] == [client.models.retrieve("tiny").id]
    with pytest.raises(openai.NotFoundError, match="no model 'a/b' here, only 'tiny'"):
        client.models.retrieve("a/b")
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
    for scheme, status in (("bearer", 200), ("BEARER", 200), ("Basic", 401)):
        headers = {"Authorization": f"{scheme} {KEY}"}
        assert httpx.get(f"{server.address}/v1/models", headers=headers).status_code == status


@pytest.mark.parametrize(
    "change, error, param, message",
    [
        ({"model": "gpt-5"}, openai.NotFoundError, "model", "no model 'gpt-5' here, only 'tiny'"),
        ({"messages": [{"role": "user", "content": "天" * 500}]}, openai.BadRequestError, "messages", "at most 200"),
        ({"max_tokens": 10001}, openai.BadRequestError, "max_tokens", "at most 10000"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens", "greater than or equal to 1"),
        ({"messages": []}, openai.BadRequestError, "messages", "at least 1"),
        ({"messages": [{"role": "robot", "content": "x"}]}, openai.BadRequestError, "messages.0.role", "assistant"),
        ({"temperature": 3}, openai.BadRequestError, "temperature", "less than or equal to 2"),
        ({"stop": ["a", ""]}, openai.BadRequestError, "stop.1", "at least 1 character"),
        ({"n": 2}, openai.BadRequestError, "n", "does not support n"),
        ({"messages": [{"role": "user"}]}, openai.BadRequestError, "messages.0", "content is missing"),
        ({"tools": [TOOL]}, openai.BadRequestError, "tools", "this model's chat template knows no tools"),
        ({"tool_choice": "required"}, openai.BadRequestError, "tool_choice", "does not support tool_choice"),
        ({"logprobs": True}, openai.BadRequestError, "logprobs", "does not support logprobs"),
        ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "response_format", "not support"),
        ({"extra_body": {"beams": 5}}, openai.BadRequestError, "beams", "not permitted"),
        ({"extra_body": {"top_k": -2}}, openai.BadRequestError, "top_k", "greater than or equal to -1"),
        ({"extra_body": {"min_p": 1.1}}, openai.BadRequestError, "min_p", "less than or equal to 1"),
        ({"extra_body": {"repetition_penalty": 1e-38}}, openai.BadRequestError, "repetition_penalty", "equal to 0.01"),
        (
            {"extra_body": {"chat_template_kwargs": {"tools": [], "tokenize": False, "mine": 1}}},
            openai.BadRequestError,
            "chat_template_kwargs",
            "can't set tokenize, tools, only",
        ),
        (
            {"extra_body": {"chat_template_kwargs": {"messages": []}}},
            openai.BadRequestError,
            "messages",
            "multiple values for",
        ),
    ],
)
def test_bad_requests_are_refused_in_openai_s_form(client, change, error, param, message):
    with pytest.raises(error) as caught:
        ask(client, **change)
    assert caught.value.param == param
    assert message in caught.value.body["message"]
    assert caught.value.type == "invalid_request_error"


def test_broken_arguments_of_a_tool_call_are_refused(client):
    for arguments in ("{", "[]", '"a"'):
        call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        with pytest.raises(openai.BadRequestError) as error:
            ask(client, [*QUESTION, {"role": "assistant", "tool_calls": [call]}])
        assert error.value.param == "messages.1.tool_calls.0.function.arguments"


def test_far_too_long_a_prompt_is_not_tokenized(chat, server, client, monkeypatch):
    longest = max(chat[1].get_vocab(), key=len)
    assert server.state.max_characters == 200 * len(longest)
    monkeypatch.setattr(app, "encode_prompts", None)
    with pytest.raises(openai.BadRequestError, match="1000[0-9]* characters") as error:
        ask(client, [{"role": "user", "content": "天" * 100_000}])
    assert error.value.code == "context_length_exceeded"


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


def connect(address: str, text: bytes = b"") -> socket.socket:
    connection = socket.create_connection(address.removeprefix("http://").split(":"), timeout=5)
    connection.sendall(text)
    return connection


def test_slow_clients_are_dropped(keyless, monkeypatch):
    monkeypatch.setattr(app, "HEADER_SECONDS", 0.3)
    monkeypatch.setattr(app, "BODY_SECONDS", 0.3)
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
    monkeypatch.setattr(app, "SPARE_CONNECTIONS", -8)  # beside the 16 of the queue
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
            for _ in range(300):
                stack.enter_context(connect(address))
            post = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"
            stack.enter_context(connect(address, post))
            pool = stack.enter_context(ThreadPoolExecutor())
            waiting = [pool.submit(ask, client) for _ in range(3)]
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
