"""Serves a trained model over HTTP: embeddings of texts and images, and the search in an index.

    python app.py output                                              http://127.0.0.1:8000, this machine only
    python app.py output --index my.db --data_path my_folder          with POST /search, the index brought up to date
    API_KEY=secret python app.py output --host 0.0.0.0 --port 8000    the whole network, with a key

    POST /embed {"texts": ["一只猫"]} or {"images": ["data:image/png;base64,..."]}
    POST /search {"text": "一只猫", "top_k": 5} or {"image": "data:image/png;base64,...", "top_k": 5}
    GET /health (needs no key)

The way of a request: read_request (limits) -> run_job (queues it; a client that goes away frees its place) -> embed or
search, in the one worker thread -> JSON.
"""

import argparse
import asyncio
import base64
import binascii
import hmac
import io
import ipaddress
import json
import logging
import os
import re
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.requests import ClientDisconnect

from batch import Pixels
from files import UserError
from gallery import read_gallery
from images import FORMATS, ImageError, load_image
from infer import embed_captions, embed_pixels, hide_progress_bars, load_trained_model
from search import SearchIndex, show_update
from server import create_server

BODY_SECONDS = 30  # a client that hasn't sent its body by then is dropped
PART = 16  # texts or images that are embedded between two looks at whether the client is still there

router = APIRouter()
log = logging.getLogger("uvicorn.error")


class EmbedRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    texts: list[str] | None = Field(None, min_length=1)
    images: list[str] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def check_one(self):
        if (self.texts is None) == (self.images is None):
            raise ValueError("give either texts or images")
        return self


class SearchRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    text: str | None = None
    image: str | None = None
    top_k: Annotated[int, Field(ge=1, le=100, strict=True)] = 10

    @model_validator(mode="after")
    def check_one(self):
        if (self.text is None) == (self.image is None):
            raise ValueError("give either text or image")
        return self


def api_error(status: int, message: str, param: str | None = None, code: str | None = None) -> HTTPException:
    """An error that reaches the client in OpenAI's form."""
    kind = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}.get(status, "invalid_request_error")
    return HTTPException(status, {"message": message, "type": kind, "param": param, "code": code})


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
    if "origin" in request.headers:
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


async def read_body(request: Request) -> bytes:
    """Raises 413 for a body that is too large."""
    limit, body, size = request.app.state.max_body_bytes, bytearray(), 0
    async for chunk in request.stream():  # too large a body is read to its end, or the client would miss the answer
        size += len(chunk)
        body += chunk if size <= limit else b""
    if size > limit:
        raise api_error(413, f"the body has {size} bytes, at most {limit} are accepted", code="body_too_large")
    return bytes(body)


