"""A chat page for a trained LLaVA: pictures in any question, streamed replies, stop, again, clear, and the settings.

    python demo.py output_zero2                     on http://127.0.0.1:7860
    python demo.py output_zero2 --host 0.0.0.0      for the whole network

The way of a question: page -> ask (reads the pictures) -> stream_page (stream_reply of infer.py) -> page.
"""

import argparse
import html
import random
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder
from PIL import Image

from files import UserError
from infer import load_trained_model, stream_reply
from prompt import ask_about, open_picture
from rows import IMAGE_MARK
from scenes import draw_scene

EXAMPLES = Path(__file__).with_name("examples.txt")
MAX_PICTURES = 8  # in a question
SHOWN_SIDE = 384  # pixels; larger pictures are shown smaller, the model gets them as they are

# Gradio's own button there sends a picture to a public site.
STYLE = '<style>[class*="message-buttons"]:has([data-testid="download-link"]) {display: none}</style>'


def show_picture(picture: Image.Image) -> str:
    """A file for the page to show: upright, on white, as the model gets the picture."""
    shown = picture.copy()
    shown.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    return save_pil_to_cache(shown, get_upload_folder(), format="png")


def read_examples(path: Path = EXAMPLES) -> list[dict]:
    """The examples of the page: `picture;picture<tab>question` a line.

    A picture is a file beside the table, or five words of scenes.py, from which it is drawn.
    """
    examples = []
    for line in path.read_text(encoding="utf-8").splitlines():
        names, _, question = line.rpartition("\t")
        files = [
            show_picture(draw_scene(tuple(name.split()), random.Random(0), side=128))
            if len(name.split()) == 5
            else str(path.with_name(name.strip()))
            for name in filter(None, names.split(";"))
        ]
        examples.append({"text": question, "files": files})
    return examples


def read_question(question: dict) -> dict:
    """The message of what was typed and uploaded; raises UserError where it can't be asked."""
    if IMAGE_MARK in question["text"]:
        raise UserError(f"文字里不要写 {IMAGE_MARK}：上传的图片会放在文字前面。")
    if len(question["files"]) > MAX_PICTURES:
        raise UserError(f"一个问题最多 {MAX_PICTURES} 张图片，这里有 {len(question['files'])} 张。")
    pictures = []
    for path in question["files"]:
        try:
            pictures.append(open_picture(path))
        except UserError as error:
            raise UserError(f"图片 {Path(path).name} 不能用：{str(error).removeprefix(f'{path}: ')}") from None
    message = ask_about(pictures, question["text"].strip())
    return message | {"shown": [*({"path": show_picture(picture)} for picture in pictures), question["text"]]}


def show(said: list[dict]) -> list[dict]:
    """Messages as the page shows them: the pictures themselves in place of their marks."""
    return [{"role": message["role"], "content": message.get("shown", message["content"])} for message in said]


def stream_page(model, processor, history, system, settings, stop_event) -> Iterator[tuple]:
    """Yields (messages to show, messages that were said) while a reply grows; an error is shown but was not said."""
    messages = [{key: value for key, value in message.items() if key != "shown"} for message in history]
    messages = [{"role": "system", "content": system}, *messages] if system.strip() else messages
    shown, text = show(history), ""
    try:
        for piece in stream_reply(model, processor, messages, *settings, stop_event=stop_event):
            text += piece
            reply = {"role": "assistant", "content": text}
            yield [*shown, reply], [*history, reply]
    except Exception as error:
        failure = f"⚠️ 生成失败（{type(error).__name__}）：{error}"
        yield [*shown, {"role": "assistant", "content": failure}], history


