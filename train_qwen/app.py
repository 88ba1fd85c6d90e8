"""Serves a trained model with OpenAI's HTTP API, for the openai package and every chat front-end that speaks it.

    python app.py output_zero2                                              http://127.0.0.1:8000/v1, this machine only
    API_KEY=secret python app.py output_zero2 --host 0.0.0.0 --port 8000    the whole network, with a key

    POST /v1/chat/completions      GET /v1/models      GET /health (needs no key)

The way of a request: read_request -> prepare (template, limits) -> generate (one reply at a time; the rest queues)
-> one JSON object or server-sent events. A client that goes away frees its place, waiting or served.
"""

# The same in every recipe that has it: python tests/copies.py --fix FILE

import argparse
import asyncio
import hmac
import ipaddress
import json
import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect

from infer import context_length, decode_pieces, encode_prompts, generation_settings, load_trained_model, stream_tokens
from rows import UserError

# Parameters that would change the reply and that this server doesn't have, with the values that ask for nothing.
UNSUPPORTED = {
    "n": [1],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "functions": [[]],
    "function_call": ["none", "auto"],
    "response_format": [{"type": "text"}],
    "logprobs": [False],
    "top_logprobs": [0],
    "logit_bias": [{}],
    "presence_penalty": [0],
    "frequency_penalty": [0],
    "modalities": [["text"]],
    "audio": [],
    "reasoning_effort": [],
    "verbosity": [],
    "web_search_options": [],
}
# Parameters that don't change the reply. What is neither here nor above nor in ChatRequest is refused as unknown.
IGNORED = ["user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"]

router = APIRouter()
log = logging.getLogger("uvicorn.error")


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[TextPart],
        BeforeValidator(lambda text: [{"type": "text", "text": text}] if isinstance(text, str) else text),
    ]
    name: str | None = None


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """The parameters of /v1/chat/completions that this server honours; null is the same as left out."""

    model_config = ConfigDict(extra="forbid")
    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.7, ge=0, le=2)
    top_p: float = Field(0.8, gt=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=2)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]],
        BeforeValidator(lambda text: [text] if isinstance(text, str) else text),
    ] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()


def api_error(status: int, message: str, param: str | None = None, code: str | None = None) -> HTTPException:
    """An error that reaches the client in OpenAI's form."""
    kind = {429: "rate_limit_error", 500: "server_error"}.get(status, "invalid_request_error")
    return HTTPException(status, {"message": message, "type": kind, "param": param, "code": code})


def send_error(request: Request, error: Exception) -> Response:
    """The answer to a request that failed: OpenAI's form, and nothing of what went wrong inside the server."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)
    if not isinstance(error, HTTPException):  # raised by the router: no such path or method; else a fault of ours
        status = getattr(error, "status_code", 500)
        error = api_error(status, getattr(error, "detail", "the server failed; its log says why"))
    return JSONResponse({"error": error.detail}, error.status_code)


def check_key(request: Request) -> None:
    """Raises 401 where the server has a key and the request doesn't carry it."""
    key = request.app.state.api_key
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if key and not hmac.compare_digest(given.encode(), key.encode()):
        raise api_error(401, "missing or wrong API key: send 'Authorization: Bearer <key>'", code="invalid_api_key")


