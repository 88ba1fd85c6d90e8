"""The Gradio page in headless Chromium: images by text and by image, captions by image, labels, and errors."""

import os
import shutil
import socket
import threading

import gradio as gr
import pytest
from small_gallery import build_model, draw_gallery

from demo import main

CHROMIUM = shutil.which("chromium")
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync"

pytestmark = pytest.mark.skipif(
    CHROMIUM is None and os.environ.get("CI") != "true", reason="no chromium on this machine (apt-get install chromium)"
)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder of 12 scenes, and their captions."""
    folder = tmp_path_factory.mktemp("gallery") / "scenes"
    return folder, draw_gallery(folder)


@pytest.fixture(scope="module")
def address(drawn, tmp_path_factory):
    """The page as the command line serves it, which goes on for as long as the page isn't closed."""
    launch, pages, ready, done = gr.Blocks.launch, [], threading.Event(), threading.Event()

    def launch_until_done(page, **settings):
        pages.append(page)
        launch(page, prevent_thread_lock=True, quiet=True, **settings)
        ready.set()
        done.wait()
        page.close()

    model = build_model(tmp_path_factory.mktemp("model"))[0].name_or_path
    index = tmp_path_factory.mktemp("index") / "my.db"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gr.Blocks, "launch", launch_until_done)
        flags = [model, "--data_path", str(drawn[0]), "--index", str(index), "--port", str(port)]
        command = threading.Thread(target=main, args=(flags,))
        command.start()
        assert ready.wait(60)
    yield f"http://127.0.0.1:{port}/"
    done.set()
    command.join(20)
    assert not command.is_alive()


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
    page.get_by_role("button", name="搜索", exact=True).wait_for()
    yield page
    page.close()
    assert elsewhere == [] and failures == []


def test_images_are_found_by_text_and_filtered(page, drawn, tmp_path):
    page.get_by_text("索引里有 12 张图片、12 条描述。").wait_for()
    page.get_by_role("button", name="搜索", exact=True).click()
    page.get_by_text("请先输入文字。").wait_for()
    page.get_by_placeholder("输入文字").fill(drawn[1][2])
    page.get_by_placeholder("输入文字").press("Enter")
    page.get_by_text("找到 8 张图片").wait_for()
    assert page.locator(".grid-container img").count() == 8
    page.get_by_text("设置").first.click()
    page.get_by_label("筛选（可不填）").fill('path like "%/003.png"')
    page.get_by_placeholder("输入文字").press("Enter")
    page.get_by_text("找到 1 张图片").wait_for()
    assert page.locator(".caption-label", has_text=drawn[1][3]).count() == 1
    page.get_by_label("筛选（可不填）").fill("colour == 1")
    page.get_by_placeholder("输入文字").press("Enter")
    page.get_by_text("unknown field 'colour'").wait_for()


def test_images_and_captions_are_found_by_an_image(page, drawn, tmp_path):
    page.get_by_role("tab", name="以图搜图").click()
    upload, look = page.locator("input[type=file]").first, page.get_by_role("button", name="查找")
    upload.set_input_files(drawn[0] / "images/005.png")
    page.wait_for_timeout(500)
    look.click()
    page.get_by_text("找到 8 张图片").wait_for()
    page.get_by_text(f"1.000 {drawn[1][5]}").wait_for()
    assert page.locator(".grid-container img").count() == 8
    page.get_by_role("button", name="Remove Image").first.click()
    look.click()
    page.get_by_text("请先上传一张图片。").wait_for()
    upload.set_input_files(__file__)
    page.get_by_text("Invalid file type").first.wait_for()
    broken = tmp_path / "broken.png"
    broken.write_bytes((drawn[0] / "images/005.png").read_bytes()[:300])
    upload.set_input_files(broken)
    page.wait_for_timeout(500)
    look.click()
    page.get_by_text("这张图片不能用：PNG, broken or truncated").wait_for()


def test_an_image_is_given_one_of_the_labels(page, drawn, tmp_path):
    page.get_by_role("tab", name="零样本分类").click()
    page.locator("input[type=file]").last.set_input_files(drawn[0] / "images/005.png")
    page.wait_for_timeout(500)
    page.get_by_label("标签，一行一个").fill("圆形")
    page.get_by_role("button", name="分类", exact=True).click()
    page.get_by_text("请至少给两个标签").wait_for()
    page.get_by_label("标签，一行一个").fill("圆形\n方块\n三角形")
    page.get_by_label("模板，一行一个").fill("一个{}\n没有括号")
    page.get_by_role("button", name="分类", exact=True).click()
    page.get_by_text("模板“没有括号”里要有且只有一个 {}").wait_for()
    page.get_by_label("模板，一行一个").fill("一个{}\n左边有{}")
    page.get_by_role("button", name="分类", exact=True).click()
    answer = page.locator("h2", has_text="形").or_(page.locator("h2", has_text="方块"))
    answer.wait_for()
    assert answer.inner_text() in ("圆形", "方块", "三角形")


def test_a_model_that_is_not_there_ends_with_one_line(tmp_path):
    with pytest.raises(SystemExit, match="there is no such folder"):
        main([str(tmp_path / "nothing"), "--index", str(tmp_path / "my.db")])
