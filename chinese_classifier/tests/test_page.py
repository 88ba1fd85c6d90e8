"""The Gradio page in headless Chromium: scores and words of a text, a whole table, and errors that show."""

import os
import shutil
import socket
from pathlib import Path

import gradio as gr
import pandas as pd
import pytest

from conftest import make_reviews, write_table
from demo import main, scale_words

CHROMIUM = shutil.which("chromium")
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync"

pytestmark = pytest.mark.skipif(
    CHROMIUM is None and os.environ.get("CI") != "true", reason="no chromium on this machine (apt-get install chromium)"
)


@pytest.fixture(scope="module")
def address(telling_folder):
    """The page as the command line serves it, but in the background."""
    launch, pages = gr.Blocks.launch, []

    def launch_in_background(page, **settings):
        pages.append(page)
        launch(page, prevent_thread_lock=True, quiet=True, **settings)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gr.Blocks, "launch", launch_in_background)
        main([telling_folder, "--port", str(port)])
    yield f"http://127.0.0.1:{port}/"
    pages[0].close()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def form(browser, address):
    """The page, loaded; at the end nothing may have been asked of another machine and no script may have failed."""
    page = browser.new_page(viewport={"width": 1100, "height": 900}, locale="zh-CN")
    elsewhere, failures = [], []
    page.on(
        "request", lambda request: request.url.startswith((address, "data:", "blob:")) or elsewhere.append(request.url)
    )
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.goto(address)
    page.get_by_role("button", name="分类", exact=True).wait_for()
    yield page
    page.close()
    assert elsewhere == [] and failures == []


def test_a_text_gets_its_scores_and_its_words(form):
    form.get_by_placeholder("输入文本").fill("天地欢喜玄黄宇宙")
    form.get_by_placeholder("输入文本").press("Enter")
    form.locator("h2", has_text="好评").wait_for()
    form.get_by_text("欢喜", exact=True).wait_for()
    assert form.get_by_text("差评").count() == 1, "the other class has no bar"
    form.get_by_role("button", name="清空").click()
    form.locator("h2", has_text="好评").wait_for(state="detached")
    assert form.get_by_placeholder("输入文本").input_value() == ""
    form.get_by_role("button", name="分类", exact=True).click()
    form.get_by_text("请先输入文本。").wait_for()
    form.get_by_placeholder("输入文本").fill("天地欢喜玄黄宇宙" * 300)
    form.get_by_role("button", name="分类", exact=True).click()
    form.get_by_text("文本超过 64 个词元，后面的没有读。只解释前 2000 个字。").wait_for()


def test_a_whole_table_is_classified_and_can_be_downloaded(form, tmp_path):
    rows = make_reviews(30, seed=2)
    table = write_table(tmp_path / "评论.csv", [*rows, (" ", "好评")])
    form.get_by_role("tab", name="整个表格").click()
    form.get_by_role("button", name="开始").click()
    form.get_by_text("请先上传一个 .csv 或 .tsv 文件。").wait_for()
    form.locator("input[type=file]").first.set_input_files(table)
    form.get_by_text("评论.csv").wait_for()
    form.get_by_role("button", name="开始").click()
    form.get_by_text("共 31 行：").wait_for()
    with form.expect_download() as download:
        form.locator("a[download*=predicted]").first.click()
    result = pd.read_csv(Path(download.value.path()))
    assert (result.predicted[:30] == result.label[:30]).mean() > 0.9 and pd.isna(result.predicted[30])
    form.get_by_label("文本所在的列").fill("无此列")
    form.get_by_role("button", name="开始").click()
    form.get_by_text("no column '无此列'; there are text, label").wait_for()


def test_a_model_that_is_not_there_ends_with_one_line(tmp_path):
    with pytest.raises(SystemExit, match="there is no such folder"):
        main([str(tmp_path / "nothing")])


def test_the_strongest_word_has_the_strongest_colour():
    assert scale_words([("好", 2.0), ("坏", -4.0), ("的", 0.0)]) == [("好", 0.5), ("坏", -1.0), ("的", 0.0)]
    assert scale_words([("的", 0.0)]) == [("的", 0.0)] and scale_words([]) == []
