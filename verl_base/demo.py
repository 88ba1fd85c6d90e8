"""The page: one question to the model before and after training, several samples of each, with their rewards."""

import gradio as gr

from infer import sample_scored

QUESTIONS = [["三十七加二十五等于几？", "六十二"], ["九十二减四十八等于几？", "四十四"], ["五加八等于几？", "十三"]]
HEADERS = ["回复", "得分", "答对", "格式"]


def as_table(rows: list[dict]) -> tuple[list[list], str]:
    """The samples as a table, and their means in words."""
    table = [
        [row["reply"], round(row["score"], 2), "是" if row["acc"] else "否", "是" if row["format"] else "否"]
        for row in rows
    ]
    right = sum(row["acc"] for row in rows)
    mean = sum(row["score"] for row in rows) / len(rows)
    return table, f"{len(rows)} 条回复，答对 {right:.0f} 条，平均得分 {mean:.2f}"


def build_comparison(before, after, title: str = "强化学习前后对比"):
    """The Gradio page.

    Args:
        before, after: pairs of model and tokenizer.
    """

    def ask(question: str, ground_truth: str, rule: str, n: int, temperature: float):
        if not question.strip():
            raise gr.Error("请先写一个问题。")
        if not ground_truth.strip():
            raise gr.Error("请写出标准答案，否则无法打分。")
        if len(question) > 500:
            raise gr.Error("问题太长了，请控制在 500 字以内。")
        messages, source = [{"role": "user", "content": question.strip()}], "arithmetic" if rule == "算术" else ""
        shown = []
        for model, tokenizer in (before, after):
            rows = sample_scored(model, tokenizer, messages, ground_truth.strip(), source, int(n), temperature)
            shown += as_table(rows)
        return shown

    with gr.Blocks(title=title) as demo:
        gr.Markdown(f"# {title}\n同一个问题，分别让训练前后的模型各采样几次，并用奖励函数逐条打分。")
        with gr.Row():
            question = gr.Textbox(label="问题", placeholder="例如：三十七加二十五等于几？", scale=3)
            ground_truth = gr.Textbox(label="标准答案", placeholder="六十二")
            rule = gr.Radio(["算术", "完全一致"], value="算术", label="打分规则")
        with gr.Row():
            n = gr.Slider(1, 16, value=8, step=1, label="采样条数")
            temperature = gr.Slider(0.1, 2.0, value=1.0, step=0.1, label="温度")
        with gr.Row():
            send = gr.Button("采样并打分", variant="primary")
            stop = gr.Button("停止")
            clear = gr.ClearButton(value="清空")
        with gr.Row():
            outputs = []
            for name in ("训练前", "训练后"):
                with gr.Column():
                    gr.Markdown(f"## {name}")
                    summary = gr.Markdown()
                    table = gr.Dataframe(
                        headers=HEADERS, interactive=False, wrap=True, column_widths=["61%", "13%", "13%", "13%"]
                    )
                    outputs += [table, summary]
        gr.Examples(QUESTIONS, [question, ground_truth])
        inputs = [question, ground_truth, rule, n, temperature]
        running = gr.on([send.click, question.submit], ask, inputs, outputs, concurrency_limit=1)
        stop.click(None, cancels=[running])
        clear.add([question, ground_truth, *outputs])
    return demo
