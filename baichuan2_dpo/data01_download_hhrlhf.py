"""Anthropic/hh-rlhf, pairs of replies of which people preferred one -> data/hhrlhf/train and data/hhrlhf/test.

    python data01_download_hhrlhf.py
    HF_ENDPOINT=https://hf-mirror.com python data01_download_hhrlhf.py --subset helpful-online      in China

The texts are English, MIT-licensed and for preference training alone: some are harmful on purpose. What was interrupted
goes on by the same command. (Not hf_hub_download: as of huggingface_hub 2.4 it deletes what it has of a file when it
fails, and looks at the size of what came over HTTP, not at its hash.)
"""

import argparse
import hashlib
import os
import sys
import time
import zlib
from http.client import HTTPException
from itertools import product
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener, urlopen

from files import UserError
from pairs import read_pairs

SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
TRIES, SECONDS_BETWEEN, TIMEOUT = 6, 3, 30
AGENT = {"User-Agent": "zero-to-nlp"}  # mirrors may turn away Python's own


class StopAtStorage(HTTPRedirectHandler):
    """Doesn't follow the hub to its storage, whose headers lack the SHA-256 that the hub's have."""

    def http_error_302(self, request, response, code, message, headers):
        if "X-Linked-Etag" in headers:
            return response
        return super().http_error_302(request, response, code, message, headers)


def ask(url: str) -> tuple[int, str]:
    """A file's size in bytes and its SHA-256, 0 and "" where the server doesn't say; raises OSError."""
    with build_opener(StopAtStorage).open(Request(url, headers=AGENT, method="HEAD"), timeout=TIMEOUT) as response:
        headers = response.headers
    etag = (headers.get("X-Linked-Etag") or headers.get("ETag") or "").strip('"')
    return int(headers.get("X-Linked-Size") or headers.get("Content-Length") or 0), etag if len(etag) == 64 else ""


def fetch(url: str, partial: Path, size: int) -> None:
    """Adds to a partial file what it lacks; raises OSError or HTTPException where the connection ends before."""
    with open(partial, "ab") as file:
        if size and file.tell() >= size:
            return
        request = Request(url, headers=AGENT | {"Range": f"bytes={file.tell()}-"})
        with urlopen(request, timeout=TIMEOUT) as response:
            if response.status != 206:  # a server that knows no ranges begins anew
                file.seek(0)
                file.truncate()
            while chunk := response.read(1 << 18):
                file.write(chunk)
                print(
                    f"\r{url.rpartition('/main/')[2]}: {file.tell() / 1e6:.1f} of {size / 1e6:.1f} MB",
                    end="",
                    flush=True,
                )
        print()
        if file.tell() < size:
            raise OSError(f"the connection ended at byte {file.tell()} of {size}")


def check(path: Path, size: int, sha256: str) -> str:
    """Says how many pairs are in a file; raises UserError where it isn't the one that the hub has."""
    content = path.read_bytes()
    if size and len(content) != size:
        raise UserError(f"the file has {len(content)} bytes in place of {size}")
    if sha256 and hashlib.sha256(content).hexdigest() != sha256:
        raise UserError("the file's SHA-256 is not the one that the server names")
    try:
        errors = [row["error"] for row in read_pairs([str(path)], ["utf-8"])]
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise UserError(f"the file is no whole .jsonl.gz ({error})") from None
    if all(errors):
        raise UserError(f"the file holds no pair (first row: {errors[0]})")
    return f"{errors.count('')} pairs, {len(errors) - errors.count('')} rows that are none"


def download(url: str, path: Path) -> str:
    """Brings a file to its place and says what is in it; raises UserError, OSError or HTTPException."""
    if path.exists():
        return f"is there, {check(path, 0, '')}"  # it may have been brought by hand
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")  # hidden, so that no training reads it
    for number in range(1, TRIES + 1):
        try:
            size, sha256 = ask(url)
            fetch(url, partial, size)
            break
        except (OSError, HTTPException) as error:
            if number == TRIES or isinstance(error, HTTPError) and error.code in (401, 403, 404):
                raise
            print(f"{url}: {error}; try {number + 1} of {TRIES} in {SECONDS_BETWEEN} s")
            time.sleep(SECONDS_BETWEEN)
    try:
        found = check(partial, size, sha256)
    except UserError:
        partial.unlink()
        raise
    partial.rename(path)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subset", nargs="+", choices=SUBSETS, default=SUBSETS[:2], help="by default the first two")
    parser.add_argument("--output", default="data/hhrlhf", help="folder; by default data/hhrlhf")
    args = parser.parse_args(argv)
    hub = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    for subset, split in product(args.subset, ("train", "test")):
        url = f"{hub}/datasets/Anthropic/hh-rlhf/resolve/main/{subset}/{split}.jsonl.gz"
        path = Path(args.output, split, f"{subset}.jsonl.gz")
        try:
            print(f"{path}: {download(url, path)}")
        except (UserError, OSError, HTTPException) as error:
            advice = f"In China, set HF_ENDPOINT=https://hf-mirror.com; or download it by hand to {path}."
            sys.exit(f"error: {url}: {error}. Try again. {advice}")
    train, test = (Path(args.output, split).resolve() for split in ("train", "test"))
    print(f"train on it: DATA={train} bash train_zero2.sh --eval_data_path {test} --skip_bad_rows true")


if __name__ == "__main__":
    main()
