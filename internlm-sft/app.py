"""Serves a trained model with OpenAI's HTTP API, for the openai package and every chat front-end that speaks it.

    python app.py output_zero2                                              http://127.0.0.1:8000/v1, this machine only
    API_KEY=secret python app.py output_zero2 --host 0.0.0.0 --port 8000    the whole network, with a key

    POST /v1/chat/completions      GET /v1/models, /v1/models/NAME      GET /health (needs no key)

The way of a request: read_request -> generate (queues it; a client that goes away frees its place, waiting or served)
-> write_reply, in the worker: prepare (template, limits), then the reply -> one JSON object or server-sent events.
A thought, <think>...</think>, is given as `reasoning_content`; a tool call that the model writes stays in the text.
"""

# The same in every recipe that has it: python tests/copies.py --fix FILE

import argparse
import asyncio
import hmac
import ipaddress
import json
import logging
import os
import re
import signal
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError
from starlette.requests import ClientDisconnect

from api import ChatRequest, api_error, read_request
from infer import context_length, decode_pieces, encode_prompts, generation_settings, load_trained_model, stream_tokens
from rows import UserError
from server import create_server
from template import CLOSED, OPENED, render

router = APIRouter()
log = logging.getLogger("uvicorn.error")


# >>> app-guards
def send_error(request: Request, error: Exception) -> Response:
    """The answer to a request that failed: OpenAI's form, and nothing of what went wrong inside the server."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)
    if not isinstance(error, HTTPException):  # raised by the router: no such path or method; else a fault of ours
        status = getattr(error, "status_code", 500)
        error = api_error(status, getattr(error, "detail", "the server failed; its log says why"))
    return JSONResponse({"error": error.detail}, error.status_code)


def check_site(request: Request) -> None:
    """Raises 403 for a web page of another site where no key guards the server; its name may lead here (rebinding)."""
    state, names = request.app.state, [request.headers.get("host", "")]
    if request.headers.get("origin", state.cors_origin) != state.cors_origin:
        names.append(request.headers["origin"])
    for name in names:
        if not state.api_key and re.sub(r"^https?://|:\d+$", "", name.lower()) not in state.hosts:
            raise api_error(403, f"{name} is none of this server's names; set API_KEY to serve it", code="foreign_site")


def check_key(request: Request) -> None:
    """Raises 401 where the server has a key and the request doesn't carry it."""
    key = request.app.state.api_key
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if key and not (scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), key.encode())):
        raise api_error(401, "missing or wrong API key: send 'Authorization: Bearer <key>'", code="invalid_api_key")


# <<< app-guards


def prepare(state, chat: ChatRequest) -> tuple:
    """What a reply starts from.

    Returns:
        The prompt (`input_ids` and `attention_mask` of shape (1, tokens)), the arguments of `generate`, and whether the
        prompt ends within a thought.

    Raises:
        HTTPException: 400 messages or reply too long, or refused by the chat template.
    """
    messages = [message.to_template() for message in chat.messages]
    tools, variables = [tool.model_dump() for tool in chat.tools] or None, chat.chat_template_kwargs
    try:
        text = render(messages, state.tokenizer, tools, prompt=True, **variables)
        if tools and text == render(messages, state.tokenizer, None, prompt=True, **variables):
            raise api_error(400, "this model's chat template knows no tools", "tools", "unsupported_parameter")
        if len(text) > state.max_characters:  # told without tokenizing them, which takes seconds
            message = f"the messages have {len(text)} characters, at most {state.max_input_tokens} tokens are accepted"
            raise api_error(400, message, "messages", "context_length_exceeded")
        inputs = encode_prompts(state.tokenizer, [messages], tools, **variables)
    except (TemplateError, TypeError, ValueError, RecursionError) as error:  # a template is a program, run on these
        raise api_error(400, f"the model's chat template refuses these messages: {error}", "messages") from None
    tokens = inputs["input_ids"].shape[1]
    if tokens > state.max_input_tokens:
        message = f"the messages have {tokens} tokens, at most {state.max_input_tokens} are accepted"
        raise api_error(400, message, "messages", "context_length_exceeded")
    room = context_length(state.model) - tokens
    wanted = chat.max_completion_tokens or chat.max_tokens or min(room, state.max_new_tokens)
    temperature = chat.temperature if chat.temperature >= 1e-5 else 0  # below, the logits would overflow
    try:
        settings = generation_settings(
            state.model, state.tokenizer, inputs, wanted, temperature, chat.top_p, chat.repetition_penalty
        )
    except UserError as error:
        raise api_error(400, str(error), "max_tokens", "context_length_exceeded") from None
    if temperature and chat.top_k is not None:
        settings["top_k"] = max(chat.top_k, 0)
    if temperature and chat.min_p is not None:
        settings["min_p"] = chat.min_p
    return inputs, settings, text.rstrip().endswith(OPENED)


