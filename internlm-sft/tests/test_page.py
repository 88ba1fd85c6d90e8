"""The page in headless Chromium: base and tuned answer side by side, one after the other, whatever other pages do."""

import os
import shutil
import threading
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

import demo
from conftest import WORDS
from infer import load_trained_model, reply_batch

CHROMIUM = shutil.which("chromium")
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync"
QUESTION = "天地玄黄"

pytestmark = pytest.mark.skipif(
    CHROMIUM is None and os.environ.get("CI") != "true", reason="no chromium on this machine (apt-get install chromium)"
)


@pytest.fixture(scope="module")
def chat(tiny_folder):
    """A base that never ends by itself and takes its time, and an adapter that changes each of its words.

    They speak in characters that Markdown leaves as they are.
    """
    base, tokenizer = load_trained_model(tiny_folder)
    torch.manual_seed(0)
    for weight in base.parameters():
        if weight.ndim == 2:
            weight.data.normal_(std=0.2)
    base.generation_config.suppress_tokens = sorted(
        set(range(len(tokenizer))) - set(tokenizer.convert_tokens_to_ids(list(WORDS)))
    )
    forward = base.forward

    def slow_forward(*args, **kwargs):
        time.sleep(0.02)
        return forward(*args, **kwargs)

    base.forward = slow_forward
    adapter = LoraConfig(target_modules="all-linear", lora_alpha=64, init_lora_weights=False)
    return get_peft_model(base, adapter).eval(), tokenizer


@pytest.fixture(scope="module")
def expected(chat) -> list[str]:
    """What base and tuned answer to QUESTION in 30 tokens at temperature 0."""
    model, tokenizer = chat
    conversation = [[{"role": "user", "content": QUESTION}]]
    with model.disable_adapter():
        before = reply_batch(model, tokenizer, conversation, max_new_tokens=30, temperature=0)
    return before + reply_batch(model, tokenizer, conversation, max_new_tokens=30, temperature=0)


@pytest.fixture(scope="module")
def address(chat):
    page = demo.build_demo(*chat, title="测试对比")
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
def open_page(browser, address):
    """Opens the page; at the end nothing may have been asked of another machine and no script may have failed."""
    pages, elsewhere, failures = [], [], []

    def note(request):
        if not request.url.startswith((address, "data:", "blob:")):
            elsewhere.append(request.url)

    def open_one():
        page = browser.new_page(viewport={"width": 1100, "height": 900}, locale="zh-CN")
        page.on("request", note)
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.goto(address)
        page.get_by_role("button", name="发送").wait_for()
        pages.append(page)
        return page

    yield open_one
    for page in pages:
        page.close()
    assert elsewhere == [] and failures == []


def ask(page, question: str = QUESTION) -> None:
    page.get_by_placeholder("输入问题").fill(question)
    page.get_by_placeholder("输入问题").press("Enter")


def open_settings(page) -> None:
    page.get_by_text("设置").click()
    page.get_by_role("spinbutton", name="温度").wait_for()
    page.wait_for_timeout(1000)  # what is being drawn sets itself to its default once more


def ask_greedily(page, max_new_tokens: int = 30) -> None:
    """At temperature 0, as `expected` was."""
    open_settings(page)
    for label, value in (("最大长度", max_new_tokens), ("温度", 0)):
        page.get_by_role("spinbutton", name=label).fill(str(value))
        page.get_by_role("spinbutton", name=label).press("Tab")
        assert page.get_by_role("slider", name=label).input_value() == str(value)
    ask(page)


def texts(page, role: str = "bot") -> list[list[str]]:
    """What stands in the left column and in the right one."""
    columns = page.get_by_role("log").all()
    return [
        [text.strip() for text in column.locator(f".{role}.message:not(.pending)").all_inner_texts()]
        for column in columns
    ]


