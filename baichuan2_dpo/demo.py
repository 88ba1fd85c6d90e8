"""A page that shows what the preference training changed: answers before and after it, and what it makes of a pair.

    python demo.py output_zero2                      on http://127.0.0.1:7860
    python demo.py my_model --before my_sft_model    what the training began with, where the folder doesn't say it
    python demo.py output_zero2 --host 0.0.0.0       for the whole network

The way of a question: page -> ask -> reply (stream_reply of infer.py, first before, then after) -> page. The way of a
pair: page -> score -> score_pair (of compare.py) -> page.
"""

import argparse
import html
import json
import sys
import threading
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import gradio as gr

from compare import COLUMNS, REPLIES, describe_scores, find_before, load_models, model_of, score_pair
from infer import stream_reply
from rows import UserError

RECIPE = Path(__file__).parent
EXAMPLES = (RECIPE / "examples.txt").read_text(encoding="utf-8").splitlines()
PAIRS = (RECIPE / "data/validation/unseen.jsonl").read_text(encoding="utf-8").splitlines()[:3]


class PageSessions:
    """What was said in the two columns of each open page; Gradio calls its methods, on the page's events.

    Gradio's own State gets to know what a reply said only after the next question may have come.
    """

    def __init__(self, before, after, tokenizer):
        self.before, self.after, self.tokenizer = before, after, tokenizer
        # PEFT switches an adapter off for whoever uses the model, and a reply that its page left may still go on.
        self.in_use = threading.Lock()
        self.pages = defaultdict(
            lambda: SimpleNamespace(said=[[], []], stop=threading.Event(), generating=threading.Lock())
        )

    def end_reply(self, request: gr.Request):
        page = self.pages[request.session_hash]
        page.stop.set()
        with page.generating:  # from here on nothing more of it can arrive
            return

    def change(self, request: gr.Request, said: list[list[dict]]) -> list[list[dict]]:
        page = self.pages[request.session_hash]
        page.said, page.stop = said, threading.Event()
        return said

    def without_last(self, role: str, request: gr.Request) -> list[list[dict]]:
        columns = self.pages[request.session_hash].said
        return [said[:-1] if said and said[-1]["role"] == role else said for said in columns]

    def ask(self, question: str, request: gr.Request):
        """An empty question box, and both columns; a question that got no reply makes room for the new one."""
        if not question.strip():
            return "", *self.pages[request.session_hash].said
        asked = [[*said, {"role": "user", "content": question}] for said in self.without_last("user", request)]
        return "", *self.change(request, asked)

    def ask_again(self, request: gr.Request):
        return self.change(request, self.without_last("assistant", request))

    def stream(self, column: int, messages: list[dict], settings, stop_event: threading.Event):
        with self.in_use, model_of(column, self.before, self.after) as model:
            yield from stream_reply(model, self.tokenizer, messages, *settings, stop_event=stop_event)

    def reply(self, request: gr.Request, system: str, *settings):
        """Both columns while the replies grow, one after the other; an error is shown but was not said."""
        page = self.pages[request.session_hash]
        start = [{"role": "system", "content": system}] if system.strip() else []
        with page.generating:
            shown = list(page.said)
            for column in (0, 1):
                asked, text = page.said[column], ""
                if page.stop.is_set() or not asked or asked[-1]["role"] != "user":
                    continue
                try:
                    for piece in self.stream(column, [*start, *asked], settings, page.stop):
                        text += piece
                        shown[column] = page.said[column] = [*asked, {"role": "assistant", "content": text}]
                        yield tuple(shown)
                except Exception as error:
                    failure = f"⚠️ 生成失败（{type(error).__name__}）：{error}"
                    shown[column], page.said[column] = [*asked, {"role": "assistant", "content": failure}], asked
                    yield tuple(shown)

    def clear(self, request: gr.Request):
        return self.change(request, [[], []])

    def forget(self, request: gr.Request):
        if page := self.pages.pop(request.session_hash, None):
            page.stop.set()

    def score(self, prompt: str, first: str, second: str, beta: float | None) -> str:
        try:
            with self.in_use:
                scores = score_pair(self.before, self.after, self.tokenizer, prompt, (first, second), beta)
            return describe_scores(scores)
        except Exception as error:
            kind = "" if isinstance(error, UserError) else f"打分失败（{type(error).__name__}）："
            return f"⚠️ {kind}{html.escape(str(error))}"


def add_comparison(sessions: PageSessions) -> None:
    """The tab of two conversations."""
    with gr.Row():
        columns = [gr.Chatbot(label=label, height=420, buttons=["copy"]) for label in COLUMNS]
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
    asked = gr.on([question.submit, send.click], sessions.end_reply).then(sessions.ask, question, [question, *columns])
    asked_again = again.click(sessions.end_reply).then(sessions.ask_again, None, columns)
    for event in (asked, asked_again):
        event.then(sessions.reply, settings, columns, concurrency_id="model")
    stop.click(sessions.end_reply)
    gr.on([clear.click, *(column.clear for column in columns)], sessions.end_reply).then(sessions.clear, None, columns)


def add_scoring(sessions: PageSessions) -> None:
    """The tab of one pair."""
    prompt = gr.Textbox(label="问题")
    with gr.Row():
        replies = [gr.Textbox(label=label, lines=3) for label in REPLIES]
    beta = gr.Number(0.1, label="β", step=0.05, info="奖励 = β ×（训练后的对数概率 − 训练前的对数概率）")
    button = gr.Button("打分", variant="primary")
    scores = gr.Markdown()
    gr.Examples([list(json.loads(line).values()) for line in PAIRS], [prompt, *replies], label="示例")
    button.click(sessions.score, [prompt, *replies, beta], scores, concurrency_id="model")


def build_demo(before, after, tokenizer, title: str = "偏好训练前后对比"):
    """A Gradio page on a model before and after its preference training; `.launch()` serves it on 127.0.0.1.

    One reply is generated, or one pair scored, at a time, on whatever page; others queue. `before` None stands for
    `after` with its adapter switched off.
    """
    sessions = PageSessions(before, after, tokenizer)
    with gr.Blocks(title=title, analytics_enabled=False) as demo:
        gr.Markdown(f"# {title}")
        with gr.Tab("对比"):
            add_comparison(sessions)
        with gr.Tab("打分"):
            add_scoring(sessions)
        demo.unload(sessions.forget)
    return demo.queue(max_size=16)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model or of a LoRA adapter, as train_zero2.sh has written it")
    parser.add_argument("--before", help="model or adapter that the training began with; by default the folder says it")
    parser.add_argument("--host", default="127.0.0.1", help="address of the page; 0.0.0.0 lets the whole network in")
    parser.add_argument("--port", type=int, default=7860, help="port of the page")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code that comes with the model")
    args = parser.parse_args(argv)
    try:
        before = args.before or find_before(args.model)
        models = load_models(args.model, before, args.trust_remote_code)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"before: {before or 'the same model, its adapter switched off'}; after: {args.model}")
    demo = build_demo(*models, title=f"{Path(args.model).name}：偏好训练前后对比")
    demo.launch(server_name=args.host, server_port=args.port, footer_links=[])


if __name__ == "__main__":
    main()
