"""A page for a trained model: it writes a text on, with its settings, and shows what each character of a text costs.

    python demo.py output_zero2                     on http://127.0.0.1:7860
    python demo.py output_zero2 --host 0.0.0.0      for the whole network

The way of a text: page -> continue_on_page (stream_continuation of infer.py) -> page -> character_bits -> heat map.
"""

import argparse
import html
import sys
import threading
from collections.abc import Iterator

import gradio as gr

from infer import character_bits, load_trained_model, stream_continuation
from rows import UserError

BEGINNINGS = ["新华社北京１月１日电", "本报讯　记者从会上获悉，", "话说天下大势，", "画蛇添足："]
MOST_BITS = 16  # of a character in full colour


def heat_map(costs: list[tuple[str, float]]) -> str:
    """Each character on a ground that is the redder the more bits it costs; the bits stand in its title."""
    if not costs:
        return ""
    spans = []
    for character, bits in costs:
        ground = f"rgba(220, 40, 40, {min(bits / MOST_BITS, 1):.2f})"
        shown = "↵<br>" if character == "\n" else html.escape(character)
        spans.append(f'<span title="{bits:.2f} bits" style="background: {ground}">{shown}</span>')
    text, total = "".join(character for character, _ in costs), sum(bits for _, bits in costs)
    summary = f"{total / len(text.encode()):.3f} 比特/字节，每字困惑度 {2 ** (total / len(text)):.1f}"
    return f"<p style='line-height: 1.8'>{''.join(spans)}</p><p>{summary}</p>"


def continue_on_page(
    model, tokenizer, text: str, settings: dict, stop_event: threading.Event
) -> Iterator[tuple[str, str]]:
    """Yields the text as it grows, and beside it what went wrong, so that no error is ever continued as text."""
    yield text, ""
    try:
        for piece in stream_continuation(model, tokenizer, text, stop_event, **settings):
            text += piece
            yield text, ""
    except UserError as error:
        yield text, f"⚠️ {error}"
    except Exception as error:
        yield text, f"⚠️ 生成失败（{type(error).__name__}）：{error}"


def create_page(model, tokenizer, name: str) -> gr.Blocks:
    """The page; a click on stop ends the continuation within a token, of this page alone."""
    events: dict[str, threading.Event] = {}

    def write(text, max_new_tokens, temperature, top_p, top_k, repetition_penalty, request: gr.Request):
        events[request.session_hash] = threading.Event()
        settings = {"max_new_tokens": int(max_new_tokens), "temperature": temperature, "top_p": top_p}
        settings |= {"top_k": int(top_k), "repetition_penalty": repetition_penalty}
        yield from continue_on_page(model, tokenizer, text, settings, events[request.session_hash])

    def score(words: str) -> tuple[str, str]:
        return "", heat_map(character_bits(model, tokenizer, words))

    def stop(request: gr.Request):
        if request.session_hash in events:
            events[request.session_hash].set()

    def forget(request: gr.Request):
        stop(request)
        events.pop(request.session_hash, None)

    with gr.Blocks(title=name, analytics_enabled=False) as page:
        gr.Markdown(f"# {name}")
        text = gr.Textbox(BEGINNINGS[0], lines=6, label="开头，接着写")
        gr.Examples(BEGINNINGS, text, label="示例开头")
        with gr.Row():
            settings = [
                gr.Slider(1, 256, 64, step=1, label="最大长度 (max_new_tokens)"),
                gr.Slider(0, 2, 0.8, step=0.05, label="温度 (temperature)"),
                gr.Slider(0.05, 1, 0.9, step=0.05, label="核采样 (top_p)"),
            ]
        with gr.Row():
            settings += [
                gr.Slider(0, 200, 0, step=1, label="只在最可能的几个里取 (top_k)，0：不限"),
                gr.Slider(1, 2, 1, step=0.05, label="重复惩罚 (repetition_penalty)，1：没有"),
            ]
        with gr.Row():
            write_button, stop_button = gr.Button("续写", variant="primary"), gr.Button("停止")
            score_button = gr.Button("逐字困惑度")
        message, heat = gr.Markdown(), gr.HTML()
        write_button.click(write, [text, *settings], [text, message])
        stop_button.click(stop, queue=False)
        score_button.click(score, text, [message, heat])
        page.unload(forget)
    return page


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a trained model")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for the whole network")
    parser.add_argument("--port", type=int, default=7860, help="of the page")
    args = parser.parse_args(argv)
    try:
        model, tokenizer = load_trained_model(args.model)
    except UserError as error:
        sys.exit(f"error: {error}")
    page = create_page(model, tokenizer, args.model).queue()
    page.launch(server_name=args.host, server_port=args.port, footer_links=[])


if __name__ == "__main__":
    main()
