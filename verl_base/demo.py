"""A page for one question to the model before and after training: several samples of each, with their rewards.

python demo.py output                      http://127.0.0.1:7860, this machine only
python demo.py output --port 7861          on another port
"""

import argparse

import gradio as gr
import pandas as pd

from data import Prompt
from infer import load_run, sample_scored
from rows import UserError

QUESTIONS = [["三十七加二十五等于几？", "六十二"], ["九十二减四十八等于几？", "四十四"], ["五加八等于几？", "十三"]]
COLUMNS = {"completion": "回复", "score": "得分", "acc": "答对", "format": "格式", "work": "步骤"}


def as_table(rows: list[dict]) -> tuple[pd.DataFrame, str]:
    """The samples with all that the reward function says of them, and their means in words."""
    table = pd.DataFrame(rows).rename(columns=COLUMNS).round(2)
    right = f"，答对 {table['答对'].sum():.0f} 条" if "答对" in table else ""
    return table, f"{len(rows)} 条回复{right}，平均得分 {table['得分'].mean():.2f}"


def build_demo(before, after, reward_function, max_new_tokens: int, title: str = "强化学习前后对比"):
    """The Gradio page.

    Args:
        before, after: pairs of model and tokenizer.
        reward_function: judges the completions, as in training (a `RewardFunction`).
        max_new_tokens: a completion is cut off there and counts as not finished.
    """

    def ask(question: str, ground_truth: str, rule: str, n: int, temperature: float):
        if not question.strip():
            raise gr.Error("请先写一个问题。")
        if not ground_truth.strip():
            raise gr.Error("请写出标准答案，否则无法打分。")
        if len(question) > 500:
            raise gr.Error("问题太长了，请控制在 500 字以内。")
        messages, source = [{"role": "user", "content": question.strip()}], "arithmetic" if rule == "算术" else ""
        prompt, shown = Prompt(messages, ground_truth.strip(), source, source="页面"), []
        for model, tokenizer in (before, after):
            try:
                rows = sample_scored(model, tokenizer, prompt, reward_function, max_new_tokens, int(n), temperature)
                shown += as_table(rows)
            except UserError as error:
                raise gr.Error(str(error)) from None
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
                        headers=list(COLUMNS.values()),
                        interactive=False,
                        wrap=True,
                        column_widths=["48%", *["13%"] * 4],
                    )
                    outputs += [table, summary]
        gr.Examples(QUESTIONS, [question, ground_truth], label="示例")
        inputs = [question, ground_truth, rule, n, temperature]
        running = gr.on([send.click, question.submit], ask, inputs, outputs, concurrency_limit=1)
        stop.click(None, cancels=[running])
        clear.add([question, ground_truth, *outputs])
    return demo


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the output folder of a run")
    parser.add_argument("--host", default="127.0.0.1", help="address of the page; 0.0.0.0 lets the whole network in")
    parser.add_argument("--port", type=int, default=7860, help="port of the page")
    parser.add_argument("--reward_function", help="file.py:function; the run's own unless given")
    parser.add_argument("--reward_timeout", type=float, default=300.0, help="seconds that it has for a completion")
    args = parser.parse_args(argv)
    models, reward_function, max_new_tokens = load_run(args.model, args.reward_function, args.reward_timeout)
    demo = build_demo(models["before"], models["after"], reward_function, max_new_tokens)
    demo.launch(server_name=args.host, server_port=args.port, footer_links=[])


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
