"""Rows and pictures of a server (web_dataset_backend.py), as if they were files here: --data_path http://host:port

The rows' ids are copied once; pictures are asked for by number, batch by batch, as bytes that are resized already.
Which rows a batch has is decided here, so that each comes once an epoch, whatever happens to the server. One that is
gone is waited for; one that comes back with other data is refused, since every address holds the data's hash.
"""

import http.client
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, getproxies, proxy_bypass, urlopen

import numpy as np
import pyarrow
from datasets import Dataset, Features
from datasets.arrow_writer import ArrowWriter

from files import UserError

WEB = "web"  # the coding of a reference whose path is an address, and whose offset the number of a picture there
PICTURES_AT_ONCE = 16
REQUESTS_AT_ONCE = 4
FIND_SECONDS, WAIT_SECONDS = 10, 600  # for a server that never answered, and for one that did
TIMEOUT = 60  # seconds between two pieces of an answer
TRY_AGAIN = (429, 502, 503, 504)


def is_address(data_path: str) -> bool:
    return data_path.startswith(("http://", "https://"))


def describe_pixels(image_processor) -> str:
    """A hash of all that decides a picture's numbers, beside the picture."""
    settings = f"{type(image_processor).__name__} {image_processor.backend} {image_processor.to_json_string()}"
    return sha256(settings.encode()).hexdigest()


def ask(address: str, body: bytes | None = None, patience: float | None = None) -> bytes:
    """The server's answer, whole; asks again, at longer and longer intervals, while nobody is there.

    Raises:
        UserError: the server refuses, or hasn't answered for `patience` seconds (`WAIT_SECONDS`).
    """
    key, patience = os.environ.get("API_KEY"), WAIT_SECONDS if patience is None else patience
    request = Request(address, body)
    if key:
        request.add_unredirected_header("Authorization", f"Bearer {key}")  # no other server is told it
    end, pause, told = time.monotonic() + patience, 0.1, False
    while True:
        try:
            with urlopen(request, timeout=TIMEOUT) as reply:
                return reply.read()
        except HTTPError as error:
            reason = f"{error.code} {error.reason}"
            if error.code not in TRY_AGAIN:
                text = error.read().decode(errors="replace")
                if text.startswith('{"error"'):
                    text = json.loads(text)["error"]["message"]
                hint = " (export API_KEY=..., the same on both machines)" if error.code == 401 else ""
                raise UserError(f"{address}: {error.code}: {text[:500]}{hint}") from None
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
        if time.monotonic() + pause > end:
            host, proxy = urlsplit(address).hostname, getproxies().get(urlsplit(address).scheme)
            way = f" It was asked through the proxy {proxy}: export no_proxy={host}, unless it is behind it."
            raise UserError(
                f"{address}: no answer for {patience:g} seconds ({reason}). Start web_dataset_backend.py there, then "
                f"this command again.{way * bool(proxy and not proxy_bypass(host))}"
            )
        if pause > 1 and not told:
            print(f"{address}: {reason}; waiting for it", file=sys.stderr, flush=True)
            told = True
        time.sleep(pause)
        pause = min(2 * pause, 5)


def download_rows(address: str, made_of: dict[str, str], image_processor, features: Features, cached) -> tuple:
    """The rows of a server as `data.load_encoded` gives them, whose pictures are referred to by the server's address.

    Args:
        made_of: what decides the ids here, by name, which must be the same there.
        cached: `data.cached`.

    Raises:
        UserError: nobody is there, the key is wrong, or the server encodes otherwise.
    """
    address = address.rstrip("/")
    try:
        index = json.loads(ask(f"{address}/index", patience=FIND_SECONDS))
    except json.JSONDecodeError:
        raise UserError(f"{address}: what answers there is no web_dataset_backend.py. Is it the right port?") from None
    made_of = made_of | {"image processor": describe_pixels(image_processor)}
    differs = [name for name, value in made_of.items() if index["made_of"].get(name) != value]
    if differs:
        raise UserError(
            f"{address}: the server was started with another {', '.join(differs)}. Start it with this run's model and "
            "--model_max_length."
        )
    pixels = f"{address}/pixels/{index['data']}"

    def build(scratch: str) -> Dataset:
        path, start = f"{scratch}/rows.arrow", 0
        with ArrowWriter(path=path, features=features) as writer:
            while start < index["rows"]:
                stream = ask(f"{address}/rows/{index['data']}?start={start}")
                table = pyarrow.ipc.open_stream(stream).read_all()
                column = table.schema.get_field_index("images")
                places = [[one | {"path": pixels} for one in images] for images in table["images"].to_pylist()]
                images = pyarrow.array(places, features.arrow_schema.field("images").type)
                writer.write_table(table.set_column(column, features.arrow_schema.field("images"), images))
                start += len(table)
            writer.finalize()
        return Dataset.from_file(path)

    return cached(f"web-{sha256(pixels.encode()).hexdigest()[:16]}", build), index["content_hash"]


def fetch_pixels(address: str, numbers: list[int], shape: tuple[int, int, int]) -> np.ndarray:
    """The pictures of these numbers as uint8 of (numbers, *shape); raises UserError as `ask` does."""
    parts = [numbers[start : start + PICTURES_AT_ONCE] for start in range(0, len(numbers), PICTURES_AT_ONCE)]
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        answers = list(pool.map(partial(ask, address), [json.dumps(part).encode() for part in parts]))
    size = int(np.prod(shape))
    return np.concatenate(
        [
            np.frombuffer(pyarrow.decompress(answer, len(part) * size, "zstd"), np.uint8).reshape(-1, *shape)
            for part, answer in zip(parts, answers, strict=True)
        ]
    )
