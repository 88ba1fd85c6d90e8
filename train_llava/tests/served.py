"""The application of app.py, served on a free port, and what its tests ask of it."""

import base64
import contextlib
import io
import threading
import time

from PIL import Image

from server import create_server

KEY = "sk-test-123"
QUESTION = [{"role": "user", "content": "天地玄黄"}]
CONTEXT = 16384


@contextlib.contextmanager
def serve(application):
    """Runs the application on a free port; yields its address."""
    server = create_server(application, log_level="error")
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
    assert not thread.is_alive()


def ask(client, messages=QUESTION, **settings):
    settings = {"model": "tiny", "max_tokens": 12, "temperature": 0, **settings}
    return client.chat.completions.create(messages=messages, **settings)


def draw(colour: str = "red", size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A picture whose left half is white."""
    picture = Image.new("RGB", size, colour)
    picture.paste("white", (0, 0, size[0] // 2, size[1]))
    return picture


def encode(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def show(*parts) -> list[dict]:
    """A user's message as OpenAI's clients send it: texts, and pictures (URL, bytes or PIL) as image_url parts."""
    content = []
    for part in parts:
        if isinstance(part, str) and not part.startswith(("http", "data:", "ftp", "file")):
            content.append({"type": "text", "text": part})
            continue
        part = encode(part) if isinstance(part, Image.Image) else part
        url = data_url(part) if isinstance(part, bytes) else part
        content.append({"type": "image_url", "image_url": {"url": url}})
    return [{"role": "user", "content": content}]
