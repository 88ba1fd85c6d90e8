"""The API over real HTTP, by the openai package: pictures by data URL and by address, and those that are refused.

What it shares with train_qwen (queue, disconnects, keys, streams of events, tools, thoughts) is tested there.
"""

import contextlib
import http.server
import json
import socket
import threading
import time
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from served import KEY, ask, data_url, draw, encode, show

import app
import image_url
from files import UserError
from image_url import check_address, check_image_host, fetch, is_public, read_answer
from images import ImageError, load_image
from infer import reply_batch
from odd_images import draw_good
from prompt import ask_about

RED, BLUE = draw("red"), draw("blue")
PNG = encode(RED)


def expected_reply(chat, *messages: dict) -> str:
    return reply_batch(*chat, [list(messages)], max_new_tokens=12, temperature=0)[0]


def text_of(reply) -> str:
    return reply.choices[0].message.content


def test_a_picture_is_answered_about_plainly_and_streamed(chat, client):
    expected = expected_reply(chat, ask_about([RED], "天地玄黄"))
    reply = ask(client, show(RED, "天地玄黄"))
    assert text_of(reply) == expected != expected_reply(chat, ask_about([BLUE], "天地玄黄"))
    assert reply.choices[0].finish_reason == "length" and reply.usage.completion_tokens == 12
    assert reply.usage.prompt_tokens == ask(client, show("天地玄黄")).usage.prompt_tokens + 17  # and a line's end
    chunks = list(ask(client, show(RED, "天地玄黄"), stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    assert chunks[-1].usage == reply.usage


def test_pictures_stand_where_their_parts_stand(chat, client):
    asked = show(RED, "天", BLUE, "地")
    message = {"role": "user", "content": "<image>\n天<image>\n地", "images": [RED, BLUE]}
    assert text_of(ask(client, asked)) == expected_reply(chat, message)
    behind = {"role": "user", "content": "<image><image>\n天地", "images": [RED, BLUE]}
    assert text_of(ask(client, show("天", "地", RED, BLUE))) == expected_reply(chat, behind)
    alone = {"role": "user", "content": "<image>", "images": [BLUE]}
    assert text_of(ask(client, show(BLUE))) == expected_reply(chat, alone)


def test_several_turns_and_details(chat, client):
    asked = [
        *show("天", RED),
        {"role": "assistant", "content": "地"},
        *show(BLUE, "玄"),
        {"role": "user", "content": "黄"},
    ]
    asked[0]["content"][1]["image_url"]["detail"] = "high"
    system, turn = {"role": "system", "content": "宇"}, {"role": "assistant", "content": "地"}
    messages = [system, ask_about([RED], "天"), turn, ask_about([BLUE], "玄"), ask_about([], "黄")]
    assert text_of(ask(client, [system, *asked])) == expected_reply(chat, *messages)
    turn["content"] = asked[1]["content"] = "<image>"  # a model can spell it by other tokens: what it said is text
    assert text_of(ask(client, [system, *asked])) == expected_reply(chat, *messages)


def test_a_photo_is_turned_and_transparency_is_white(chat, client):
    for name in ("EXIF 6", "palette"):
        data = draw_good()[name]
        assert text_of(ask(client, show(data, "天"))) == expected_reply(chat, ask_about([load_image(data)], "天"))


def test_a_body_of_some_megabytes_is_read_and_a_larger_one_is_not(client):
    padded = data_url(PNG + bytes(2 << 20))  # behind its end
    assert ask(client, show(padded, "天"), max_tokens=1).usage.completion_tokens == 1
    with pytest.raises(openai.APIStatusError) as error:
        ask(client, show(data_url(bytes(4 << 20)), "天"))
    assert (error.value.status_code, error.value.code) == (413, "body_too_large")


PLACE = "messages.0.content.1.image_url"


@pytest.mark.parametrize(
    "messages, param, code, complaint",
    [
        (show("天", PNG[:60]), PLACE, "invalid_image", "PNG, broken or truncated"),
        (show("天", b"<svg/>"), PLACE, "invalid_image", "no picture of JPEG, PNG"),
        (show("天", "data:image/png;base64,?"), PLACE, "invalid_image", "broken Base64"),
        (show("天", "data:image/png,AA"), PLACE, "invalid_image", "data URL without Base64"),
        (show("天", "http://example.com/my.png"), PLACE, "invalid_image_url", "not fetched from example.com:80; send"),
        (show("天", "file:///etc/passwd"), PLACE, "invalid_image_url", "give data:image/png"),
        (show(draw(size=(80, 80)), draw(size=(80, 80))), PLACE, "invalid_image", "more than 10,000 pixels in all"),
        (show("天", *[RED] * 4), "messages", "too_many_images", "4 pictures, at most 3"),
        (show("天" * 180, RED, RED), "messages", "context_length_exceeded", "tokens, at most 200"),
        ([{"role": "user", "content": "天<image>"}], "messages.0", "invalid_value", "send an image_url part"),
        (
            [*show("天"), {"role": "assistant", "content": show(RED)[0]["content"]}],
            "messages.1",
            "invalid_value",
            "users",
        ),
        (
            [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
            "messages.0.content.0",
            "invalid_value",
            "tag",
        ),
    ],
)
def test_bad_pictures_are_refused_in_openai_s_form(client, messages, param, code, complaint):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, messages)
    assert (caught.value.param, caught.value.code, caught.value.type) == (param, code, "invalid_request_error")
    assert complaint in caught.value.body["message"]


def test_an_unknown_detail_or_field_is_refused(client):
    for field in ({"detail": "most"}, {"_data": "x"}, {"data": "x"}):
        messages = show(RED)
        messages[0]["content"][0]["image_url"] |= field
        with pytest.raises(openai.BadRequestError, match="image_url"):
            ask(client, messages)


def test_too_many_tokens_of_pictures_are_told_without_opening_them(client, server, monkeypatch):
    monkeypatch.setitem(server.state._state, "max_input_tokens", 40)
    with pytest.raises(openai.BadRequestError, match="48 tokens of pictures; at most 40"):
        ask(client, show("天", b"x", b"x", b"x"))


class Pictures(http.server.BaseHTTPRequestHandler):
    """A web site: /red.png and what may go wrong with it."""

    def do_GET(self):
        port = self.server.server_port
        self.server.asked.append((self.path, self.headers["Host"], self.headers["Accept-Encoding"]))
        redirects = {"/moved": "/red.png?a=1", "/round": "/round", "/inside": f"http://inside.test:{port}/red.png"}
        redirects |= {"/elsewhere": "http://other.test/red.png", "/scheme": "file:///etc/passwd"}
        redirects |= {"/port": f"http://pictures.test:{port + 1}/", "/number": f"http://2130706433:{port}/red.png"}
        status = 302 if self.path in redirects else 404 if self.path == "/gone" else 200
        self.send_response(status)
        if status == 302:
            self.send_header("Location", redirects[self.path])
        elif self.path != "/endless":
            self.send_header("Content-Length", str(10**9 if self.path == "/large" else len(PNG)))
        self.end_headers()
        with contextlib.suppress(OSError):
            while self.path in ("/endless", "/slow"):  # without a length, or a byte at a time
                self.wfile.write(b"x" * (10_000 if self.path == "/endless" else 1))
                time.sleep(0 if self.path == "/endless" else 0.05)
            self.wfile.write(PNG)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def names(monkeypatch):
    """Where names lead: to what is set here; 127.0.0.1 counts as public, as it is all that a test can reach."""
    known, asked, look_up = {"pictures.test": ["127.0.0.1"], "inside.test": ["10.0.0.1"]}, [], socket.getaddrinfo

    def getaddrinfo(host, port, *args, **settings):
        if host not in known:
            return look_up(host, port, *args, **settings)
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in known[host]]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(image_url, "is_public", lambda address: address == "127.0.0.1" or is_public(address))
    return known, asked


def allowed(port: int) -> frozenset[str]:
    return frozenset(f"{name}:{port}" for name in ("pictures.test", "inside.test", "2130706433"))


def test_a_picture_is_fetched_from_a_host_that_is_allowed(chat, client, server, site, names, monkeypatch):
    address = f"http://pictures.test:{site.server_port}"
    monkeypatch.setitem(server.state._state, "image_hosts", allowed(site.server_port))
    reply = text_of(ask(client, show("天", f"{address}/red.png", BLUE)))
    assert reply == expected_reply(chat, ask_about([RED, BLUE], "天"))
    assert site.asked.pop() == ("/red.png", f"pictures.test:{site.server_port}", "identity")
    assert text_of(ask(client, show("天", f"{address}/moved", BLUE))) == reply
    assert [path for path, *_ in site.asked] == ["/moved", "/red.png?a=1"]
    with pytest.raises(openai.BadRequestError, match="pictures.test answered 404") as error:
        ask(client, show(f"{address}/gone", "天"))
    assert (error.value.param, error.value.code) == ("messages.0.content.0.image_url", "invalid_image_url")


@pytest.mark.parametrize(
    "path, complaint",
    [
        ("/inside", "inside.test leads to an address that is not public"),
        ("/elsewhere", "not fetched from other.test:80"),
        ("/port", "not fetched from pictures.test"),
        ("/scheme", "give data:image/png"),
        ("/round", "more than 3 redirects"),
        ("/large", "more than 100,000 bytes"),
        ("/endless", "more than 100,000 bytes"),
        ("/slow", "took too long"),
    ],
)
def test_what_a_host_can_answer_is_bounded(site, names, path, complaint):
    start, port = time.monotonic(), site.server_port
    with pytest.raises(ImageError, match=complaint):
        fetch(f"http://pictures.test:{port}{path}", allowed(port), 100_000, end=start + 0.5)
    assert time.monotonic() - start < 2


def test_the_address_that_was_looked_at_is_the_one_that_is_asked(site, names, monkeypatch):
    known, asked = names
    connected, create = [], socket.create_connection
    monkeypatch.setattr(
        socket, "create_connection", lambda to, **settings: connected.append(to) or create(to, **settings)
    )
    port, end = site.server_port, time.monotonic() + 5
    assert fetch(f"http://pictures.test:{port}/red.png", allowed(port), 10_000, end) == PNG
    assert asked == ["pictures.test"] and connected == [("127.0.0.1", port)]
    known["pictures.test"] = ["127.0.0.1", "192.168.0.1"]  # one of several is enough
    with pytest.raises(ImageError, match="not public"):
        fetch(f"http://pictures.test:{port}/red.png", allowed(port), 10_000, end)
    assert len(connected) == 1


def test_an_address_is_asked_as_browsers_ask():
    mine, theirs = socket.socketpair()
    with mine, theirs:
        theirs.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx")
        assert read_answer(urlsplit("https://a.b/图 1%2F.png?x=天&y=1"), mine, 10) == (b"x", "")
        asked = theirs.recv(1000).decode()
    assert asked.startswith("GET /%E5%9B%BE%201%2F.png?x=%E5%A4%A9&y=1 HTTP/1.1\r\nHost: a.b\r\n")


@pytest.mark.parametrize(
    "host", ["2130706433", "0x7f000001", "0177.0.0.1", "127.1", "localhost", "[::1]", "[::ffff:7f00:1]"]
)
def test_no_way_to_write_this_machine_is_public_even_where_it_is_allowed(site, host):
    address = f"http://{host}:{site.server_port}/red.png"
    with pytest.raises(ImageError, match="leads to an address that is not public"):
        fetch(address, frozenset([f"{host}:{site.server_port}"]), 10_000, time.monotonic() + 5)


@pytest.mark.parametrize(
    "public, addresses",
    [
        (True, "93.184.215.14 8.8.8.8 2606:4700::1111 2001:4860:4860::8888"),
        (False, "127.0.0.1 127.8.9.1 0.0.0.0 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 224.0.0.1"),
        (False, "255.255.255.255 ::1 :: fe80::1%eth0 fc00::1 fd00:ec2::254 ff02::1 ::ffff:127.0.0.1 ::ffff:8.8.8.8"),
        (
            False,
            "64:ff9b::7f00:1 64:ff9b::a00:1 2002:7f00:1:: 2001:0:4136:e378:8000:63bf:80ff:fffe",
        ),
    ],
)
def test_which_addresses_anybody_can_reach(public, addresses):
    assert {address: is_public(address) for address in addresses.split()} == dict.fromkeys(addresses.split(), public)


@pytest.mark.parametrize(
    "url",
    [
        *(
            "http://other.test/",
            "http://a.test.evil/",
            "http://evil/a.test",
            "http://a.test:8080/",
            "https://a.test:80/",
        ),
        *(
            "http://me@a.test/",
            "http://a.test@evil/",
            "http://evil\\@a.test/",
            "http://a.test\\.evil/",
            "ftp://a.test/",
        ),
        *("http://a.test:x/", "http:///a.test", "//a.test/", "http://ａ.test/", "http://[a.test/", "gopher://a.test/"),
    ],
)
def test_which_addresses_may_be_asked(url):
    with pytest.raises(ImageError):
        check_address(url, frozenset(["a.test", "b.test:8080"]))
    for good in ("http://a.test/x", "https://A.TEST/", "http://a.test:80/", "http://b.test:8080/x"):
        check_address(good, frozenset(["a.test", "b.test:8080"]))


def test_what_can_be_set_by_flags(monkeypatch):
    assert check_image_host("Images.Example.com:8080") == "images.example.com:8080"
    for wrong in ("http://a.test", "a.test/x", "*", "a b", "a:b", ""):
        with pytest.raises(UserError, match="--image_host"):
            check_image_host(wrong)
    monkeypatch.delenv("API_KEY", raising=False)
    for flags, complaint in ((["--image_host", "*"], "give a host"), (["--host", "0.0.0.0"], "set a key first")):
        with pytest.raises(SystemExit, match=complaint):
            app.main(["output", *flags])


def test_fetches_wait_in_a_queue_of_their_own(client, server, site, names, monkeypatch):
    monkeypatch.setitem(server.state._state, "image_hosts", allowed(site.server_port))
    monkeypatch.setattr(image_url, "FETCH_SECONDS", 1)
    url, errors = f"http://pictures.test:{site.server_port}/slow", []

    def fetch_slowly():
        with pytest.raises(openai.BadRequestError) as error:
            ask(client, show(url, "天"))
        errors.append(error.value.code)

    waiting = [threading.Thread(target=fetch_slowly) for _ in range(2)]
    for thread in waiting:
        thread.start()
    while len(server.state.fetches) < 2:
        time.sleep(0.02)
    assert text_of(ask(client, show(RED, "天")))  # the model is free
    with pytest.raises(openai.RateLimitError):
        ask(client, show(url, "天"))
    for thread in waiting:
        thread.join(5)
    assert errors == ["invalid_image_url"] * 2


def test_text_and_keys_go_as_in_train_qwen(chat, client, server):
    question = {"role": "user", "content": "天地玄黄"}
    assert text_of(ask(client, [question])) == expected_reply(chat, question)
    with pytest.raises(openai.BadRequestError, match="does not support n"):
        ask(client, n=2)
    url = f"{server.address}/v1/chat/completions"
    assert httpx.post(url, json={}).status_code == 401
    body = json.dumps({"model": "tiny", "messages": show(RED, "天"), "max_tokens": 2})
    reply = httpx.post(url, content=body, headers={"Authorization": f"Bearer {KEY}"}).json()
    assert reply["usage"]["completion_tokens"] == 2