class PageSessions:
    """What was said on each open page; Gradio calls its methods, on the page's events.

    Gradio's own State gets to know what a reply said only after the next question may have come.
    """

    def __init__(self, model, processor):
        self.model, self.processor = model, processor
        self.pages = defaultdict(lambda: SimpleNamespace(said=[], stop=threading.Event(), generating=threading.Lock()))

    def end_reply(self, request: gr.Request):
        page = self.pages[request.session_hash]
        page.stop.set()
        with page.generating:  # from here on nothing more of it can arrive
            return

    def change(self, request: gr.Request, said: list[dict]) -> list[dict]:
        page = self.pages[request.session_hash]
        page.said, page.stop = said, threading.Event()
        return show(said)

    def without_last(self, role: str, request: gr.Request) -> list[dict]:
        said = self.pages[request.session_hash].said
        return said[:-1] if said and said[-1]["role"] == role else said

    def ask(self, question: dict, request: gr.Request):
        """An empty question box, and the conversation; a question that got no reply makes room for the new one."""
        if not question["text"].strip() and not question["files"]:
            return {"text": "", "files": []}, show(self.pages[request.session_hash].said)
        try:
            message = read_question(question)
        except UserError as error:  # it stays in the box, to be mended; gr.Error would cover the box
            gr.Warning(html.escape(str(error)), title="没有发送")
            return gr.skip(), gr.skip()
        return {"text": "", "files": []}, self.change(request, [*self.without_last("user", request), message])

    def ask_again(self, request: gr.Request):
        return self.change(request, self.without_last("assistant", request))

    def reply(self, request: gr.Request, system: str, *settings):
        page = self.pages[request.session_hash]
        with page.generating:
            if page.stop.is_set() or not page.said or page.said[-1]["role"] != "user":
                return
            for shown, said in stream_page(self.model, self.processor, page.said, system, settings, page.stop):
                page.said = said
                yield shown

    def clear(self, request: gr.Request):
        return self.change(request, [])

    def forget(self, request: gr.Request):
        if page := self.pages.pop(request.session_hash, None):
            page.stop.set()


def build_demo(model, processor, title: str = "看图对话演示"):
    """A Gradio page to chat about pictures: `build_demo(...).launch()` serves it on 127.0.0.1.

    One reply is generated at a time, others queue. An error is shown in the chat and not sent with the next question.
    """
    sessions = PageSessions(model, processor)
    # Uploads are deleted after a day, and when the page ends.
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 86400)) as demo:
        gr.Markdown(f"# {title}")
        chatbot = gr.Chatbot(
            show_label=False, placeholder="请在下面输入问题，可以上传、拖入或粘贴图片，或点一个示例。", buttons=["copy"]
        )
        question = gr.MultimodalTextbox(
            placeholder="输入问题，按回车发送；图片可以有几张",
            show_label=False,
            file_types=["image"],
            file_count="multiple",
            submit_btn="发送",
            max_plain_text_length=100_000,
            autofocus=True,
        )
        with gr.Row():
            stop, again, clear = (gr.Button(label, size="md") for label in ("停止", "重新生成", "清空"))
        gr.Examples(read_examples(), question, label="示例问题")
        with gr.Accordion("设置", open=False):
            system = gr.Textbox("", label="系统提示", placeholder="例如：请用一句话回答。")
            with gr.Row():
                max_new_tokens = gr.Slider(1, 2048, 512, step=1, label="最大长度 (max_new_tokens)")
                temperature = gr.Slider(0, 2, 0.7, step=0.05, label="温度 (temperature)")
                top_p = gr.Slider(0.05, 1, 0.8, step=0.05, label="核采样 (top_p)")

        gr.HTML(STYLE, padding=False)
        settings = [system, max_new_tokens, temperature, top_p]
        asked = question.submit(sessions.end_reply).then(sessions.ask, question, [question, chatbot])
        asked_again = again.click(sessions.end_reply).then(sessions.ask_again, None, chatbot)
        for event in (asked, asked_again):
            event.then(sessions.reply, settings, chatbot, concurrency_id="model")
        stop.click(sessions.end_reply)
        gr.on([clear.click, chatbot.clear], sessions.end_reply).then(sessions.clear, None, chatbot)
        demo.unload(sessions.forget)
    return demo.queue(max_size=16)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model or of a LoRA adapter, or a hub id")
    parser.add_argument("--host", default="127.0.0.1", help="address of the page; 0.0.0.0 lets the whole network in")
    parser.add_argument("--port", type=int, default=7860, help="port of the page")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code that comes with the model")
    args = parser.parse_args(argv)
    try:
        model, processor = load_trained_model(args.model, args.trust_remote_code)
    except UserError as error:
        sys.exit(f"error: {error}")
    demo = build_demo(model, processor, title=f"与 {Path(args.model).name} 看图对话")
    demo.launch(server_name=args.host, server_port=args.port, footer_links=[], max_file_size="20mb")


if __name__ == "__main__":
    main()
