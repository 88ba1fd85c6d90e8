"""The page in headless Chromium: a text is written on, stopped and scored character by character; errors show."""

import os
import shutil
import threading
import time

import pytest
import torch

import demo
from infer import character_bits, load_trained_model

CHROMIUM = shutil.which("chromium")
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync"
BEGINNING = "天地玄黄"
SCORED = "天地玄黄\n宇<b>宙"

pytestmark = pytest.mark.skipif(
    CHROMIUM is None and os.environ.get("CI") != "true", reason="no chromium on this machine (apt-get install chromium)"
)


@pytest.fixture(scope="module")
def model(scratch_folder):
    """A model that never ends by itself, says something else at each step and takes its time; and its tokenizer."""
    model, tokenizer = load_trained_model(scratch_folder, device_map="cpu")
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.data.normal_(std=0.2, generator=generator)
    model.generation_config.suppress_tokens = [0, 1, 2]  # <unk> <s> </s>
    forward = model.forward

    def slow_forward(*args, **kwargs):
        time.sleep(0.03)
        return forward(*args, **kwargs)

    model.forward = slow_forward
    return model, tokenizer


@pytest.fixture(scope="module")
def address(model):
    page = demo.create_page(*model, "测试续写").queue()
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
    page.get_by_role("button", name="续写").wait_for()
    yield page
    page.close()
    assert elsewhere == [] and failures == []


def wait_until(page, condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        page.wait_for_timeout(50)


def generating() -> bool:
    return any("(generate)" in thread.name for thread in threading.enumerate())


def test_a_text_is_written_on_stopped_and_scored(page, model, monkeypatch, tmp_path):
    box = page.get_by_label("开头，接着写")
    write, stop, score = (page.get_by_role("button", name=name) for name in ("续写", "停止", "逐字困惑度"))
    page.get_by_role("spinbutton", name="max_new_tokens").fill("58")  # with 4 + 1 tokens 63 of 64
    page.get_by_role("spinbutton", name="max_new_tokens").press("Tab")

    box.fill(BEGINNING)
    write.click()
    wait_until(page, lambda: len(box.input_value()) > len(BEGINNING))
    grown = box.input_value()
    assert grown.startswith(BEGINNING)
    wait_until(page, lambda: len(box.input_value()) > len(grown))
    stop.click()
    wait_until(page, lambda: not generating())
    page.wait_for_timeout(300)
    stopped = box.input_value()
    page.wait_for_timeout(300)
    assert box.input_value() == stopped and len(stopped) < len(BEGINNING) + 58

    write.click()  # together they have more tokens than the model's context
    page.get_by_text("more than the model's context of 64").wait_for()
    assert box.input_value() == stopped

    box.fill(SCORED)
    score.click()
    spans = page.locator("span[title$=' bits']")
    wait_until(page, lambda: spans.count() == len(SCORED))
    assert [text.strip() for text in spans.all_inner_texts()] == [*SCORED.replace("\n", "↵")]
    costs = [f"{bits:.2f} bits" for _, bits in character_bits(*model, SCORED)]
    assert [span.get_attribute("title") for span in spans.all()] == costs
    page.screenshot(path=tmp_path / "page.png")

    def fail(*args, **kwargs):
        raise RuntimeError("显存不足")

    monkeypatch.setattr(model[0], "forward", fail)
    box.fill(BEGINNING)
    write.click()
    page.get_by_text("生成失败（RuntimeError）：显存不足").wait_for()
    assert box.input_value() == BEGINNING
