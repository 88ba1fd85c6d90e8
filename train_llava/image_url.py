"""The pictures of a request: a data URL holds the bytes, an http(s) address is fetched where its host was allowed;
`encode_request` makes the prompt with them.

An address that a client names must not make this server ask what only it can reach (server-side request forgery). So
its host has to be on a list; all that the name leads to has to be public; the connection goes to the very address that
was looked at, since the name may lead elsewhere when it is asked again (rebinding); and a redirect is an address like
any other. Source: https://cheatsheetseries.owasp.org/cheatsheets/Server_Side_Request_Forgery_Prevention_Cheat_Sheet.html
"""

import asyncio
import contextlib
import http.client
import io
import ipaddress
import re
import socket
import ssl
import string
import threading
import time
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from fastapi import Request
from jinja2 import TemplateError
from PIL import Image
from transformers import BatchFeature

from api import ChatRequest, ImageUrl, api_error, list_pictures
from files import UserError
from images import FORMATS, ImageError, load_image
from picture_files import read_data_url
from prompt import encode_prompts, prepare_pictures
from rows import IMAGE_MARK
from template import OPENED, render

FETCH_SECONDS = 10  # for all pictures of a request together
MAX_REDIRECTS = 3
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
PORTS = {"http": 80, "https": 443}


def check_image_host(entry: str) -> str:
    """An entry of the list, `host` or `host:port`, in lower case; raises UserError where it is another thing."""
    if not re.fullmatch(r"([\w.-]+|\[[0-9a-f:.]+\])(:\d+)?", entry.lower(), re.ASCII):
        raise UserError(
            f"--image_host {entry}: give a host, such as images.example.com, or host:port for another port."
        )
    return entry.lower()


def check_address(url: str, hosts: frozenset[str]) -> SplitResult:
    """The parts of an address that may be asked by its name; raises ImageError for any other."""
    try:
        parts = urlsplit(url)
        port = parts.port or PORTS.get(parts.scheme)
    except ValueError as error:
        raise ImageError(f"no address ({error})") from None
    if parts.scheme not in PORTS or not parts.hostname:
        raise ImageError("give data:image/png;base64,... or an http(s) address")
    if parts.username is not None or parts.password is not None:
        raise ImageError("an address with a user's name is not asked")
    name = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    if f"{name}:{port}" not in hosts and (name not in hosts or port != PORTS[parts.scheme]):
        allowed = (
            "send the picture itself, as data:image/png;base64,..." if not hosts else "ask for its host to be allowed"
        )
        raise ImageError(f"pictures are not fetched from {name}:{port}; {allowed}")
    return parts


def is_public(address: str) -> bool:
    """Whether anybody can reach an IP address: none that is private, loopback, link-local, or holds one of IPv4."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 4:
        return ip.is_global and not ip.is_multicast
    return ip in GLOBAL_UNICAST and ip.is_global and ip.sixtofour is None and ip.teredo is None


def connect(parts: SplitResult, end: float) -> socket.socket:
    """A connection to a public address of the host, which no later look-up can change.

    Raises:
        ImageError: the host has an address that isn't public.
        OSError: there is no such host, or it doesn't answer.
    """
    port = parts.port or PORTS[parts.scheme]
    found = [entry[4][0] for entry in socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)]
    if not all(map(is_public, found)):
        raise ImageError(f"{parts.hostname} leads to an address that is not public")
    for number, address in enumerate(found, start=1):
        try:
            return socket.create_connection((address, port), timeout=max(end - time.monotonic(), 0.01))
        except OSError:
            if number == len(found):
                raise


def break_off(connected: socket.socket) -> None:
    """Ends what another thread waits for on a connection."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connected, socket.SHUT_RDWR)