async def read_request(request: Request, kind: type[BaseModel]) -> BaseModel:
    """The checked body of a request, of EmbedRequest or SearchRequest.

    Raises:
        HTTPException: 413 too large; 408 too slow; 400 no JSON, a wrong or unknown parameter, or more than is accepted.
    """
    try:
        fields = json.loads(await asyncio.wait_for(read_body(request), BODY_SECONDS))
        json.dumps(fields, ensure_ascii=False).encode()  # fails for half a surrogate pair, which is no text
    except asyncio.TimeoutError:
        raise api_error(408, f"the body did not arrive within {BODY_SECONDS} seconds", code="body_timeout") from None
    except (ValueError, RecursionError) as error:
        raise api_error(400, f"the body is no JSON: {error}", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise api_error(400, "the body is no JSON object", code="invalid_json")
    try:
        asked = kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = ".".join(str(part) for part in first["loc"])
        raise api_error(400, f"{param}: {first['msg']}".removeprefix(": "), param, "invalid_value") from None
    for name, values in asked.model_dump(exclude_none=True, exclude={"top_k"}).items():
        check_limits(request.app.state, name, values)
    return asked


def check_limits(state, name: str, values: str | list[str]) -> None:
    """Raises 400 for too many texts or images, an empty text or a long one."""
    texts = {name: values} if isinstance(values, str) else {f"{name}.{i}": text for i, text in enumerate(values)}
    if len(texts) > state.max_items:
        message = f"{len(texts)} {name}, at most {state.max_items} are accepted in a request"
        raise api_error(400, message, name, "invalid_value")
    for place, text in texts.items():
        if not text.strip():
            raise api_error(400, f"{place} is empty", place, "invalid_value")
        if name.startswith("text") and len(text) > state.max_characters:
            message = f"{place} has {len(text)} characters, at most {state.max_characters} are accepted"
            raise api_error(400, message, place, "invalid_value")


def decode_image(state, url: str, place: str) -> Image.Image:
    """The picture of a data URL.

    Raises:
        HTTPException: 400 no such URL (none is fetched), no picture, or one of too many pixels.
    """
    match = re.match(r"data:image/[\w.+-]+;base64,", url)
    if not match:
        message = f"{place} is no data URL: data:image/png;base64,... (addresses are not fetched)"
        raise api_error(400, message, place, "invalid_value")
    try:
        data = base64.b64decode(url[match.end() :], validate=True)
        width, height = Image.open(io.BytesIO(data), formats=FORMATS).size
        if width * height > state.max_pixels:
            raise ImageError(f"{width} x {height} pixels, at most {state.max_pixels} are accepted")
        return load_image(data)
    except ImageError as error:
        reason = str(error)
    except binascii.Error as error:
        reason = f"broken Base64: {error}"
    except Image.DecompressionBombError:
        reason = f"at most {state.max_pixels} pixels are accepted"
    except Exception:  # of Pillow's readers nearly everything
        reason = f"no picture of {', '.join(FORMATS)}, or broken from its first bytes on"
    raise api_error(400, f"{place}: {reason}", place, "invalid_image")


def embed_parts(state, asked: EmbedRequest, stop: threading.Event) -> list[list[float]]:
    """Runs in the worker: the unit vectors of the request's texts or images; ends early when `stop` is set."""
    values, vectors = asked.texts or asked.images, []
    for start in range(0, len(values), PART):
        part = values[start : start + PART]
        if stop.is_set():
            break
        if asked.texts:
            vectors.append(embed_captions(state.model, state.tokenizer, part))
        else:
            places = [f"images.{start + number}" for number in range(len(part))]
            urls = zip(part, places, strict=True)
            values = [state.pixels.from_image(decode_image(state, url, place)) for url, place in urls]
            vectors.append(embed_pixels(state.model, state.pixels, np.stack(values)))
    return torch.cat(vectors).tolist() if vectors else []


def search_index(state, asked: SearchRequest, stop: threading.Event) -> dict:
    """Runs in the worker: the images that are nearest to a text; to an image also the nearest captions."""
    index, found = state.index, {}
    if asked.text:
        vector = index.embed_texts([asked.text])
    else:
        vector = index.embed_image(decode_image(state, asked.image, "image"))
        captions = index.find_captions(vector, asked.top_k)
        found["captions"] = [{"score": score, "text": text} for score, text in captions]
    found["images"] = [
        {"score": hit.score, "path": os.path.relpath(hit.reference.path, state.root), "captions": hit.captions}
        | ({"offset": hit.reference.offset, "size": hit.reference.size} if hit.reference.size >= 0 else {})
        for hit in index.find_images(vector, asked.top_k)
    ]
    return found


async def end_with_client(request: Request, answer: asyncio.Future, stop: threading.Event) -> None:
    """Gives the place in the queue, or the worker, back as soon as the client has gone or the server ends."""
    while not request.app.state.stopping and not await request.is_disconnected():
        await asyncio.sleep(0.1)
    stop.set()
    answer.cancel()


async def run_job(request: Request, work, asked: BaseModel):
    """What `work(state, asked, stop)` returns, from the worker thread, in its turn.

    Raises:
        HTTPException: 429 too many requests wait already; 500 it failed; 503 the server ends; what `work` raises.
        ClientDisconnect: nobody is there any more.
    """
    state, stop = request.app.state, threading.Event()
    state.jobs = [job for job in state.jobs if not job.done()]
    if len(state.jobs) > state.max_queue:
        raise api_error(429, f"{state.max_queue} requests are waiting already; try again later", code="queue_full")
    job = state.worker.submit(work, state, asked, stop)
    state.jobs.append(job)
    answer = asyncio.wrap_future(job)
    watch = asyncio.create_task(end_with_client(request, answer, stop))
    try:
        return await answer
    except asyncio.CancelledError:
        if state.stopping:
            raise api_error(503, "the server shuts down", code="shutting_down") from None
        raise ClientDisconnect from None
    except HTTPException:
        raise
    except Exception:
        log.exception("a request failed")
        raise api_error(500, "the server failed; its log says why") from None
    finally:
        watch.cancel()
        stop.set()


@router.post("/embed", dependencies=[Depends(check_key)])
async def embed(request: Request) -> dict:
    asked = await read_request(request, EmbedRequest)
    return {"model": request.app.state.model_name, "embeddings": await run_job(request, embed_parts, asked)}


@router.post("/search", dependencies=[Depends(check_key)])
async def search(request: Request) -> dict:
    if request.app.state.index is None:
        raise api_error(404, "this server has no index to search in; it is started with --index", code="no_index")
    asked = await read_request(request, SearchRequest)
    return {"model": request.app.state.model_name, **await run_job(request, search_index, asked)}


@router.get("/health")
async def health() -> dict:
    return {"status": "ok"}


def create_app(
    model,
    tokenizer,
    image_processor,
    model_name: str,
    index: SearchIndex | None = None,
    api_key: str | None = None,
    max_items: int = 64,
    max_characters: int = 20_000,
    max_pixels: int = 20_000_000,
    max_queue: int = 16,
    max_body_bytes: int = 32 << 20,
    host: str = "127.0.0.1",
) -> FastAPI:
    """The API of one model.

    Args:
        model, tokenizer, image_processor: from `infer.load_trained_model`.
        index: what POST /search looks in.
        api_key: where given, /embed and /search want `Authorization: Bearer <api_key>`.
        max_items: texts or images in one request; max_characters: in a text; max_pixels: of an image.
        max_queue: requests that may wait while one is served; those beyond get 429.
        host: without a key, the name beside localhost's under which the server may be asked.
    """
    app = FastAPI(title=model_name, docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(check_site)])
    app.include_router(router)
    for error in (HTTPException, 404, 405, ClientDisconnect, Exception):
        app.add_exception_handler(error, send_error)
    state = app.state
    state.model, state.tokenizer, state.pixels = model, tokenizer, Pixels(image_processor)
    state.model_name, state.index, state.api_key = model_name, index, api_key
    state.root = index.root() if index else ""
    state.max_items, state.max_characters, state.max_pixels = max_items, max_characters, max_pixels
    state.max_queue, state.max_body_bytes = max_queue, max_body_bytes
    state.worker, state.jobs, state.stopping = ThreadPoolExecutor(max_workers=1), [], False
    state.hosts = {"localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host.lower()}
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
    parser.add_argument("model", help="folder of a trained model, or a hub id")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; a public one needs API_KEY")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--model_name", help="name in the API; by default the last part of the folder's name")
    parser.add_argument("--index", help="the index to search in, a milvus-lite file of search.py")
    parser.add_argument("--data_path", help="a table, a tar or a folder of images that the index is to hold")
    parser.add_argument("--max_items", type=int, default=64, help="texts or images in one request")
    parser.add_argument("--max_queue", type=int, default=16, help="requests that may wait; those beyond get 429")
    args = parser.parse_args(argv)
    hide_progress_bars()

    api_key = os.environ.get("API_KEY")
    try:
        check_host(args.host, api_key)
        if args.data_path and not args.index:
            raise UserError("--data_path is for the index: name its file by --index.")
        gallery = read_gallery(args.data_path) if args.data_path else None
        loaded = load_trained_model(args.model)
        name = args.model_name or Path(args.model).resolve().name
        index = SearchIndex(args.index, *loaded, name) if args.index else None
        if gallery:
            show_update(index, gallery)
    except UserError as error:
        sys.exit(f"error: {error}")
    app = create_app(*loaded, name, index, api_key, max_items=args.max_items, max_queue=args.max_queue, host=args.host)
    # uvicorn raises the signal again when all clients are told; what is written to the index is safe.
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, lambda *_: os._exit(0))
    create_server(app, args.host, args.port).run()


if __name__ == "__main__":
    main()
