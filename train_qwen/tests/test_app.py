"""The API over real HTTP, by the openai package: replies, refusals, and places that are freed."""

import json

import httpx
import openai
import pytest
from served import KEY, QUESTION, ask

import app
from infer import reply_batch

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
