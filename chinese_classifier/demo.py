"""A page for a trained classifier: scores as bars, the words that decided, and whole tables.

    python demo.py output                     http://127.0.0.1:7860, this machine only
    python demo.py output --port 7861         on another port

The way of a text: page -> classify_text (predict_probabilities and explain of infer.py) -> page.
"""

import sys
import tempfile
from pathlib import Path

import gradio as gr

from infer import (
    MAX_EXPLAINED,
    classify_table,
    explain,
    load_trained_model,
    model_parser,
    predict_probabilities,
    rank_classes,
    read_texts,
)
from rows import UserError, write_csv

EXAMPLE_TEXTS = [
    "房间不干净，服务员态度也差，再也不来了。",
    "故事写得很感人，一口气读完，推荐给大家。",
    "青蒿素",
    "太极拳",
]


def scale_words(words: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """The weights as the page colours them: the strongest word has 1 or -1."""
    strongest = max((abs(weight) for _, weight in words), default=0) or 1
    return [(word, round(weight / strongest, 3)) for word, weight in words]


def build_demo(model, tokenizer, title: str = "中文文本分类演示"):
    """A Gradio page for the classifier: `build_demo(...).launch()` serves it on 127.0.0.1."""

    def classify_text(text: str):
        if not text.strip():
            raise gr.Error("请先输入文本。")
        (probabilities,), (cut,) = predict_probabilities(model, tokenizer, [text])
        notes = [f"文本超过 {tokenizer.model_max_length} 个词元，后面的没有读。"] if cut else []
        notes += [f"只解释前 {MAX_EXPLAINED} 个字。"] if len(text) > MAX_EXPLAINED else []
        return dict(rank_classes(model, probabilities)), scale_words(explain(model, tokenizer, text)), "".join(notes)

    def classify_upload(file: str | None, text_column: str, progress=gr.Progress()):  # noqa: B008  (Gradio's way)
        if file is None:
            raise gr.Error("请先上传一个 .csv 或 .tsv 文件。")
        done = 0

        def show(rows: int):
            nonlocal done
            done += rows
            progress((done, len(table)), desc="分类中", unit="行")

        try:
            table = read_texts(file, text_column.strip())
        except UserError as error:
            raise gr.Error(str(error).replace(file, Path(file).name)) from None
        result = classify_table(model, tokenizer, table, text_column.strip(), on_progress=show)
        output = Path(tempfile.mkdtemp(), f"{Path(file).stem}_predicted.csv")
        write_csv(result, output)
        predicted, _, cut = (result[name] for name in list(result)[-3:])
        counts = predicted.replace("", "（没有文本）").value_counts()
        summary = "，".join(f"{label} {count} 行" for label, count in counts.items())
        summary += f"；{cut.sum()} 行太长，后面的没有读" if cut.any() else ""
        return f"共 {len(result)} 行：{summary}", result.head(20), str(output)

    with gr.Blocks(title=title, analytics_enabled=False) as demo:
        gr.Markdown(f"# {title}")
        with gr.Tab("一段文本"):
            text = gr.Textbox(label="文本", placeholder="输入文本，按回车分类", autofocus=True)
            with gr.Row():
                send = gr.Button("分类", variant="primary")
                clear = gr.Button("清空")
            gr.Examples(EXAMPLE_TEXTS, text, label="示例")
            scores = gr.Label(label="各类别的概率", num_top_classes=10)
            words = gr.HighlightedText(
                label="起决定作用的词（红：支持这个类别；蓝：反对）", color_map={}, show_legend=False
            )
            note = gr.Markdown()
        with gr.Tab("整个表格"):
            with gr.Row():
                upload = gr.File(label="表格（.csv / .tsv，UTF-8 或 GB18030）", file_types=[".csv", ".tsv"])
                text_column = gr.Textbox("text", label="文本所在的列")
            start = gr.Button("开始", variant="primary")
            summary = gr.Markdown()
            head = gr.Dataframe(label="前 20 行")
            download = gr.File(label="下载结果")
        gr.on([text.submit, send.click], classify_text, text, [scores, words, note], concurrency_id="model")
        clear.click(lambda: ("", None, None, ""), None, [text, scores, words, note])
        start.click(classify_upload, [upload, text_column], [summary, head, download], concurrency_id="model")
    return demo.queue(max_size=16)


def main(argv: list[str] | None = None) -> None:
    parser = model_parser(__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address of the page; 0.0.0.0 lets the whole network in")
    parser.add_argument("--port", type=int, default=7860, help="port of the page")
    args = parser.parse_args(argv)
    try:
        model, tokenizer = load_trained_model(args.model, args.trust_remote_code)
    except UserError as error:
        sys.exit(str(error))
    demo = build_demo(model, tokenizer, title=f"文本分类：{Path(args.model).resolve().name}")
    demo.launch(server_name=args.host, server_port=args.port, footer_links=[])


if __name__ == "__main__":
    main()