# >>> app-replies
def split_at_stop(text: str, stops: list[str]) -> tuple[str, str, bool]:
    """What of a growing text can be sent, what waits since it may begin a stop sequence, and whether one was found."""
    found = [text.index(stop) for stop in stops if stop in text]
    if found:
        return text[: min(found)], "", True
    for start in range(max(0, len(text) - max(map(len, stops), default=0)), len(text)):
        if any(stop.startswith(text[start:]) for stop in stops):
            return text[:start], text[start:], False
    return text, "", False


def split_thought(pieces: Iterable[str], thinking: bool) -> Iterator[tuple[str, str]]:
    """Yields the pieces of a reply with the field they belong to: `reasoning_content` up to </think>, then `content`.

    Args:
        thinking: whether the prompt has opened a thought already; else the reply may begin with one.
    """
    text, field = "", "reasoning_content" if thinking else "unknown"
    for piece in pieces:
        text += piece
        if field == "unknown":
            start = text.lstrip()
            if len(start) < len(OPENED) and OPENED.startswith(start):
                continue
            field = "content"
            if start.startswith(OPENED):
                field, text = "reasoning_content", start.removeprefix(OPENED)
        if field == "reasoning_content":
            thought, held, closed = split_at_stop(text, [CLOSED])
            yield field, thought
            field, text = ("answer", text[len(thought) + len(CLOSED) :]) if closed else (field, held)
        if field == "answer":
            text = text.lstrip("\n")
            field = "content" if text else field
        if field == "content":
            yield field, text
            text = ""
    if text:
        yield field if field == "reasoning_content" else "content", text


def write_reply(state, chat: ChatRequest, send, stop: threading.Event) -> dict:
    """Runs in the worker thread: passes (field, text) by (field, text) to `send`; returns finish_reason and usage."""
    inputs, settings, thinking = prepare(state, chat)
    if chat.seed is not None:
        torch.manual_seed(chat.seed)
    ids, found = [], False

    def pieces():
        nonlocal found
        held = ""
        # `ids.append` returns None: the tokens pass through and are counted.
        for piece in decode_pieces(state.tokenizer, (ids.append(token) or token for token in tokens)):
            ready, held, found = split_at_stop(held + piece, chat.stop)
            yield ready
            if found:
                return
        yield held

    with closing(stream_tokens(state.model, inputs, settings, stop)) as tokens:
        for part in split_thought(pieces(), thinking):
            send(part)
    ended = found or (ids and ids[-1] in state.model.generation_config.eos_token_id)
    prompt_tokens = inputs["input_ids"].shape[1]
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": len(ids), "total_tokens": prompt_tokens + len(ids)}
    return {"finish_reason": "stop" if ended else "length", "usage": usage}


async def end_with_client(request: Request, job: Future, stop: threading.Event, pieces: asyncio.Queue) -> None:
    """Gives the place in the queue, or the model, back as soon as the client has gone or the server ends."""
    while not request.app.state.stopping and not await request.is_disconnected():
        await asyncio.sleep(0.1)
    stop.set()
    job.cancel()
    pieces.put_nowait(None)


async def generate(request: Request, chat: ChatRequest) -> AsyncIterator[tuple[str, str] | dict]:
    """Yields the pieces of a reply as (field, text), then its finish_reason and usage.

    Raises:
        HTTPException: what `prepare` raises; 429 too many requests wait already; 500 the generation failed; 503 the
            server ends.
        ClientDisconnect: nobody is there any more.
    """
    state = request.app.state
    state.jobs = [job for job in state.jobs if not job.done()]
    if len(state.jobs) > state.max_queue:
        raise api_error(429, f"{state.max_queue} requests are waiting already; try again later", code="queue_full")
    pieces, stop = asyncio.Queue(), threading.Event()
    send = partial(asyncio.get_running_loop().call_soon_threadsafe, pieces.put_nowait)
    job = state.worker.submit(write_reply, state, chat, send, stop)
    job.add_done_callback(lambda _: send(None))
    state.jobs.append(job)
    watch = asyncio.create_task(end_with_client(request, job, stop, pieces))
    try:
        while (piece := await pieces.get()) is not None:
            yield piece
        if stop.is_set():
            raise api_error(503, "the server shuts down", code="shutting_down") if state.stopping else ClientDisconnect
        if isinstance(job.exception(), HTTPException):
            raise job.exception()
        if job.exception() is not None:
            log.error("a reply failed", exc_info=job.exception())
            raise api_error(500, "the server failed to generate a reply; its log says why")
        yield job.result()
    finally:
        watch.cancel()
        stop.set()
        job.cancel()


async def stream_events(head: dict, item: tuple | dict, replies, include_usage: bool) -> AsyncIterator[str]:
    """The reply as server-sent events; `item` is the first of it."""

    def event(delta, finish_reason=None):
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return f"data: {json.dumps({**head, 'choices': [choice]}, ensure_ascii=False)}\n\n"

    yield event({"role": "assistant", "content": ""})
    try:
        while isinstance(item, tuple):
            field, text = item
            if text:
                yield event({field: text})
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


