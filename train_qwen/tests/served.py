"""The application of app.py, served on a free port, and what its tests ask of it."""

import contextlib
import socket
import threading
import time

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
    settings = {"model": "tiny", "max_tokens": 20, "temperature": 0, **settings}
    return client.chat.completions.create(messages=messages, **settings)


def wait_until(condition, seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def running(server) -> int:
    """Requests that hold a place: the one being answered and those that wait."""
    return sum(not job.done() for job in server.state.jobs)


def connect(address: str, text: bytes = b"") -> socket.socket:
    connection = socket.create_connection(address.removeprefix("http://").split(":"), timeout=5)
    connection.sendall(text)
    return connection
