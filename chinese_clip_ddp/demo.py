"""A page for a trained model and its index: images by text or by image, captions by image, labels of one's own.

    python demo.py output --data_path my_folder           fills the index, then http://127.0.0.1:7860, this machine only
    python demo.py output --index my.db --port 7861       an index that is there already, another port

The way of a question: page -> by_text, by_image (SearchIndex) or classify (zero_shot) -> page.
"""

import argparse
import functools
import sys
from pathlib import Path

import gradio as gr
from PIL import Image

from files import UserError
from gallery import open_reference, read_gallery
from images import ImageError
from infer import hide_progress_bars, load_trained_model, open_picture, probabilities, zero_shot
from search import INDEX, Hit, SearchIndex, show_update

SHOWN_SIDE = 384  # pixels; larger images are shown smaller
MAX_LABELS = 200  # times templates
GALLERY = {"label": "结果", "columns": 4, "height": "auto", "object_fit": "contain", "format": "png"}
# As it was uploaded: Gradio's own reading would show what transparency hides.
UPLOAD = {"label": "图片", "type": "filepath", "image_mode": None, "sources": ["upload", "clipboard"], "height": 300}
FILTERS = '例如：captions like "%红%" 或 path like "%/scene_%"'
LABELS = "红色圆形\n蓝色三角形\n绿色方块\n一个表情"
# The captions stand below the images, not on them.
STYLE = """<style>
.thumbnail-lg:has(.caption-label) {display: flex; flex-direction: column; aspect-ratio: auto}
.thumbnail-lg .caption-label {position: static; max-width: 100%; white-space: normal; text-align: left}
</style>"""


def complaint(message: str) -> gr.Error:
    """What the user can mend, for the corner of the page and not for the log."""
    return gr.Error(message, print_exception=False)


def told_on_the_page(function):
    """The function, with its errors shown on the page: in words what the user can mend, else what went wrong."""

    @functools.wraps(function)
    def call(*arguments):
        try:
            return function(*arguments)
        except gr.Error:
            raise
        except UserError as error:
            raise complaint(str(error)) from None
        except Exception as error:
            raise gr.Error(f"出错了（{type(error).__name__}）：{error}") from error

    return call


def show_hits(hits: list[Hit]) -> tuple[list[tuple[Image.Image, str]], str]:
    """The images with their scores and captions, and a line about those that can't be shown."""
    shown, gone = [], 0
    for hit in hits:
        try:
            picture = open_reference(hit.reference)
        except ImageError:
            gone += 1
            continue
        picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        shown.append((picture, f"{hit.score:.3f} {'；'.join(hit.captions[:2]) or Path(hit.reference.path).name}"))
    found = f"找到 {len(shown)} 张图片，相似度（余弦）写在每张的前面。" if shown else "没有符合条件的图片。"
    return shown, found + (f" 另有 {gone} 张已不在原处，请更新索引。" if gone else "")


def read_upload(path: str | None) -> Image.Image:
    """The uploaded picture, read as in training (upright, on white); raises gr.Error where there is none."""
    if path is None:
        raise complaint("请先上传一张图片。")
    try:
        return open_picture(path)
    except UserError as error:
        raise complaint(f"这张图片不能用：{str(error).removeprefix(f'{path}: ')}") from None


class Page:
    """What the page's buttons call."""

    def __init__(self, index: SearchIndex):
        self.index = index

    @told_on_the_page
    def by_text(self, text: str, top_k: int, condition: str):
        if not text.strip():
            raise complaint("请先输入文字。")
        return show_hits(self.index.find_images(self.index.embed_texts([text]), int(top_k), condition.strip()))

    @told_on_the_page
    def by_image(self, path: str | None, top_k: int, condition: str):
        vector = self.index.embed_image(read_upload(path))
        captions = [[f"{score:.3f}", text] for score, text in self.index.find_captions(vector, int(top_k))]
        return *show_hits(self.index.find_images(vector, int(top_k), condition.strip())), captions

    @told_on_the_page
    def classify(self, path: str | None, labels: str, templates: str):
        picture = read_upload(path)
        names, sentences = (
            list(dict.fromkeys(filter(None, map(str.strip, each.splitlines())))) for each in (labels, templates or "{}")
        )
        if len(names) < 2:
            raise complaint("请至少给两个标签，一行一个。")
        if len(names) * len(sentences) > MAX_LABELS:
            raise complaint(f"标签数乘以模板数是 {len(names) * len(sentences)}，这里最多 {MAX_LABELS}。")
        if wrong := [sentence for sentence in sentences if sentence.count("{}") != 1]:
            raise complaint(f"模板“{wrong[0]}”里要有且只有一个 {{}}，标签会填在那里。")
        index = self.index
        scores = zero_shot(index.model, index.tokenizer, index.embed_image(picture), names, sentences)[0]
        return dict(zip(names, probabilities(index.model, scores).tolist(), strict=True))


