"""A chat page that shows what the adapter changed: each question is answered with it switched off and on, side by side.

    python demo.py output_zero2                     on http://127.0.0.1:7860
    python demo.py output_zero2 --host 0.0.0.0      for the whole network

The way of a question: page -> ask -> reply (stream_reply of infer.py, first without the adapter, then with it) -> page.
"""

import argparse
import sys
import threading
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import gradio as gr

from infer import check_model_path, find_base_model, load_trained_model, stream_reply
from rows import UserError

COLUMNS = ("原来的模型（适配器关）", "训练之后（适配器开）")
EXAMPLES = ["你是谁？", "谁开发了你？", "你的偶像是谁？", "明天彩票开什么号？", "爱因斯坦是谁？", "法国的首都是哪里？"]


class PageSessions:
    """What was said in the two columns of each open page; Gradio calls its methods, on the page's events.

    Gradio's own State gets to know what a reply said only after the next question may have come.
    """

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        # PEFT switches an adapter off for whoever uses the model, and a reply that its page left may still go on.
        self.adapter_switch = threading.Lock()
        self.pages = defaultdict(
            lambda: SimpleNamespace(said=[[], []], stop=threading.Event(), generating=threading.Lock())
        )

    def end_reply(self, request: gr.Request):
        page = self.pages[request.session_hash]
        page.stop.set()
        with page.generating:  # from here on nothing more of it can arrive
            return

    def ask(self, question: str, request: gr.Request):
        """An empty question box, and both columns; a question that got no reply makes room for the new one."""
        page = self.pages[request.session_hash]
        if question.strip():
            page.stop = threading.Event()
            answered = [said[:-1] if said and said[-1]["role"] == "user" else said for said in page.said]
            page.said = [[*said, {"role": "user", "content": question}] for said in answered]
        return "", *page.said

    def stream(self, adapter: bool, messages: list[dict], settings, stop_event: threading.Event):
        with self.adapter_switch, nullcontext() if adapter else self.model.disable_adapter():
            yield from stream_reply(self.model, self.tokenizer, messages, *settings, stop_event=stop_event)

    def reply(self, request: gr.Request, system: str, *settings):
        """Both columns while the replies grow, one after the other; an error is shown but was not said."""
        page = self.pages[request.session_hash]
        start = [{"role": "system", "content": system}] if system.strip() else []
        with page.generating:
            shown = list(page.said)
            for column, adapter in enumerate((False, True)):
                asked, text = page.said[column], ""
                if page.stop.is_set() or not asked or asked[-1]["role"] != "user":
                    continue
                try:
                    for piece in self.stream(adapter, [*start, *asked], settings, page.stop):
                        text += piece
                        shown[column] = page.said[column] = [*asked, {"role": "assistant", "content": text}]
                        yield tuple(shown)
                except Exception as error:
                    failure = f"⚠️ 生成失败（{type(error).__name__}）：{error}"
                    shown[column], page.said[column] = [*asked, {"role": "assistant", "content": failure}], asked
                    yield tuple(shown)

    def clear(self, request: gr.Request):
        page = self.pages[request.session_hash]
        page.said = [[], []]
        return tuple(page.said)

    def forget(self, request: gr.Request):
        if page := self.pages.pop(request.session_hash, None):
            page.stop.set()


def build_demo(model, tokenizer, title: str = "训练前后对比"):
    """A Gradio page to chat with a LoRA model and its base: `build_demo(...).launch()` serves it on 127.0.0.1.

    Each column has a history of its own. One reply is generated at a time, on whatever page; others queue.
    """
    sessions = PageSessions(model, tokenizer)
    with gr.Blocks(title=title, analytics_enabled=False) as demo:
        gr.Markdown(f"# {title}")
        with gr.Row():
            columns = [gr.Chatbot(label=label, height=420, buttons=["copy"]) for label in COLUMNS]
        with gr.Row(equal_height=True):
            question = gr.Textbox(placeholder="输入问题，按回车发送", show_label=False, scale=8, autofocus=True)
            send = gr.Button("发送", variant="primary", min_width=80)
        with gr.Row():
            stop, clear = (gr.Button(label, size="md") for label in ("停止", "清空"))
        gr.Examples(EXAMPLES, question, label="示例问题")
        with gr.Accordion("设置", open=False):
            system = gr.Textbox("", label="系统提示", placeholder="例如：你是一个乐于助人的中文助手。")
            with gr.Row():
                max_new_tokens = gr.Slider(1, 2048, 512, step=1, label="最大长度 (max_new_tokens)")
                temperature = gr.Slider(0, 2, 0.7, step=0.05, label="温度 (temperature)")
                top_p = gr.Slider(0.05, 1, 0.8, step=0.05, label="核采样 (top_p)")

        settings = [system, max_new_tokens, temperature, top_p]
        asked = gr.on([question.submit, send.click], sessions.end_reply).then(
            sessions.ask, question, [question, *columns]
        )
        asked.then(sessions.reply, settings, columns, concurrency_id="model")
        stop.click(sessions.end_reply)
        gr.on([clear.click, *(column.clear for column in columns)], sessions.end_reply).then(
            sessions.clear, None, columns
        )
        demo.unload(sessions.forget)
    return demo.queue(max_size=16)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a LoRA adapter")
    parser.add_argument("--host", default="127.0.0.1", help="address of the page; 0.0.0.0 lets the whole network in")
    parser.add_argument("--port", type=int, default=7860, help="port of the page")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code that comes with the model")
    args = parser.parse_args(argv)
    try:
        check_model_path(args.model)
        if find_base_model(args.model) is None:
            raise UserError(
                f"{args.model}: is no LoRA adapter, so there is no base model to show beside it. Give the folder that "
                f"train_zero2.sh has written; a full model is asked in the terminal: python infer.py {args.model}"
            )
        model, tokenizer = load_trained_model(args.model, args.trust_remote_code)
    except UserError as error:
        sys.exit(f"error: {error}")
    demo = build_demo(model, tokenizer, title=f"{Path(args.model).name}：训练前后对比")
    demo.launch(server_name=args.host, server_port=args.port, footer_links=[])


if __name__ == "__main__":
    main()