def wait_until(page, condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"it did not happen in time; the page shows {texts(page)}"
        page.wait_for_timeout(50)


def generating() -> bool:
    return any("(generate)" in thread.name for thread in threading.enumerate())


def test_replies_stream_one_after_the_other_stop_and_are_cleared(open_page, tmp_path):
    page = open_page()
    ask(page)
    wait_until(page, lambda: texts(page)[0])
    first = texts(page)[0][0]
    wait_until(page, lambda: len(texts(page)[0][0]) > len(first))
    assert texts(page)[1] == []

    page.get_by_role("button", name="停止").click()
    wait_until(page, lambda: not generating())
    page.wait_for_timeout(300)
    stopped = texts(page)
    page.wait_for_timeout(300)
    assert texts(page) == stopped and stopped[1] == []

    page.get_by_role("button", name="清空", exact=True).click()
    wait_until(page, lambda: texts(page, "user") == texts(page) == [[], []])
    ask_greedily(page)
    wait_until(page, lambda: texts(page)[1])
    page.screenshot(path=tmp_path / "streaming.png")
    page.get_by_role("button", name="清空", exact=True).click()
    wait_until(page, lambda: not generating() and texts(page, "user") == texts(page) == [[], []])
    page.wait_for_timeout(300)
    assert texts(page) == [[], []], "a late piece of the old reply came back"


def test_columns_differ_and_no_other_page_turns_the_adapter(open_page, expected, tmp_path):
    assert expected[0] != expected[1]
    one, other = open_page(), open_page()
    ask_greedily(one)
    wait_until(one, lambda: texts(one)[0])
    ask_greedily(other)
    shown = [[reply] for reply in expected]
    wait_until(one, lambda: texts(one) == shown)
    wait_until(other, lambda: texts(other) == shown)
    one.screenshot(path=tmp_path / "page.png")


def test_abandoned_reply_of_the_base_leaves_the_adapter_on_for_others(open_page, browser, address, expected):
    leaving = browser.new_page()
    leaving.goto(address)
    ask_greedily(leaving, max_new_tokens=1500)  # more than a test would wait for
    wait_until(leaving, lambda: texts(leaving)[0])
    leaving.close()
    page = open_page()
    ask_greedily(page)
    wait_until(page, lambda: texts(page) == [[reply] for reply in expected] and not generating())
    assert expected[0] != expected[1], "an adapter left off would not show"


def test_each_column_goes_on_with_its_own_history(open_page, monkeypatch):
    seen = []

    def reply(model, tokenizer, messages, *settings, stop_event):
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        seen.append([message["content"] for message in messages])
        yield from "  关" if layers[0].disable_adapters else "  开"

    monkeypatch.setattr(demo, "stream_reply", reply)
    page = open_page()
    open_settings(page)
    page.get_by_label("系统提示").fill("宇宙洪荒")
    for number, question in enumerate(("第一问", "第二问"), start=1):
        ask(page, question)
        wait_until(page, lambda number=number: texts(page) == [["关"] * number, ["开"] * number])
    assert seen == [
        ["宇宙洪荒", "第一问"],
        ["宇宙洪荒", "第一问"],
        ["宇宙洪荒", "第一问", "  关", "第二问"],
        ["宇宙洪荒", "第一问", "  开", "第二问"],
    ]


def test_errors_are_shown_on_the_page(open_page, chat, monkeypatch):
    page = open_page()
    page.get_by_role("button", name="发送").click()  # nothing to answer: nothing happens
    page.wait_for_timeout(500)

    def fail(*args, **kwargs):
        raise RuntimeError("显存不足")

    monkeypatch.setattr(chat[0].get_base_model(), "forward", fail)
    ask(page)
    wait_until(page, lambda: texts(page) == [["⚠️ 生成失败（RuntimeError）：显存不足"]] * 2)
    monkeypatch.undo()
    ask(page, "宇宙")
    # The question that got no reply makes room for the new one.
    wait_until(page, lambda: texts(page, "user") == [["宇宙"]] * 2)
    wait_until(page, lambda: texts(page)[0] and "显存不足" not in str(texts(page)))
    assert page.get_by_text("生成失败").count() == 0


def test_folder_without_an_adapter_is_refused(tiny_folder):
    with pytest.raises(SystemExit, match="is no LoRA adapter.*python infer.py"):
        demo.main([tiny_folder])
