"""Lists what a hub or a mirror offers, one file a line: SHA-256 (or -), address, path.

python list_files.py datasets my_name/my_data           of a hub: HF_ENDPOINT, https://huggingface.co by default
python list_files.py https://my.mirror/my_data          of any server: by the file SHA256SUMS that lies there
"""

import os
import sys
from urllib.parse import quote

import httpx

from files import UserError


def list_hub(kind: str, name: str) -> list[tuple[str, str, str]]:
    """The files of a repository ("models", "datasets") of a hub; the hub knows the SHA-256 of its large files."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    revision, token = os.environ.get("REVISION", "main"), os.environ.get("HF_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    address, found = f"{endpoint}/api/{kind}/{name}/tree/{revision}?recursive=true", []
    folder = name if kind == "models" else f"{kind}/{name}"
    while address:  # a page at a time
        response = httpx.get(address, headers=headers, timeout=60, follow_redirects=True)
        response.raise_for_status()
        for entry in response.json():
            if entry["type"] == "file":
                path, checksum = entry["path"], entry.get("lfs", {}).get("oid", "-")
                found.append((checksum, f"{endpoint}/{folder}/resolve/{revision}/{quote(path)}", path))
        address = response.links.get("next", {}).get("url")
    return found


def list_mirror(base: str) -> list[tuple[str, str, str]]:
    """The files of any server, by the lines that `sha256sum` writes."""
    response = httpx.get(f"{base.rstrip('/')}/SHA256SUMS", timeout=60, follow_redirects=True)
    response.raise_for_status()
    lines = [line.split(maxsplit=1) for line in response.text.splitlines() if line.strip()]
    paths = [(checksum, path.strip().lstrip("*").removeprefix("./")) for checksum, path in lines]
    return [(checksum, f"{base.rstrip('/')}/{quote(path)}", path) for checksum, path in paths]


def check_path(path: str) -> None:
    """Raises UserError where a server names a file outside of the folder that it is asked for."""
    if path.startswith("/") or ".." in path.split("/") or any(ord(character) < 32 for character in path):
        raise UserError(f"the server names a file outside of the folder: {path!r}")


def main() -> None:
    try:
        found = list_mirror(sys.argv[1]) if len(sys.argv) == 2 else list_hub(*sys.argv[1:])
        for _, _, path in found:
            check_path(path)
    except httpx.TransportError as error:
        sys.exit(
            f"error: {error.request.url.host} can't be reached ({error}). Check the network and the proxy, or name a "
            "mirror by HF_ENDPOINT, such as https://hf-mirror.com"
        )
    except (httpx.HTTPError, UserError, ValueError) as error:
        sys.exit(f"error: {error}")
    for line in found:
        print(*line, sep="\t")


if __name__ == "__main__":
    main()
