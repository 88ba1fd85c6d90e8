"""The Gradio page in headless Chromium: pictures in several questions, a streamed reply, stop, again, clear; errors."""

import os
import shutil
import threading
import time

import pytest
from served import draw, encode

import demo
from demo import build_demo, read_examples
from files import UserError
from odd_images import draw_good

CHROMIUM = shutil.which("chromium")
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync"
REPLY = ".bot.message:not(.pending)"

pytestmark = pytest.mark.skipif(
    CHROMIUM is None and os.environ.get("CI") != "true", reason="no chromium on this machine (apt-get install chromium)"
)


@pytest.fixture(scope="module")
def address(chat):
    """The page of a model that takes its time."""
    model, processor = chat
    slow = model.lm_head.register_forward_hook(lambda *args: time.sleep(0.02))
    page = build_demo(model, processor, title="测试对话")
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, footer_links=[], max_file_size="1mb")
    yield url
    page.close()
    slow.remove()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    """The page, loaded; at the end nothing may have been asked of another machine and no script may have failed."""
    page = browser.new_page(viewport={"width": 1100, "height": 1000}, locale="zh-CN")
    elsewhere, failures = [], []
    page.on(
        "request", lambda request: request.url.startswith((address, "data:", "blob:")) or elsewhere.append(request.url)
    )
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.goto(address)
    page.get_by_role("button", name="停止").wait_for()
    yield page
    page.close()
    assert elsewhere == [] and failures == []


def upload(page, *pictures: bytes) -> None:
    files = [{"name": f"my {i}.png", "mimeType": "image/png", "buffer": data} for i, data in enumerate(pictures)]
    page.locator("input[type=file]").set_input_files(files)
    wait_until(page, lambda: page.locator(".thumbnails img").count() == len(pictures))


def send(page, question: str) -> None:
    page.get_by_placeholder("输入问题").fill(question)
    page.get_by_placeholder("输入问题").press("Enter")


def wait_until(page, condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        page.wait_for_timeout(50)


def reply_text(page) -> str:
    return page.locator(REPLY).last.inner_text()


def generating() -> bool:
    return any(thread.name.startswith("Thread-") and "generate" in thread.name for thread in threading.enumerate())


def test_pictures_are_asked_about_and_the_reply_streams_stops_and_comes_again(page, tmp_path, monkeypatch):
    seen, stream_reply = [], demo.stream_reply

    def reply(model, processor, messages, *settings, **more):
        seen.append([(message["content"], [image.size for image in message.get("images", [])]) for message in messages])
        return stream_reply(model, processor, messages, *settings, **more)

    monkeypatch.setattr(demo, "stream_reply", reply)
    turned = draw_good()["EXIF 6"]
    upload(page, encode(draw("red")), turned)
    send(page, "天地")
    page.locator(REPLY).last.wait_for()
    first = reply_text(page)
    wait_until(page, lambda: len(reply_text(page)) > len(first))
    assert page.locator(".user.message img").count() == 2 and page.locator(".thumbnails img").count() == 0
    page.screenshot(path=tmp_path / "streaming.png")
    page.get_by_role("button", name="停止").click()
    wait_until(page, lambda: not generating())
    page.wait_for_timeout(300)
    stopped = reply_text(page)
    page.wait_for_timeout(300)
    assert reply_text(page) == stopped

    page.get_by_role("button", name="重新生成").click()
    wait_until(page, lambda: reply_text(page) != stopped and generating())
    page.get_by_role("button", name="停止").click()
    wait_until(page, lambda: not generating())
    page.wait_for_timeout(300)

    upload(page, encode(draw("blue", (64, 64))))
    send(page, "玄黄")
    wait_until(page, lambda: len(seen) == 3 and page.locator(".user.message img").count() == 3)
    question = ("<image><image>\n天地", [(40, 30), (60, 40)])
    assert seen[0] == seen[1] == [question]
    assert seen[2][0] == question and seen[2][1][1] == [] and seen[2][2] == ("<image>\n玄黄", [(64, 64)])

    page.get_by_role("button", name="清空", exact=True).click()
    wait_until(page, lambda: not generating() and page.locator(".message").count() == 0)
    page.wait_for_timeout(300)
    assert page.locator(".message").count() == 0, "a late piece of the old reply came back"


def test_an_example_brings_its_pictures(page):
    example = read_examples()[0]
    page.get_by_text(example["text"]).first.click()
    wait_until(page, lambda: page.locator(".thumbnails img").count() == len(example["files"]) == 1)
    page.locator(".submit-button").click()
    wait_until(page, lambda: page.locator(REPLY).count() == 1)
    assert (
        page.get_by_test_id("download-link").count() == 0 or not page.get_by_test_id("download-link").first.is_visible()
    )
    page.get_by_role("button", name="停止").click()
    wait_until(page, lambda: not generating())


def test_what_can_t_be_asked_is_told_and_stays_in_the_box(page, chat, monkeypatch):
    good = encode(draw("red"))
    upload(page, good, good[:60])
    send(page, "天地")
    page.get_by_text("图片 my 1.png 不能用：PNG, broken or truncated").wait_for()
    assert page.locator(".message").count() == 0 and page.locator(".thumbnails img").count() == 2
    page.get_by_label("Remove File").last.click()
    send(page, "<image>天")
    page.get_by_text("文字里不要写 <image>").wait_for()

    def fail(*args, **kwargs):
        raise RuntimeError("显存不足")

    with monkeypatch.context() as patch:
        patch.setattr(chat[0].lm_head, "forward", fail)
        send(page, "宇宙")
        page.get_by_text("生成失败（RuntimeError）：显存不足").wait_for()
    assert page.locator(".user.message img").count() == 1
    send(page, "日月")  # makes room: the question that got no reply isn't sent along
    wait_until(page, lambda: page.locator(".user.message").all_inner_texts() == ["日月"])
    wait_until(page, lambda: page.locator(REPLY).count() == 1 and "显存不足" not in reply_text(page))
    page.close()  # ends its reply
    end = time.monotonic() + 30
    while generating():
        assert time.monotonic() < end, "the model still talks to a page that is gone"
        time.sleep(0.1)


def test_examples_are_drawn_or_files(tmp_path):
    (tmp_path / "my.txt").write_text("my.png;蓝 十字 大 一 中间\t天\n\t地\n", encoding="utf-8")
    first, second = read_examples(tmp_path / "my.txt")
    assert (
        first["text"] == "天" and first["files"][0] == str(tmp_path / "my.png") and first["files"][1].endswith(".png")
    )
    assert second == {"text": "地", "files": []}


def test_too_many_pictures_in_a_question():
    with pytest.raises(UserError, match="最多 8 张"):
        demo.read_question({"text": "", "files": ["x.png"] * 9})
