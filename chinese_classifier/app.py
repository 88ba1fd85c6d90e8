"""Serves a trained classifier over HTTP.

    python app.py output                                                    http://127.0.0.1:8000, this machine only
    API_KEY=secret python app.py output --host 0.0.0.0 --port 8000          the whole network, with a key

    POST /classify {"texts": "one text"} or {"texts": ["many", "texts"]}
    GET /openapi.json (with the key)    GET /health (needs none)

The way of a request: read_request (limits) -> a queue -> classify_waiting: all that waits while the model is busy is
classified together, sorted by length -> the scores of each class.
"""

import asyncio
import hmac
import ipaddress
import logging
import os
import sys
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.datastructures import State
from starlette.requests import ClientDisconnect

from infer import load_trained_model, model_parser, predict_probabilities, rank_classes
from rows import UserError

LIMITS = {
    "max_texts": 256,  # in one request, and about as many in one batch
    "max_characters": 20_000,  # in one text
    "max_queue": 64,  # requests that may wait while others are served; those beyond get 429
    "max_body_bytes": 4 << 20,
    "max_body_seconds": 30,
}
router = APIRouter()
log = logging.getLogger("uvicorn.error")


class ClassifyRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    texts: Annotated[
        list[str],
        Field(min_length=1, description="a single text needs no list"),
        BeforeValidator(lambda text: [text] if isinstance(text, str) else text),
    ]


class Result(BaseModel):
    label: str
    probability: float
    scores: dict[str, float]
    cut: bool = Field(description="the text was longer than the model takes: its end was not read")


class ClassifyAnswer(BaseModel):
    model: str
    results: list[Result]


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
    if key and not hmac.compare_digest(request.headers.get("authorization", "").encode(), f"Bearer {key}".encode()):
        raise api_error(401, "missing or wrong API key: send 'Authorization: Bearer <key>'", code="invalid_api_key")


async def read_body(request: Request, limit: int) -> bytes:
    """The body; one that is too large is read to its end, or the client would miss the answer: 413."""
    body, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        body += chunk if size <= limit else b""
    if size > limit:
        raise api_error(413, f"the body has {size} bytes, at most {limit} are accepted", code="body_too_large")
    return bytes(body)


async def read_request(request: Request) -> list[str]:
    """The checked texts of a request.

    Raises:
        HTTPException: 408 the body doesn't come; 413 too large; 400 no JSON, no texts, an empty one, or too many.
    """
    state = request.app.state
    try:
        body = await asyncio.wait_for(read_body(request, state.max_body_bytes), state.max_body_seconds)
    except asyncio.TimeoutError:
        message = f"the body did not come within {state.max_body_seconds:g} s"
        raise api_error(408, message, code="body_timeout") from None
    try:
        texts = ClassifyRequest.model_validate_json(body.removeprefix(b"\xef\xbb\xbf")).texts  # a BOM
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = ".".join(map(str, first["loc"]))
        message = f"{param or 'the body is no JSON object'}: {first['msg']}"
        raise api_error(400, message, param or None, "invalid_value" if param else "invalid_json") from None
    if len(texts) > state.max_texts:
        raise api_error(400, f"{len(texts)} texts, at most {state.max_texts} are accepted in a request", "texts")
    for number, text in enumerate(texts):
        if not text.strip():
            raise api_error(400, f"texts.{number} is empty", f"texts.{number}", "invalid_value")
        if len(text) > state.max_characters:
            message = f"texts.{number} has {len(text)} characters, at most {state.max_characters} are accepted"
            raise api_error(400, message, f"texts.{number}", "invalid_value")
    return texts


