"""The Gradio page in headless Chromium: a reply streams, can be stopped, asked for again and cleared; errors show."""

import os
import shutil
import threading
import time

import pytest
import torch

import demo
from demo import build_demo
from infer import load_trained_model

CHROMIUM = shutil.which("chromium")
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync"
REPLY = ".bot.message:not(.pending)"

pytestmark = pytest.mark.skipif(
    CHROMIUM is None and os.environ.get("CI") != "true", reason="no chromium on this machine (apt-get install chromium)"
)


@pytest.fixture(scope="module")
def chat(tiny_folder):
    """A model that says something else at each step, never ends by itself, and takes its time."""
    model, tokenizer = load_trained_model(tiny_folder)
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.data.normal_(std=0.2, generator=generator)
    model.generation_config.suppress_tokens = [tokenizer.eos_token_id]
    forward = model.forward

    def slow_forward(*args, **kwargs):
        time.sleep(0.02)
        return forward(*args, **kwargs)

    model.forward = slow_forward
    return model, tokenizer


@pytest.fixture(scope="module")
def address(chat):
    page = build_demo(*chat, title="测试对话")
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, footer_links=[])
    yield url
    page.close()


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
    page = browser.new_page(viewport={"width": 1100, "height": 900}, locale="zh-CN")
    elsewhere, failures = [], []
    page.on(
        "request", lambda request: request.url.startswith((address, "data:", "blob:")) or elsewhere.append(request.url)
    )
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.goto(address)
    page.get_by_role("button", name="发送").wait_for()
    yield page
    page.close()
    assert elsewhere == [] and failures == []


def ask(page, question: str = "天地玄黄") -> None:
    page.get_by_placeholder("输入问题").fill(question)
    page.get_by_placeholder("输入问题").press("Enter")


def reply_text(page) -> str:
    return page.locator(REPLY).last.inner_text()


def wait_until(page, condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        page.wait_for_timeout(50)


def generating() -> bool:
    return any(thread.name.startswith("Thread-") and "generate" in thread.name for thread in threading.enumerate())


def test_reply_streams_stops_is_asked_for_again_and_cleared(page, tmp_path):
    page.get_by_text("设置").click()
    page.get_by_role("spinbutton", name="温度").wait_for()
    page.wait_for_timeout(1000)  # what is being drawn sets itself to its default once more
    page.get_by_label("系统提示").fill("宇宙洪荒")
    ask(page)
    page.locator(REPLY).last.wait_for()
    first = reply_text(page)
    wait_until(page, lambda: len(reply_text(page)) > len(first))
    page.screenshot(path=tmp_path / "streaming.png")

    page.get_by_role("button", name="停止").click()
    wait_until(page, lambda: not generating())
    page.wait_for_timeout(300)
    stopped = reply_text(page)
    page.wait_for_timeout(300)
    assert reply_text(page) == stopped

    page.get_by_role("button", name="重新生成").click()
    wait_until(page, lambda: reply_text(page) != stopped and generating())
    assert page.locator(".user.message").count() == 1

    page.get_by_role("button", name="清空", exact=True).click()
    wait_until(page, lambda: not generating() and page.locator(".message").count() == 0)
    page.wait_for_timeout(300)
    assert page.locator(".message").count() == 0, "a late piece of the old reply came back"

    ask(page, "日月")
    wait_until(page, lambda: page.locator(REPLY).count() == 1 and len(reply_text(page)) > 5)
    page.get_by_role("button", name="停止").click()
    wait_until(page, lambda: not generating())
    page.wait_for_timeout(1000)
    ask(page, "宇宙")
    page.locator(REPLY).last.wait_for()
    page.get_by_text("宇宙", exact=True).wait_for()
    wait_until(page, lambda: page.locator(".user.message").all_inner_texts() == ["日月", "宇宙"])
    assert page.get_by_text("生成失败").count() == 0
    page.screenshot(path=tmp_path / "page.png")


def test_second_question_goes_out_with_the_history(page, monkeypatch):
    seen = []

    def reply(model, tokenizer, messages, *settings, stop_event):
        seen.append([message["content"] for message in messages])
        yield "  答"
        yield "案"

    monkeypatch.setattr(demo, "stream_reply", reply)
    for number, question in enumerate(("第一问", "第二问"), start=1):
        ask(page, question)
        wait_until(page, lambda number=number: page.locator(REPLY).count() == number and "答案" in reply_text(page))
    assert seen == [["第一问"], ["第一问", "  答案", "第二问"]]


def test_errors_are_shown_on_the_page(page, chat, monkeypatch):
    for button in ("发送", "重新生成"):  # nothing to answer: nothing happens
        page.get_by_role("button", name=button).click()
        page.wait_for_timeout(1000)

    def fail(*args, **kwargs):
        raise RuntimeError("显存不足")

    monkeypatch.setattr(chat[0], "forward", fail)
    ask(page)
    page.get_by_text("生成失败（RuntimeError）：显存不足").wait_for()
    assert page.locator(".user.message").inner_text().strip() == "天地玄黄"
    monkeypatch.undo()
    ask(page, "宇宙")
    # The question that got no reply makes room for the new one.
    wait_until(page, lambda: page.locator(".user.message").all_inner_texts() == ["宇宙"])
    wait_until(page, lambda: page.locator(REPLY).count() == 1 and "显存不足" not in reply_text(page))


def test_page_that_is_closed_ends_its_reply(browser, address):
    page = browser.new_page()
    page.goto(address)
    ask(page)
    wait_until(page, generating)
    page.close()
    end = time.monotonic() + 30
    while generating():
        assert time.monotonic() < end, "the model still talks to a page that is gone"
        time.sleep(0.1)
