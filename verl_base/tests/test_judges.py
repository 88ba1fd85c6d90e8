"""Processes that ask the reward function: what they give back, what hangs, dies or fails in them, what they leave."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from test_scores import asking, make_prompts, make_rollout

from conftest import RECIPE, write_rows
from judge import OWN_FIGURES, call_reward_function, describe_error
from reward_manager import load_reward_function, score_completions
from rows import UserError

# As long as the sun shines, with Python's lock held: no thread could be given up, and no signal would be heard.
HANGS = "re.fullmatch(r'(x+x+)+y', 'x' * 40)"


@pytest.fixture
def write_reward(tmp_path):
    """A reward function with this body in a file; loaded with these options, its processes end with the test."""
    loaded = []

    def write(body: str, before: str = "", **options):
        path = tmp_path / "my_rewards.py"
        path.write_text(f"import os, re, signal, sys, time\n{before}\ndef score(solution_str, **_):\n    {body}\n")
        loaded.append(load_reward_function(f"{path}:score", **options))
        return loaded[-1]

    yield write
    for reward_function in loaded:
        reward_function.close()


def wait_until_loaded(reward_function):
    while not all(judge.loaded for judge in reward_function.judges):
        list(reward_function.hear())
    return reward_function


def ask(reward_function, completions: str, skip_failures: bool = True) -> list:
    return reward_function.ask([(make_prompts(1)[0], said, True) for said in completions], skip_failures)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise KeyError('x')", "KeyError: 'x' (PATH:6). Mend it"),
        ("raise SystemExit('no API key')", "SystemExit: no API key (PATH:6). Mend it"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt:  (PATH:6). Mend it"),
        ("raise type('PanicException', (BaseException,), {})('rust')", "PanicException: rust (PATH:6). Mend it"),
        ("import asyncio; raise asyncio.CancelledError('late')", "CancelledError: late (PATH:6). Mend it"),
        ("return float('nan')", "ValueError: the score is nan. Mend it"),
        ("return {'acc': 1.0}", "KeyError: 'score'. Mend it"),
        ("return None", "TypeError: "),
        ("os._exit(3)", "the process that asked it ended with exit status 3. Mend it"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "the process that asked it ended by SIGSEGV. Mend it"),
    ],
)
def test_failing_reward_function_is_reported_with_its_sample(write_reward, tokenizer, tmp_path, body, message):
    """At once, whatever kind of exception it is; the others have their scores."""
    started = time.monotonic()
    reward = write_reward(f"if solution_str != '二':\n        return 1.0\n    {body}", workers=2, timeout=60)
    rollout = make_rollout(tokenizer, ["一", "二", "一", "一"])
    with pytest.raises(UserError, match="the reward function failed on the completion '二' to '问0'") as error:
        score_completions(rollout, make_prompts(2), tokenizer, reward, asking(skip_bad_rewards=False))
    assert str(error.value).startswith("my.jsonl:1: ")
    assert message.replace("PATH", f"{tmp_path}/my_rewards.py") in str(error.value)
    scored = score_completions(rollout, make_prompts(2), tokenizer, reward, asking())
    assert np.isnan(scored.scores).tolist() == [False, True, False, False]
    failing = make_rollout(tokenizer, ["二", "二"])
    with pytest.raises(UserError, match="on every completion of a step"):
        score_completions(failing, make_prompts(1), tokenizer, reward, asking())
    scored = score_completions(failing, make_prompts(1), tokenizer, reward, asking(), may_all_fail=True)
    assert np.isnan(scored.scores).all() and time.monotonic() - started < 30


def test_hanging_judge_is_ended_with_what_it_started(write_reward, tmp_path):
    """Several hang at a time: each is named, the others have their scores, and nothing goes on behind the driver."""
    sleeps = f"import subprocess; open('{tmp_path}/pid', 'w').write(str(subprocess.Popen(['sleep', '600']).pid))"
    body = f"if solution_str == '三':\n        {sleeps}\n    "
    body += f"return float({HANGS} is None if solution_str in '一三' else 1)"
    reward, started = wait_until_loaded(write_reward(body, workers=2, timeout=1.0)), time.monotonic()
    before = [judge.process.pid for judge in reward.judges]
    results = ask(reward, "一二三四五六")
    assert [result for result in results if not isinstance(result, UserError)] == [{"score": 1.0}] * 4
    for number, completion in ((0, "一"), (2, "三")):
        what = f"completion '{completion}' to '问0': TimeoutError: no score after 1 seconds (--reward_timeout)"
        assert what in str(results[number])
    assert time.monotonic() - started < 20
    left = [pid for pid in [*before, int((tmp_path / "pid").read_text())] if psutil.pid_exists(pid)]
    deadline = time.monotonic() + 10
    while any(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in left if psutil.pid_exists(pid)):
        assert time.monotonic() < deadline, left
    assert ask(reward, "二") == [{"score": 1.0}]
    with pytest.raises(UserError, match="completion '一'"):
        ask(reward, "一二", skip_failures=False)
    assert not [judge for judge in reward.judges if judge.number is not None]


@pytest.mark.parametrize(("how", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -15), (signal.SIGKILL, -9)])
def test_driver_that_is_ended_takes_hanging_judges_along(tmp_path, how, status):
    (tmp_path / "my_rewards.py").write_text(
        "import os, re\ndef score(**_):\n    open('pid', 'a').write(str(os.getpid()) + '\\n')\n"
        f"    return {HANGS} is None\n"
    )
    (tmp_path / "driver.py").write_text(
        "import sys\nfrom data import Prompt\nfrom reward_manager import load_reward_function\n"
        "reward = load_reward_function('my_rewards.py:score', 2, 600.0)\n"
        "prompt = Prompt([{'content': ''}], '', '', '')\n"
        "try:\n    reward.ask([(prompt, '', True)] * 4)\nexcept KeyboardInterrupt:\n    sys.exit(130)\n"
    )
    driver = subprocess.Popen(
        [sys.executable, "driver.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(RECIPE)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # see test_kill.py
    )
    pids, deadline = tmp_path / "pid", time.monotonic() + 60
    while not pids.exists() or pids.read_text().count("\n") < 2:
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    judges = [psutil.Process(int(pid)) for pid in pids.read_text().split()]
    for judge in judges:
        judge.send_signal(signal.SIGINT)  # as by `kill -INT` to all: it is the driver's to hear
    driver.send_signal(how)
    assert driver.wait(timeout=10) == status
    _, alive = psutil.wait_procs(judges, timeout=10)
    assert not [judge for judge in alive if judge.status() != psutil.STATUS_ZOMBIE]


def test_judges_that_wait_are_asked_side_by_side(write_reward, tmp_path):
    """None returns before all four were asked."""
    (tmp_path / "asked").mkdir()
    body = f"open('{tmp_path}/asked/' + solution_str, 'w')\n    while len(os.listdir('{tmp_path}/asked')) < 4:\n"
    body += "        time.sleep(0.01)\n    return '一二三四'.index(solution_str)"
    reward = write_reward(body, workers=4, timeout=30)
    assert [result["score"] for result in ask(reward, "一二三四", skip_failures=False)] == [0, 1, 2, 3]


def test_judges_stay_for_the_run_and_speak_for_themselves(write_reward, capfd):
    """One that died while nobody asked is replaced; what the function prints comes to the screen, not into the pipe."""
    reward = write_reward("print('said', solution_str); return os.getpid()", workers=2)
    wait_until_loaded(reward)
    first = {result["score"] for result in ask(reward, "一二三四五六七八")}
    assert first <= {judge.process.pid for judge in reward.judges} and len(reward.judges) == 2
    assert {result["score"] for result in ask(reward, "一二三四")} <= first
    for judge in reward.judges:
        judge.process.kill()
        judge.process.wait()
    assert len(ask(reward, "一二", skip_failures=False)) == 2 and len(reward.judges) <= 2
    processes = [judge.process for judge in reward.judges]
    reward.close()
    assert [process.returncode for process in processes] == [0] * len(processes)  # they came to their own end
    assert sorted(capfd.readouterr().out.split()) == sorted([*["said"] * 14, *"一二三四五六七八一二三四一二"])


def test_a_judge_imports_what_the_users_file_does_and_no_more(write_reward):
    reward = write_reward("return len({'torch', 'numpy', 'ray', 'transformers'} & set(sys.modules))")
    assert ask(reward, "一") == [{"score": 0.0}]


def test_reward_function_may_return_what_is_no_number(write_reward):
    before = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\nimport numpy as np\n"
        "@dataclass\nclass Rule:\n    weight: float | None = 1.0\n"
    )
    parts = "'pred': None, 'said': [1], 'acc': np.True_, 'right': True, 'n': np.int64(2), 'big': np.float32(0.5)"
    path_and_name = write_reward("return 1").path_and_name
    path = Path(path_and_name.rpartition(":")[0])
    path.write_text(f"{before}def score(**_):\n    return {{'score': '0.5', {parts}}}\n")
    (result,) = ask(load_reward_function(path_and_name), "一")
    assert result == {"score": 0.5, "acc": 1.0, "right": 1.0, "n": 2.0, "big": 0.5}
    assert {type(value) for value in result.values()} == {float}


def test_figures_of_the_report_are_its_own():
    own = dict.fromkeys([*sorted(OWN_FIGURES), "pass@1"], 7)
    found = call_reward_function(lambda **_: {"score": 1, "acc": True, **own}, {})
    assert found == {"score": 1.0, "acc": 1.0} | {f"reward/{name}": 7.0 for name in own}


@pytest.mark.parametrize("name", ["my_rewards.py", "nowhere.py:score", "my_rewards.py:other", "score"])
def test_reward_function_that_is_not_there(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "my_rewards.py", [])
    with pytest.raises(UserError, match=f"--reward_function {name}: "):
        load_reward_function(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\nimport nowhere_to_be_found\n", "ModuleNotFoundError: No module named 'nowhere_to_be_found' (PATH:2)"),
        ("def score(**_)\n    return 1\n", "SyntaxError: expected ':' (PATH:1)"),
        ("import helper\n", "SyntaxError: invalid syntax (FOLDER/helper.py:2)"),
        ("raise SystemExit('no API key')\n", "SystemExit: no API key (PATH:1)"),
        ("raise BaseException('panic')\n", "BaseException: panic (PATH:1)"),
        ("import os\nos._exit(4)\n", "the process that asked it ended with exit status 4"),
    ],
)
def test_file_that_cannot_be_loaded_is_named_with_the_line(tmp_path, monkeypatch, text, message):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "helper.py").write_text("a = 1\nb = = 2\n")
    path = tmp_path / "my_rewards.py"
    path.write_text(text)
    with pytest.raises(UserError, match=f"--reward_function {path}:score: ") as error:
        load_reward_function(f"{path}:score", workers=2)
    assert message.replace("PATH", str(path)).replace("FOLDER", str(tmp_path)) in str(error.value)


def test_an_error_without_a_line_of_the_users_has_none():
    assert describe_error(ValueError("x"), "my_rewards.py") == "ValueError: x"