async def end_with_client(request: Request, answer: asyncio.Future) -> None:
    """Takes the request out of the queue as soon as its client has gone."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)
    answer.cancel()


async def classify_waiting(state) -> None:
    """For as long as the server runs: classifies all texts that wait, together, and gives each request its scores."""
    while True:
        jobs = [await state.queue.get()]
        while not state.queue.empty() and sum(len(texts) for texts, _ in jobs) < state.max_texts:
            jobs.append(state.queue.get_nowait())
        jobs = [(texts, answer) for texts, answer in jobs if not answer.cancelled()]  # its client has gone
        if not jobs:
            continue
        texts = [text for texts, _ in jobs for text in texts]
        try:
            scores, cut = await asyncio.to_thread(predict_probabilities, state.model, state.tokenizer, texts)
        except Exception:
            log.exception("a batch failed")
            for _, answer in jobs:
                if not answer.done():
                    answer.set_exception(api_error(500, "the server failed to classify the texts; its log says why"))
            continue
        start = 0
        for texts, answer in jobs:
            if not answer.done():
                answer.set_result((scores[start : start + len(texts)], cut[start : start + len(texts)]))
            start += len(texts)


@router.post(
    "/classify",
    dependencies=[Depends(check_key), Depends(HTTPBearer(auto_error=False))],
    openapi_extra={"requestBody": {"content": {"application/json": {"schema": ClassifyRequest.model_json_schema()}}}},
)
async def classify(request: Request) -> ClassifyAnswer:
    state = request.app.state
    texts = await read_request(request)
    if state.queue.qsize() >= state.max_queue:
        raise api_error(429, f"{state.max_queue} requests are waiting already; try again later", code="queue_full")
    answer = asyncio.get_running_loop().create_future()
    state.queue.put_nowait((texts, answer))
    watch = asyncio.create_task(end_with_client(request, answer))
    try:
        scores, cut = await answer
    except asyncio.CancelledError:
        raise ClientDisconnect from None
    finally:
        watch.cancel()
    results = []
    for probabilities, is_cut in zip(scores, cut, strict=True):
        ranked = rank_classes(state.model, probabilities)
        results.append(Result(label=ranked[0][0], probability=ranked[0][1], scores=dict(ranked), cut=is_cut))
    return ClassifyAnswer(model=state.model_name, results=results)


@router.get("/openapi.json", dependencies=[Depends(check_key)], include_in_schema=False)
async def describe_api(request: Request) -> dict:
    return request.app.openapi()


@router.get("/health")
async def health() -> dict:
    return {"status": "ok"}


def create_app(model, tokenizer, model_name: str, api_key: str | None = None, **limits) -> FastAPI:
    """The API of one classifier.

    Args:
        model, tokenizer: from `infer.load_trained_model`.
        api_key: where given, /classify and /openapi.json want `Authorization: Bearer <api_key>`.
        limits: in place of those in LIMITS.
    """

    @asynccontextmanager
    async def run_classifier(app: FastAPI):
        app.state.queue = asyncio.Queue()
        worker = asyncio.create_task(classify_waiting(app.state))
        yield
        worker.cancel()
        with suppress(asyncio.CancelledError):
            await worker

    app = FastAPI(title=model_name, docs_url=None, redoc_url=None, openapi_url=None, lifespan=run_classifier)
    app.include_router(router)
    for error in (HTTPException, 404, 405, ClientDisconnect, Exception):
        app.add_exception_handler(error, send_error)
    own = {"model": model, "tokenizer": tokenizer, "model_name": model_name, "api_key": api_key}
    app.state = State(own | LIMITS | limits)
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
    parser = model_parser(__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; a public one needs API_KEY")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--model_name", help="name in the API; by default the last part of the folder's name")
    parser.add_argument("--max_texts", type=int, default=LIMITS["max_texts"], help="texts in one request")
    parser.add_argument("--max_characters", type=int, default=LIMITS["max_characters"], help="characters in one text")
    parser.add_argument(
        "--max_queue", type=int, default=LIMITS["max_queue"], help="requests that may wait; more get 429"
    )
    args = parser.parse_args(argv)

    import uvicorn

    api_key = os.environ.get("API_KEY")
    try:
        check_host(args.host, api_key)
        model, tokenizer = load_trained_model(args.model, args.trust_remote_code)
    except UserError as error:
        sys.exit(str(error))
    name = args.model_name or Path(args.model).resolve().name
    limits = {name: value for name, value in vars(args).items() if name in LIMITS}
    app = create_app(model, tokenizer, name, api_key, **limits)
    uvicorn.run(app, host=args.host, port=args.port, timeout_graceful_shutdown=5)


if __name__ == "__main__":
    main()
