"""A chat page for a trained model: streamed replies, stop, again, clear, and the settings of the generation.

    python demo.py output_zero2                     on http://127.0.0.1:7860
    python demo.py output_zero2 --host 0.0.0.0      for the whole network

The way of a question: page -> ask -> stream_page (stream_reply of infer.py) -> page.
"""

# The same in every recipe that has it: python tests/copies.py --fix FILE

import argparse
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import gradio as gr

from infer import load_trained_model, stream_reply
from rows import UserError

EXAMPLES = Path(__file__).with_name("examples.txt").read_text(encoding="utf-8").splitlines()


def stream_page(model, tokenizer, history, system, settings, stop_event) -> Iterator[tuple]:
    """Yields (messages to show, messages that were said) while a reply grows; an error is shown but was not said."""
    messages = [{"role": "system", "content": system}, *history] if system.strip() else history
    text = ""
    try:
        for piece in stream_reply(model, tokenizer, messages, *settings, stop_event=stop_event):
            text += piece
            said = [*history, {"role": "assistant", "content": text}]
            yield said, said
    except Exception as error:
        failure = f"⚠️ 生成失败（{type(error).__name__}）：{error}"
        yield [*history, {"role": "assistant", "content": failure}], history


class PageSessions:
    """What was said on each open page; Gradio calls its methods, on the page's events.

    Gradio's own State gets to know what a reply said only after the next question may have come.
    """

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.pages = defaultdict(lambda: SimpleNamespace(said=[], stop=threading.Event(), generating=threading.Lock()))

    def end_reply(self, request: gr.Request):
        page = self.pages[request.session_hash]
        page.stop.set()
        with page.generating:  # from here on nothing more of it can arrive
            return

    def change(self, request: gr.Request, said: list[dict]) -> list[dict]:
        page = self.pages[request.session_hash]
        page.said, page.stop = said, threading.Event()
        return said

    def without_last(self, role: str, request: gr.Request) -> list[dict]:
        said = self.pages[request.session_hash].said
        return said[:-1] if said and said[-1]["role"] == role else said

    def ask(self, question: str, request: gr.Request):
        """An empty question box, and the conversation; a question that got no reply makes room for the new one."""
        if not question.strip():
            return "", self.pages[request.session_hash].said
        return "", self.change(request, [*self.without_last("user", request), {"role": "user", "content": question}])

    def ask_again(self, request: gr.Request):
        return self.change(request, self.without_last("assistant", request))

    def reply(self, request: gr.Request, system: str, *settings):
        page = self.pages[request.session_hash]
        with page.generating:
            if page.stop.is_set() or not page.said or page.said[-1]["role"] != "user":
                return
            for shown, said in stream_page(self.model, self.tokenizer, page.said, system, settings, page.stop):
                page.said = said
                yield shown

    def clear(self, request: gr.Request):
        return self.change(request, [])

    def forget(self, request: gr.Request):
        if page := self.pages.pop(request.session_hash, None):
            page.stop.set()


def build_demo(model, tokenizer, title: str = "中文对话演示"):
    """A Gradio page to chat with the model: `build_demo(...).launch()` serves it on 127.0.0.1.

    One reply is generated at a time, others queue. An error is shown in the chat and not sent with the next question.
    """
    sessions = PageSessions(model, tokenizer)
    with gr.Blocks(title=title, analytics_enabled=False) as demo:
        gr.Markdown(f"# {title}")
        chatbot = gr.Chatbot(show_label=False, placeholder="请在下面输入问题，或点一个示例。", buttons=["copy"])
        with gr.Row(equal_height=True):
            question = gr.Textbox(placeholder="输入问题，按回车发送", show_label=False, scale=8, autofocus=True)
            send = gr.Button("发送", variant="primary", min_width=80)
        with gr.Row():
            stop, again, clear = (gr.Button(label, size="md") for label in ("停止", "重新生成", "清空"))
        gr.Examples(EXAMPLES, question, label="示例问题")
        with gr.Accordion("设置", open=False):
            system = gr.Textbox("", label="系统提示", placeholder="例如：你是一个乐于助人的中文助手。")
            with gr.Row():
                max_new_tokens = gr.Slider(1, 2048, 512, step=1, label="最大长度 (max_new_tokens)")
                temperature = gr.Slider(0, 2, 0.7, step=0.05, label="温度 (temperature)")
                top_p = gr.Slider(0.05, 1, 0.8, step=0.05, label="核采样 (top_p)")

        settings = [system, max_new_tokens, temperature, top_p]
        asked = gr.on([question.submit, send.click], sessions.end_reply).then(
            sessions.ask, question, [question, chatbot]
        )
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
        model, tokenizer = load_trained_model(args.model, args.trust_remote_code)
    except UserError as error:
        sys.exit(f"error: {error}")
    demo = build_demo(model, tokenizer, title=f"与 {Path(args.model).name} 对话")
    demo.launch(server_name=args.host, server_port=args.port, footer_links=[])


if __name__ == "__main__":
    main()