def read_answer(parts: SplitResult, connected: socket.socket, max_bytes: int) -> tuple[bytes, str]:
    """The bytes at an address and "", or b"" and where it is redirected to; raises ImageError for any other answer."""
    asked = http.client.HTTPConnection(parts.hostname, parts.port or PORTS[parts.scheme])
    asked.sock = connected
    asked.default_port = PORTS[parts.scheme]  # which the header Host leaves out
    # Chinese letters and blanks, as a browser sends them; punctuation, % among it, is as it was given.
    path = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe=string.punctuation)
    asked.request(
        "GET", path, headers={"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "train_llava"}
    )
    answer = asked.getresponse()
    if answer.status in (301, 302, 303, 307, 308) and answer.headers["Location"]:
        return b"", answer.headers["Location"]
    if answer.status != 200:
        raise ImageError(f"{parts.hostname} answered {answer.status}")
    data = b"" if (answer.length or 0) > max_bytes else answer.read(max_bytes + 1)
    if len(data) > max_bytes or (answer.length or 0) > max_bytes:
        raise ImageError(f"more than {max_bytes:,} bytes")
    return data, ""


def fetch(url: str, hosts: frozenset[str], max_bytes: int, end: float) -> bytes:
    """The bytes at an address, until `end` of the monotonic clock.

    Raises:
        ImageError: it may not be asked, or doesn't answer with at most `max_bytes` in time.
    """
    for _ in range(1 + MAX_REDIRECTS):
        parts = check_address(url, hosts)
        try:
            with contextlib.ExitStack() as stack:
                connected = stack.enter_context(connect(parts, end))
                if parts.scheme == "https":
                    context = ssl.create_default_context()
                    connected = context.wrap_socket(
                        connected, server_hostname=parts.hostname, do_handshake_on_connect=False
                    )
                    stack.enter_context(connected)
                # A socket's own time-out is for each piece, and a host can send a byte at a time.
                ending = threading.Timer(end - time.monotonic(), break_off, (connected,))
                ending.start()
                stack.callback(ending.cancel)
                if parts.scheme == "https":
                    connected.do_handshake()
                data, url = read_answer(parts, connected, max_bytes)
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            reason = "took too long" if time.monotonic() >= end else str(error) or type(error).__name__
            raise ImageError(f"can't be fetched from {parts.hostname}: {reason}") from None
        if time.monotonic() >= end:
            raise ImageError(f"can't be fetched from {parts.hostname}: took too long")
        if not url:
            return data
        url = urljoin(parts.geturl(), url)
    raise ImageError(f"more than {MAX_REDIRECTS} redirects")


def fetch_all(state, addresses: list[tuple[str, ImageUrl]]) -> None:
    """Runs in a thread of its own: puts the bytes of each address into its `ImageUrl`; raises HTTPException 400."""
    end, left = time.monotonic() + FETCH_SECONDS, state.max_body_bytes
    for place, image in addresses:
        try:
            image._data = fetch(image.url, state.image_hosts, left, end)
        except ImageError as error:
            raise api_error(400, f"{place}: {error}", place, "invalid_image_url") from None
        left -= len(image._data)


async def fetch_pictures(request: Request, chat: ChatRequest) -> None:
    """Fetches the pictures of a request that are at addresses, before it is queued: no slow host stops the model.

    Raises:
        HTTPException: 400 too many pictures, or one that can't be fetched; 429 too many requests wait already.
    """
    state, pictures = request.app.state, list_pictures(chat)
    if len(pictures) > state.max_images:
        message = f"{len(pictures)} pictures, at most {state.max_images} are accepted in a request"
        raise api_error(400, message, "messages", "too_many_images")
    addresses = [(place, image) for place, image in pictures if not image.url.startswith("data:")]
    if not addresses:
        return
    state.fetches = [job for job in state.fetches if not job.done()]
    if len(state.fetches) > state.max_queue:
        raise api_error(429, f"{state.max_queue} requests are waiting already; try again later", code="queue_full")
    job = state.fetcher.submit(fetch_all, state, addresses)
    state.fetches.append(job)
    try:  # the look-up of a name has no time-out of its own
        await asyncio.wait_for(asyncio.wrap_future(job), 2 * FETCH_SECONDS)
    except asyncio.TimeoutError:
        raise api_error(400, "the pictures can't be fetched: took too long", "messages", "invalid_image_url") from None


def load_pictures(state, chat: ChatRequest) -> list[Image.Image]:
    """The pictures of a request as in training; raises HTTPException 400 for none, a broken one, or too many pixels."""
    pictures, left = [], state.max_pixels
    for place, image in list_pictures(chat):
        try:
            data = read_data_url(image.url) if image._data is None else image._data
            with contextlib.suppress(Exception):  # load_image says what is wrong with a broken one
                width, height = Image.open(io.BytesIO(data), formats=FORMATS).size
                left -= width * height
            if left < 0:
                raise ImageError(f"more than {state.max_pixels:,} pixels in all pictures together")
            pictures.append(load_image(data))
        except UserError as error:
            raise api_error(400, f"{place}: {error}", place, "invalid_image") from None
    return pictures


def encode_request(state, chat: ChatRequest) -> tuple[BatchFeature, bool]:
    """The prompt of a request, of `encode_prompts`, and whether it ends within a thought.

    Raises:
        HTTPException: 400 messages too long, refused by the chat template, or with a picture that is none.
    """
    messages = [message.to_template() for message in chat.messages]
    tools, variables = [tool.model_dump() for tool in chat.tools] or None, chat.chat_template_kwargs
    of_pictures = len(list_pictures(chat)) * prepare_pictures(state.processor)[1]
    try:
        text = render(messages, state.tokenizer, tools, prompt=True, **variables)
        if tools and text == render(messages, state.tokenizer, None, prompt=True, **variables):
            raise api_error(400, "this model's chat template knows no tools", "tools", "unsupported_parameter")
        if len(text) > state.max_characters or of_pictures > state.max_input_tokens:  # told without any further work
            message = (
                f"the messages have {len(text)} characters, and {of_pictures} tokens of pictures; at most "
                f"{state.max_input_tokens} tokens are accepted"
            )
            raise api_error(400, message, "messages", "context_length_exceeded")
        pictures = iter(load_pictures(state, chat))
        for message in messages:
            message["images"] = [next(pictures) for _ in range(message["content"].count(IMAGE_MARK))]
        inputs = encode_prompts(state.processor, [messages], tools, **variables)
    except (TemplateError, TypeError, ValueError, RecursionError) as error:  # a template is a program, run on these
        raise api_error(400, f"the model's chat template refuses these messages: {error}", "messages") from None
    return inputs, text.rstrip().endswith(OPENED)