async def read_request(request: Request) -> ChatRequest:
    """The checked body of a request.

    Raises:
        HTTPException: 413 too large; 400 no JSON, a wrong or unknown parameter, or one that can't be honoured.
    """
    limit, body, size = request.app.state.max_body_bytes, bytearray(), 0
    async for chunk in request.stream():  # too large a body is read to its end, or the client would miss the answer
        size += len(chunk)
        body += chunk if size <= limit else b""
    if size > limit:
        raise api_error(413, f"the body has {size} bytes, at most {limit} are accepted", code="body_too_large")
    try:
        fields = json.loads(body)
        json.dumps(fields, ensure_ascii=False).encode()  # fails for half a surrogate pair, which is no text
    except (ValueError, RecursionError) as error:
        raise api_error(400, f"the body is no JSON: {error}", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise api_error(400, "the body is no JSON object", code="invalid_json")
    fields = {name: value for name, value in fields.items() if value is not None and name not in IGNORED}
    for name, neutral in UNSUPPORTED.items():
        if name in fields and fields.pop(name) not in neutral:
            raise api_error(400, f"this server does not support {name}", name, "unsupported_parameter")
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = ".".join(str(part) for part in first["loc"])
        raise api_error(400, f"{param}: {first['msg']}", param, "invalid_value") from None


def prepare(state, chat: ChatRequest) -> tuple:
    """The prompt (`input_ids` and `attention_mask` of shape (1, tokens)) and the arguments of `generate`.

    Raises:
        HTTPException: 404 another model; 400 messages or reply too long, or refused by the chat template.
    """
    if chat.model != state.model_name:
        raise api_error(404, f"no model {chat.model!r} here, only {state.model_name!r}", "model", "model_not_found")
    messages = []
    for message in chat.messages:
        role = "system" if message.role == "developer" else message.role
        messages.append({"role": role, "content": "".join(part.text for part in message.content)})
    try:
        inputs = encode_prompts(state.tokenizer, [messages])
    except TemplateError as error:
        raise api_error(400, f"the model's chat template refuses these messages: {error}", "messages") from None
    tokens = inputs["input_ids"].shape[1]
    if tokens > state.max_input_tokens:
        message = f"the messages have {tokens} tokens, at most {state.max_input_tokens} are accepted"
        raise api_error(400, message, "messages", "context_length_exceeded")
    room = context_length(state.model) - tokens
    wanted = chat.max_completion_tokens or chat.max_tokens or min(room, state.max_new_tokens)
    if wanted > state.max_new_tokens:
        message = f"max_tokens is {wanted}, at most {state.max_new_tokens} are generated"
        raise api_error(400, message, "max_tokens", "invalid_value")
    try:
        settings = generation_settings(
            state.model, state.tokenizer, inputs, wanted, chat.temperature, chat.top_p, chat.repetition_penalty
        )
    except UserError as error:
        raise api_error(400, str(error), "max_tokens", "context_length_exceeded") from None
    return inputs, settings


def split_at_stop(text: str, stops: list[str]) -> tuple[str, str, bool]:
    """What of a growing text can be sent, what waits since it may begin a stop sequence, and whether one was found."""
    found = [text.index(stop) for stop in stops if stop in text]
    if found:
        return text[: min(found)], "", True
    for start in range(max(0, len(text) - max(map(len, stops), default=0)), len(text)):
        if any(stop.startswith(text[start:]) for stop in stops):
            return text[:start], text[start:], False
    return text, "", False


def write_reply(state, chat: ChatRequest, inputs, settings: dict, send, stop: threading.Event) -> dict:
    """Runs in the worker thread: passes the pieces of the reply to `send`; returns finish_reason and usage."""
    if chat.seed is not None:
        torch.manual_seed(chat.seed)
    ids, held, found = [], "", False
    with closing(stream_tokens(state.model, inputs, settings, stop)) as tokens:
        # `ids.append` returns None: the tokens pass through and are counted.
        for piece in decode_pieces(state.tokenizer, (ids.append(token) or token for token in tokens)):
            ready, held, found = split_at_stop(held + piece, chat.stop)
            send(ready)
            if found:
                break
    send(held)
    ended = found or (ids and ids[-1] in state.model.generation_config.eos_token_id)
    prompt_tokens = inputs["input_ids"].shape[1]
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": len(ids), "total_tokens": prompt_tokens + len(ids)}
    return {"finish_reason": "stop" if ended else "length", "usage": usage}


async def end_with_client(request: Request, job: Future, stop: threading.Event) -> None:
    """Gives the place in the queue, or the model, back as soon as the client has gone."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)
    stop.set()
    job.cancel()


async def generate(request: Request, chat: ChatRequest, inputs, settings: dict) -> AsyncIterator[str | dict]:
    """Yields the pieces of a reply, then its finish_reason and usage.

    Raises:
        HTTPException: 429 too many requests wait already; 500 the generation failed.
        ClientDisconnect: nobody is there any more.
    """
    state = request.app.state
    state.jobs = [job for job in state.jobs if not job.done()]
    if len(state.jobs) > state.max_queue:
        raise api_error(429, f"{state.max_queue} requests are waiting already; try again later", code="queue_full")
    pieces, stop = asyncio.Queue(), threading.Event()
    send = partial(asyncio.get_running_loop().call_soon_threadsafe, pieces.put_nowait)
    job = state.worker.submit(write_reply, state, chat, inputs, settings, send, stop)
    job.add_done_callback(lambda _: send(None))
    state.jobs.append(job)
    watch = asyncio.create_task(end_with_client(request, job, stop))
    try:
        while (piece := await pieces.get()) is not None:
            yield piece
        if stop.is_set():
            raise ClientDisconnect
        if job.exception() is not None:
            log.error("a reply failed", exc_info=job.exception())
            raise api_error(500, "the server failed to generate a reply; its log says why")
        yield job.result()
    finally:
        watch.cancel()
        stop.set()
        job.cancel()


async def stream_events(head: dict, item: str | dict, replies, include_usage: bool) -> AsyncIterator[str]:
    """The reply as server-sent events; `item` is the first of it."""

    def event(delta, finish_reason=None):
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return f"data: {json.dumps({**head, 'choices': [choice]}, ensure_ascii=False)}\n\n"

    yield event({"role": "assistant", "content": ""})
    try:
        while isinstance(item, str):
            if item:
                yield event({"content": item})
            item = await anext(replies)
    except ClientDisconnect:
        return
    except HTTPException as error:
        yield f"data: {json.dumps({'error': error.detail})}\n\n"
        return
    yield event({}, item["finish_reason"])
    if include_usage:
        yield f"data: {json.dumps({**head, 'choices': [], 'usage': item['usage']})}\n\n"
    yield "data: [DONE]\n\n"


@router.post("/v1/chat/completions", dependencies=[Depends(check_key)])
async def chat_completions(request: Request) -> Response:
    chat = await read_request(request)
    async with request.app.state.encoding:  # a tokenizer is not made to encode two texts at once
        inputs, settings = await asyncio.to_thread(prepare, request.app.state, chat)
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": chat.model}
    replies = generate(request, chat, inputs, settings)
    item = await anext(replies)  # an error up to here still has its own HTTP status
    if chat.stream:
        head["object"] = "chat.completion.chunk"
        events = stream_events(head, item, replies, chat.stream_options.include_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    text = ""
    while isinstance(item, str):
        text += item
        item = await anext(replies)
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": item["finish_reason"], "logprobs": None}
    return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": item["usage"]})


@router.get("/v1/models", dependencies=[Depends(check_key)])
async def models(request: Request) -> dict:
    state = request.app.state
    model = {"id": state.model_name, "object": "model", "created": state.created, "owned_by": "local"}
    return {"object": "list", "data": [model]}


@router.get("/health")
async def health() -> dict:
    return {"status": "ok"}


def create_app(
    model,
    tokenizer,
    model_name: str,
    api_key: str | None = None,
    max_input_tokens: int | None = None,
    max_new_tokens: int = 2048,
    max_queue: int = 16,
    max_body_bytes: int = 1 << 20,
) -> FastAPI:
    """The API of one model.

    Args:
        model, tokenizer: from `infer.load_trained_model`.
        api_key: where given, /v1/... wants `Authorization: Bearer <api_key>`.
        max_input_tokens: longest prompt; by default what the model's context holds.
        max_new_tokens: longest reply.
        max_queue: requests that may wait while one is served; those beyond get 429.
    """
    app = FastAPI(title=model_name, docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(router)
    for error in (HTTPException, 404, 405, ClientDisconnect, Exception):
        app.add_exception_handler(error, send_error)
    state = app.state
    state.model, state.tokenizer, state.model_name, state.api_key = model, tokenizer, model_name, api_key
    state.max_input_tokens = min(max_input_tokens or sys.maxsize, context_length(model) - 1)
    state.max_new_tokens, state.max_queue, state.max_body_bytes = max_new_tokens, max_queue, max_body_bytes
    state.worker, state.jobs, state.created = ThreadPoolExecutor(max_workers=1), [], int(time.time())
    state.encoding = asyncio.Lock()
    return app


def check_host(host: str, api_key: str | None) -> None:
    """Raises UserError where others could reach the server and no key guards it."""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local and not api_key:
        raise UserError(f"--host {host} lets others in: set a key first (API_KEY=... python app.py ...).")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model or of a LoRA adapter, or a hub id")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; a public one needs API_KEY")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--model_name", help="name in the API; by default the last part of the folder's name")
    parser.add_argument("--max_input_tokens", type=int, help="longest prompt; by default what the model can hold")
    parser.add_argument("--max_new_tokens", type=int, default=2048, help="longest reply a client can ask for")
    parser.add_argument("--max_queue", type=int, default=16, help="requests that may wait; those beyond get 429")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code that comes with the model")
    args = parser.parse_args(argv)

    import uvicorn

    api_key = os.environ.get("API_KEY")
    try:
        check_host(args.host, api_key)
        model, tokenizer = load_trained_model(args.model, args.trust_remote_code)
    except UserError as error:
        sys.exit(f"error: {error}")
    name = args.model_name or Path(args.model).resolve().name
    app = create_app(model, tokenizer, name, api_key, args.max_input_tokens, args.max_new_tokens, args.max_queue)
    uvicorn.run(app, host=args.host, port=args.port, timeout_graceful_shutdown=5)


if __name__ == "__main__":
    main()
