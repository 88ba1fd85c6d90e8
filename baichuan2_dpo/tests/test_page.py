"""The page in headless Chromium: a question is answered before and after the training, a pair is scored under both."""

import os
import shutil
import threading
import time

import pytest
import torch

import demo
from compare import score_pair
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
def models(tiny_folder):
    """Two models that never end by themselves, take their time and say other things, in characters of WORDS."""
    torch.manual_seed(0)
    pair = []
    for _ in range(2):
        model, tokenizer = load_trained_model(tiny_folder)
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.data.normal_(std=0.2)
        texts = map(tokenizer.decode, range(len(tokenizer)))
        model.generation_config.suppress_tokens = [i for i, text in enumerate(texts) if not set(text) <= set(WORDS)]
        slow_down(model)
        pair.append(model)
    return *pair, tokenizer


def slow_down(model) -> None:
    forward = model.forward

    def slow_forward(*args, **kwargs):
        time.sleep(0.02)
        return forward(*args, **kwargs)

    model.forward = slow_forward


@pytest.fixture(scope="module")
def address(models):
    page = demo.build_demo(*models, title="测试对比")
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


def ask(page, question: str = QUESTION) -> None:
    page.get_by_placeholder("输入问题").fill(question)
    page.get_by_placeholder("输入问题").press("Enter")


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


def press(page, button: str) -> None:
    page.get_by_role("button", name=button, exact=True).click()


def test_replies_stream_stop_are_asked_for_again_and_cleared(page, models, tmp_path):
    ask(page)
    wait_until(page, lambda: texts(page)[0])
    first = texts(page)[0][0]
    wait_until(page, lambda: len(texts(page)[0][0]) > len(first))
    assert texts(page)[1] == []
    press(page, "停止")
    wait_until(page, lambda: not generating())
    page.wait_for_timeout(300)
    stopped = texts(page)
    page.wait_for_timeout(300)
    assert texts(page) == stopped and stopped[1] == []

    page.get_by_text("设置").click()
    page.get_by_role("spinbutton", name="温度").wait_for()
    page.wait_for_timeout(1000)  # what is being drawn sets itself to its default once more
    for label, value in (("最大长度", 30), ("温度", 0)):
        page.get_by_role("spinbutton", name=label).fill(str(value))
        page.get_by_role("spinbutton", name=label).press("Tab")
    press(page, "重新生成")
    conversation = [[{"role": "user", "content": QUESTION}]]
    settings = {"max_new_tokens": 30, "temperature": 0}
    expected = [reply_batch(model, models[2], conversation, **settings) for model in models[:2]]
    assert expected[0] != expected[1]
    wait_until(page, lambda: texts(page) == expected and not generating())
    assert texts(page, "user") == [[QUESTION]] * 2
    page.screenshot(path=tmp_path / "page.png")

    press(page, "清空")
    wait_until(page, lambda: texts(page, "user") == texts(page) == [[], []])


def test_each_column_goes_on_with_its_own_history(page, models, monkeypatch):
    seen = []

    def reply(model, tokenizer, messages, *settings, stop_event):
        seen.append([message["content"] for message in messages])
        if messages[-1]["content"] == "错":
            raise RuntimeError("显存不足")
        yield "前" if model is models[0] else "后"

    monkeypatch.setattr(demo, "stream_reply", reply)
    ask(page, "第一问")
    wait_until(page, lambda: texts(page) == [["前"], ["后"]])
    ask(page, "错")
    failure = "⚠️ 生成失败（RuntimeError）：显存不足"
    wait_until(page, lambda: texts(page) == [["前", failure], ["后", failure]])
    ask(page, "第二问")
    wait_until(page, lambda: texts(page) == [["前"] * 2, ["后"] * 2])
    assert seen[-2:] == [["第一问", "前", "第二问"], ["第一问", "后", "第二问"]]


def test_pair_is_scored(page, models, monkeypatch, tmp_path):
    page.get_by_role("tab", name="打分").click()
    button = page.get_by_role("button", name="打分", exact=True)
    button.click()
    page.get_by_text("请填写问题和两个回答").wait_for()
    replies = "宇宙洪荒", "日月盈昃辰宿"
    for label, text in zip(("问题", "回答一", "回答二"), (QUESTION, *replies), strict=True):
        page.get_by_label(label, exact=True).fill(text)
    for beta in (0.1, 0.5):
        page.get_by_label("β").fill(str(beta))
        button.click()
        scores = score_pair(*models, QUESTION, replies, beta)
        page.get_by_text(f"{scores['margin']:+.3f}，训练后的模型更偏好").wait_for()
        table = [row.locator("td").all_inner_texts() for row in page.locator("tbody tr:has-text('回答')").all()]
        columns = zip(*(scores[key] for key in ("tokens", "before", "after", "rewards")), strict=True)
        for cells, name, (tokens, before, after, reward) in zip(table, ("回答一", "回答二"), columns, strict=True):
            sums = [f"{before:.2f}", f"{before / tokens:.3f}", f"{after:.2f}", f"{after / tokens:.3f}"]
            assert cells == [name, str(tokens), *sums, f"{reward:+.3f}"]
    page.screenshot(path=tmp_path / "scores.png")

    page.get_by_label("回答二", exact=True).fill(replies[0])
    button.click()
    page.get_by_text("两个回答完全相同").wait_for()
    assert page.locator("tbody tr:has-text('回答')").count() == 0

    def fail(*args, **kwargs):
        raise RuntimeError("显存不足")

    monkeypatch.setattr(models[1], "forward", fail)
    page.get_by_label("回答二", exact=True).fill(replies[1])
    button.click()
    page.get_by_text("打分失败（RuntimeError）：显存不足").wait_for()