def search_settings() -> list:
    """The number of results, and the filter."""
    with gr.Accordion("设置", open=False), gr.Row():
        top_k = gr.Slider(1, 50, 8, step=1, label="最多几个结果")
        condition = gr.Textbox("", label="筛选（可不填）", placeholder=FILTERS)
    return [top_k, condition]


def build_demo(index: SearchIndex, title: str = "图文检索演示"):
    """A Gradio page for an index: `build_demo(...).launch()` serves it on 127.0.0.1."""
    page, counts = Page(index), index.count()
    texts, pictures = index.examples()
    with gr.Blocks(title=title, analytics_enabled=False) as demo:
        gr.Markdown(f"# {title}\n索引里有 {counts['images']:,} 张图片、{counts['captions']:,} 条描述。")
        with gr.Tab("以文搜图"):
            with gr.Row(equal_height=True):
                text = gr.Textbox(show_label=False, placeholder="输入文字，按回车搜索", scale=8, autofocus=True)
                ask = gr.Button("搜索", variant="primary", min_width=80)
            gr.Examples(texts, text, label="示例")
            text_settings = search_settings()
            text_note, text_hits = gr.Markdown(), gr.Gallery(**GALLERY, interactive=False)
        with gr.Tab("以图搜图、看图找描述"):
            with gr.Row():
                image = gr.Image(**UPLOAD)
                captions = gr.Dataframe(headers=["相似度", "描述"], label="最接近的描述", interactive=False, wrap=True)
            gr.Examples(pictures, image, label="示例")
            look = gr.Button("查找", variant="primary")
            image_settings = search_settings()
            image_note, image_hits = gr.Markdown(), gr.Gallery(**GALLERY, interactive=False)
        with gr.Tab("零样本分类"):
            with gr.Row():
                unknown = gr.Image(**UPLOAD)
                with gr.Column():
                    labels = gr.Textbox(LABELS, label="标签，一行一个", lines=4)
                    templates = gr.Textbox("{}", label="模板，一行一个，标签填在 {} 处；多个模板取平均", lines=2)
                    guess = gr.Button("分类", variant="primary")
            gr.Examples(pictures, unknown, label="示例")
            shares = gr.Label(label="各标签的概率", num_top_classes=10)
        gr.HTML(STYLE, padding=False)
        one = {"concurrency_id": "model"}  # one question at a time, the others queue
        gr.on([text.submit, ask.click], page.by_text, [text, *text_settings], [text_hits, text_note], **one)
        look.click(page.by_image, [image, *image_settings], [image_hits, image_note, captions], **one)
        guess.click(page.classify, [unknown, labels, templates], shares, **one)
    return demo.queue(max_size=16)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a trained model, or a hub id")
    parser.add_argument("--index", default=INDEX, help="the index, a milvus-lite file of search.py")
    parser.add_argument("--data_path", help="a table, a tar or a folder of images that the index is to hold")
    parser.add_argument("--rebuild", action="store_true", help="empty the index of another model first")
    parser.add_argument("--host", default="127.0.0.1", help="address of the page; 0.0.0.0 lets the whole network in")
    parser.add_argument("--port", type=int, default=7860, help="port of the page")
    args = parser.parse_args(argv)
    hide_progress_bars()
    try:
        gallery = read_gallery(args.data_path) if args.data_path else None
        name = Path(args.model).resolve().name
        index = SearchIndex(args.index, *load_trained_model(args.model), name, args.rebuild)
        if gallery:
            show_update(index, gallery)
        if not index.count()["images"]:
            raise UserError(f"{args.index}: there is no image in the index yet; fill it by --data_path.")
    except UserError as error:
        sys.exit(f"error: {error}")
    with index:
        demo = build_demo(index, title=f"图文检索：{name}")
        demo.launch(server_name=args.host, server_port=args.port, footer_links=[], max_file_size="20mb")


if __name__ == "__main__":
    main()
