"""Asking before and after: the command line, the page in headless Chromium, the notebooks."""

import functools
import json
import os
import shutil
import socket
from pathlib import Path

import gradio
import nbformat
import pytest
from nbclient import NotebookClient

import demo
from conftest import RECIPE, make_policy
from data import Prompt
from infer import load_trained_model, main, read_results, sample_scored
from reward_manager import load_reward_function
from rows import UserError

CHROMIUM = shutil.which("chromium")
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync"


@pytest.fixture(scope="module")
def output(tmp_path_factory, policy_folder, data_file, reward_file) -> str:
    """What a run leaves behind: another policy, and a history that rises."""
    folder = tmp_path_factory.mktemp("output")
    make_policy(folder, seed=1)
    before, after = ({"step": step, "pass@1": right, "pass@2": right + 0.1} for step, right in ((0, 0.3), (2, 0.8)))
    steps = [
        {"step": step, "reward": 0.2 * step, "kl": 0.01, "entropy": 1.0, "completion_length": 9.0} for step in (1, 2)
    ]
    history = [before, *({**row, "zero_variance_groups": 1} for row in steps), after]
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
    shutil.copy(data_file, folder / "validation.jsonl")
    results = {"model": policy_folder, "reward_function": reward_file, "max_response_length": 64}
    results["trust_remote_code"] = False
    (folder / "train_results.json").write_text(json.dumps({**results, "before": before, "after": after}))
    return str(folder)


def test_command_line_asks_both_models(output, capsys, tmp_path):
    main([output, "--n", "2", "--first", "2"])  # what the run was measured on, judged by its own function
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.endswith("[八]")] == ["一加一等于几？  [八]", "一加二等于几？  [八]"]
    (tmp_path / "my_rewards.py").write_text("def score(solution_str, ground_truth, **_):\n    return 7.25\n")
    own = ["--reward_function", f"{tmp_path}/my_rewards.py:score"]
    main([output, "--question", "一加二等于几？", "--ground_truth", "三", "--n", "3", *own])
    lines = capsys.readouterr().out.splitlines()
    assert "一加二等于几？  [三]" in lines and sum(line.endswith("[7.25]") for line in lines) > 2
    assert [line.split(":")[0].strip() for line in lines if "mean score" in line] == ["before", "after"]
    assert sum(int(line.split(" x ")[0]) for line in lines if " x " in line and line.endswith("]")) == 6
    (tmp_path / "my_rewards.py").write_text("import re\ndef score(**_):\n    re.fullmatch('(x+x+)+y', 'x' * 40)\n")
    with pytest.raises(UserError, match="TimeoutError: no score after 0.5 seconds"):
        main([output, "--question", "一", "--n", "1", *own, "--reward_timeout", "0.5"])


def test_samples_are_judged_by_the_reward_function(output, tokenizer):
    Path(output, "generation_config.json").write_text(json.dumps({"do_sample": True, "top_k": 1, "top_p": 0.001}))
    model, _ = load_trained_model(output)
    prompt = Prompt([{"role": "user", "content": "一加二等于几？"}], "三", "arithmetic", "here")
    reward_function = load_reward_function(f"{RECIPE}/rewards.py:compute_score")
    rows = sample_scored(model, tokenizer, prompt, reward_function, max_new_tokens=64, n=4)
    assert len({row["completion"] for row in rows}) == 4  # of all tokens, whatever the folder recommends
    assert all({"completion", "score", "acc", "format"} <= set(row) for row in rows)
    with pytest.raises(UserError, match="no train_results.json there"):
        read_results(str(RECIPE / "tests"))
    with pytest.raises(UserError, match="no trained model there"):
        load_trained_model(str(RECIPE / "tests"))


@pytest.mark.skipif(
    CHROMIUM is None and os.environ.get("CI") != "true", reason="no chromium on this machine (apt-get install chromium)"
)
def test_page_shows_both_models_and_errors(output, tmp_path, monkeypatch):
    from playwright.sync_api import sync_playwright

    with socket.create_server(("127.0.0.1", 0)) as free:
        address, port = f"http://127.0.0.1:{free.getsockname()[1]}/", str(free.getsockname()[1])
    in_background = functools.partialmethod(gradio.Blocks.launch, prevent_thread_lock=True, quiet=True)
    monkeypatch.setattr(gradio.Blocks, "launch", in_background)
    demo.main([output, "--port", port, "--reward_function", f"{RECIPE}/rewards.py:compute_score"])
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        page = browser.new_page(viewport={"width": 1200, "height": 1000}, locale="zh-CN")
        page.set_default_timeout(120_000)  # other tests run beside this one
        elsewhere = []
        page.on(
            "request",
            lambda request: request.url.startswith((address, "data:", "blob:")) or elsewhere.append(request.url),
        )
        page.goto(address)
        page.get_by_role("button", name="采样并打分").click()
        page.get_by_text("请先写一个问题。").wait_for()
        page.get_by_label("问题").fill("一加二等于几？")
        page.get_by_role("button", name="采样并打分").click()
        page.get_by_text("请写出标准答案").wait_for()
        page.get_by_label("标准答案").fill("三")
        page.get_by_role("button", name="采样并打分").click()
        page.get_by_text("8 条回复").nth(1).wait_for()
        page.screenshot(path=os.environ.get("SCREENSHOT", str(tmp_path / "page.png")))
        page.get_by_role("button", name="清空").click()
        page.get_by_text("8 条回复").first.wait_for(state="detached")
        assert page.get_by_label("问题").input_value() == "" and elsewhere == []
        browser.close()
    gradio.close_all()


@pytest.mark.parametrize("name", ["code01_processdata", "infer"])
def test_notebook_runs_from_top_to_bottom(name, output, tmp_path, monkeypatch):
    folder = tmp_path / "verl_base"
    ignored = shutil.ignore_patterns("output*", "cache_data", "__pycache__", ".*_cache", "tests", "base0*")
    shutil.copytree(RECIPE, folder, ignore=ignored)
    monkeypatch.setenv("OUTPUT", output)
    notebook = nbformat.read(folder / f"{name}.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    outputs = [output for cell in cells for output in cell.outputs]
    text = "\n".join(output.get("text") or output["data"].get("text/plain", "") for output in outputs)
    assert not [output["text"] for output in outputs if output.get("name") == "stderr"]
    if name == "infer":
        assert "训练前： 8 条回复" in text and "Closing server" in text
    else:
        assert "重复的题目： 0" in text and "my_bad_rows.jsonl:2: no ground_truth" in text