# <<< app-replies


@router.post("/v1/chat/completions", dependencies=[Depends(check_key)])
async def chat_completions(request: Request) -> Response:
    chat = await read_request(request)
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": chat.model}
    replies = generate(request, chat)
    item = await anext(replies)  # an error up to here still has its own HTTP status
    if chat.stream:
        head["object"] = "chat.completion.chunk"
        events = stream_events(head, item, replies, chat.stream_options.include_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    message = {"role": "assistant", "content": ""}
    while isinstance(item, tuple):
        field, text = item
        message[field] = message.get(field, "") + text
        item = await anext(replies)
    choice = {"index": 0, "message": message, "finish_reason": item["finish_reason"], "logprobs": None}
    return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": item["usage"]})


# >>> app-models
@router.get("/v1/models", dependencies=[Depends(check_key)])
async def models(request: Request) -> dict:
    return {"object": "list", "data": [request.app.state.model_card]}


@router.get("/v1/models/{name:path}", dependencies=[Depends(check_key)])
async def model(request: Request, name: str) -> dict:
    state = request.app.state
    if name != state.model_name:
        raise api_error(404, f"no model {name!r} here, only {state.model_name!r}", "model", "model_not_found")
    return state.model_card


@router.get("/health")
async def health() -> dict:
    return {"status": "ok"}


# <<< app-models


def create_app(
    model,
    tokenizer,
    model_name: str,
    api_key: str | None = None,
    max_input_tokens: int | None = None,
    max_new_tokens: int = 2048,
    max_queue: int = 16,
    max_body_bytes: int = 1 << 20,
    host: str = "127.0.0.1",
    cors_origin: str | None = None,
) -> FastAPI:
    """The API of one model.

    Args:
        model, tokenizer: from `infer.load_trained_model`.
        api_key: where given, /v1/... wants `Authorization: Bearer <api_key>`.
        max_input_tokens: longest prompt; by default what the model's context holds.
        max_new_tokens: longest reply.
        max_queue: requests that may wait while one is served; those beyond get 429.
        host: without a key, the name beside localhost's under which the server may be asked.
        cors_origin: the web site (`https://name:port`) whose pages may ask the server.
    """
    app = FastAPI(title=model_name, docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(check_site)])
    app.include_router(router)
    for error in (HTTPException, 404, 405, ClientDisconnect, Exception):
        app.add_exception_handler(error, send_error)
    state = app.state
    state.model, state.tokenizer, state.model_name, state.api_key = model, tokenizer, model_name, api_key
    state.max_input_tokens = min(max_input_tokens or sys.maxsize, context_length(model) - 1)
    state.max_new_tokens, state.max_queue, state.max_body_bytes = max_new_tokens, max_queue, max_body_bytes
    # A prompt that fits can't be longer: no token holds more characters than the longest one.
    state.max_characters = state.max_input_tokens * max(map(len, tokenizer.get_vocab()))
    state.model_card = {"id": model_name, "object": "model", "created": int(time.time()), "owned_by": "local"}
    state.worker, state.jobs, state.stopping = ThreadPoolExecutor(max_workers=1), [], False
    state.hosts = {"localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host.lower()}
    state.cors_origin = cors_origin and cors_origin.rstrip("/")
    if cors_origin:
        app.add_middleware(
            CORSMiddleware, allow_origins=[state.cors_origin], allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return app


# >>> app-host
def check_host(host: str, api_key: str | None) -> None:
    """Raises UserError where others could reach the server and no key guards it."""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local and not api_key:
        raise UserError(f"--host {host} lets others in: set a key first (API_KEY=... python app.py ...).")


# <<< app-host


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model or of a LoRA adapter, or a hub id")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; a public one needs API_KEY")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--model_name", help="name in the API; by default the last part of the folder's name")
    parser.add_argument("--max_input_tokens", type=int, help="longest prompt; by default what the model can hold")
    parser.add_argument("--max_new_tokens", type=int, default=2048, help="longest reply a client can ask for")
    parser.add_argument("--max_queue", type=int, default=16, help="requests that may wait; those beyond get 429")
    parser.add_argument("--cors_origin", metavar="URL", help="web site whose pages may ask, such as https://my.site")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code that comes with the model")
    args = parser.parse_args(argv)

    api_key = os.environ.get("API_KEY")
    try:
        check_host(args.host, api_key)
        model, tokenizer = load_trained_model(args.model, args.trust_remote_code)
    except UserError as error:
        sys.exit(f"error: {error}")
    name = args.model_name or Path(args.model).resolve().name
    limits = {name: getattr(args, name) for name in ("max_input_tokens", "max_new_tokens", "max_queue")}
    app = create_app(model, tokenizer, name, api_key, **limits, host=args.host, cors_origin=args.cors_origin)
    # uvicorn raises the signal again when all clients are told; a long prompt still being read can't be interrupted.
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, lambda *_: os._exit(0))
    create_server(app, args.host, args.port).run()


if __name__ == "__main__":
    main()
