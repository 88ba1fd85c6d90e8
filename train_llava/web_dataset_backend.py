"""Serves a data set that is ready to be trained on: encoded rows, and pictures resized as the model's processor does.

    python web_dataset_backend.py MODEL DATA                                        http://127.0.0.1:8001, this machine
    API_KEY=secret python web_dataset_backend.py MODEL DATA --host 0.0.0.0          the whole network, with a key
    API_KEY=secret DATA=http://name:8001 MODEL=MODEL bash train_zero2.sh            trains on it (web_dataset.py)

    GET /index      GET /rows/HASH?start=N (Arrow, compressed)      POST /pixels/HASH (numbers -> bytes, compressed)

HASH is of the rows, the pictures and what they are encoded with: the same files and flags give the same one after a
restart, so a run goes on with a server that was killed, and never meets other data.
"""

import argparse
import asyncio
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import pyarrow
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request
from fastapi.responses import Response

from api import BODY_SECONDS, api_error, read_body
from app import check_host, check_key, check_site, send_error
from data import describe_tokens, load_encoded
from images import ImageError, Reference
from model import ASPECT_RATIOS, load_processor, set_aspect_ratio
from pixels import Pixels
from rows import UserError
from server import create_server
from web_dataset import PICTURES_AT_ONCE, WEB, describe_pixels

MAX_BODY_BYTES = 1 << 16
ROWS_AT_ONCE = 1000
router = APIRouter(dependencies=[Depends(check_key)])


def number_pictures(rows) -> tuple[dict[int, int], list[tuple[int, Reference]]]:
    """The number of each picture by its id, in the order of the rows, and the id and place of each."""
    numbers, pictures = {}, []
    for images, image_ids in zip(rows["images"][:], rows["image_ids"][:], strict=True):
        for image, image_id in zip(images, image_ids, strict=True):
            if image_id not in numbers:
                numbers[image_id] = len(pictures)
                pictures.append((image_id, Reference(**image)))
    return numbers, pictures


def check_data(request: Request, data: str) -> None:
    """Raises 409 where a client began with other data than is served now."""
    if data != request.app.state.index["data"]:
        raise api_error(409, "other data, or with other settings, is served here now than when the run began")


@router.get("/index")
async def index(request: Request) -> dict:
    return request.app.state.index


@router.get("/rows/{data}", dependencies=[Depends(check_data)])
def rows(request: Request, start: int = Query(ge=0)) -> Response:
    """At most `ROWS_AT_ONCE` rows from `start` on; their pictures by number, not by the paths on this machine."""
    state = request.app.state
    table = state.rows.with_format("arrow")[start : start + ROWS_AT_ONCE]
    empty = Reference("", coding=WEB)._asdict()
    places = [[empty | {"offset": state.numbers[one]} for one in ids] for ids in table["image_ids"].to_pylist()]
    column = table.schema.get_field_index("images")
    table = table.set_column(column, "images", pyarrow.array(places, table.schema.field("images").type))
    sink = pyarrow.BufferOutputStream()
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    with pyarrow.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return Response(sink.getvalue().to_pybytes(), media_type="application/vnd.apache.arrow.stream")


async def read_numbers(request: Request) -> list[int]:
    """The numbers of the pictures that are asked for; raises 400, 408 or 413."""
    try:
        numbers = json.loads(await asyncio.wait_for(read_body(request), BODY_SECONDS))
    except asyncio.TimeoutError:
        raise api_error(408, f"the body did not arrive within {BODY_SECONDS} seconds") from None
    except (ValueError, RecursionError):
        raise api_error(400, "the body is no JSON") from None
    count = len(request.app.state.pictures)
    if not isinstance(numbers, list) or not 1 <= len(numbers) <= PICTURES_AT_ONCE:
        raise api_error(400, f"a list of 1 to {PICTURES_AT_ONCE} numbers of pictures is wanted")
    if not all(type(number) is int and 0 <= number < count for number in numbers):
        raise api_error(400, f"the pictures' numbers are 0 to {count - 1}")
    return numbers


def pack_pictures(state, numbers: list[int]) -> bytes:
    """The bytes of these pictures, each (3, height, width), compressed; raises ImageError."""
    pixels = state.pixels.read([state.pictures[number] for number in numbers])
    return pyarrow.compress(pixels.tobytes(), "zstd", asbytes=True)


@router.post("/pixels/{data}", dependencies=[Depends(check_data)])
async def pixels(request: Request) -> Response:
    numbers, state = await read_numbers(request), request.app.state
    if state.waiting >= state.max_queue:
        raise api_error(503, f"{state.max_queue} requests are waiting already; try again later")
    state.waiting += 1
    try:
        packed = await asyncio.get_running_loop().run_in_executor(state.worker, pack_pictures, state, numbers)
    except ImageError as error:
        raise api_error(410, str(error)) from None
    finally:
        state.waiting -= 1
    return Response(packed, media_type="application/octet-stream")


def create_app(
    data_path: str,
    processor,
    model_max_length: int,
    api_key: str | None = None,
    max_queue: int = 64,
    host: str = "127.0.0.1",
) -> FastAPI:
    """The server of the rows of `data.load_encoded`, bad ones with their reasons among them: the run takes them out.

    Raises:
        UserError: the data can't be read.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(check_site)])
    app.include_router(router)
    for error in (HTTPException, 404, 405, Exception):
        app.add_exception_handler(error, send_error)
    state = app.state
    state.rows, content_hash = load_encoded(data_path, processor, model_max_length)
    state.numbers, state.pictures = number_pictures(state.rows)
    state.pixels = Pixels(processor.image_processor)
    made_of = describe_tokens(processor, model_max_length)
    made_of |= {"image processor": describe_pixels(processor.image_processor)}
    data = sha256(f"{content_hash} {made_of['image processor']}".encode()).hexdigest()[:16]
    state.index = {"data": data, "content_hash": content_hash, "made_of": made_of, "rows": len(state.rows)}
    state.worker, state.waiting, state.max_queue = ThreadPoolExecutor(os.cpu_count()), 0, max_queue
    state.api_key, state.cors_origin, state.stopping, state.max_body_bytes = api_key, None, False, MAX_BODY_BYTES
    state.hosts = {"localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host.lower()}
    return app


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub id of the model that is to be trained")
    parser.add_argument("data_path", help="a table, a tar, or a folder of them")
    parser.add_argument("--model_max_length", type=int, default=2048, help="as the training run has it")
    parser.add_argument("--image_aspect_ratio", choices=ASPECT_RATIOS, help="as the training run has it")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; a public one needs API_KEY")
    parser.add_argument("--port", type=int, default=8001)
    args = parser.parse_args(argv)

    api_key = os.environ.get("API_KEY")
    try:
        check_host(args.host, api_key)
        processor = load_processor(args.model)
        if args.image_aspect_ratio:
            processor.image_processor = set_aspect_ratio(processor.image_processor, args.image_aspect_ratio)
        app = create_app(args.data_path, processor, args.model_max_length, api_key, host=args.host)
    except UserError as error:
        sys.exit(f"error: {error}")
    bad = sum(map(bool, app.state.rows["error"][:]))
    print(f"{len(app.state.rows):,} examples, {bad} of them bad, {len(app.state.pictures):,} pictures", flush=True)
    create_server(app, args.host, args.port, log_level="warning").run()


if __name__ == "__main__":
    main()
