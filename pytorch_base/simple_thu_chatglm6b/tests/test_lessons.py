"""The two lessons, by the command at their top: what they print at the end is so."""

import re
import subprocess
import sys

from code04_prefix_lm import positions_2d, prefix_mask
from conftest import RECIPE


def run_lesson(name: str) -> str:
    run = subprocess.run([sys.executable, name], cwd=RECIPE, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return run.stdout


def test_chatglm2_in_glm4s_class_has_equal_logits():
    shown = run_lesson("code03_chatglm2.py")
    assert re.search(r"ChatGLM +query_key_value.weight +\[128, 64\]", shown)
    assert re.search(r"GLM +self_attn.k_proj.weight +\[32, 64\]", shown)
    assert float(re.search(r"proof: logits .* differ by at most (\S+)", shown)[1]) < 1e-5


def test_prefix_lm_reads_its_prompt_in_both_directions():
    shown = run_lesson("code04_prefix_lm.py")
    assert re.search(r"北 +0 +0 +■■■■■■·····\n", shown) and re.search(r"<sop> +5 +1 +■■■■■■■····\n", shown)
    moved, reply, cached, shifted, causal = map(float, re.findall(r"\d\.\d+(?:e[+-]\d+)?", shown.split("proof:")[1]))
    assert moved > 0.1 and causal > 0.1 and reply == 0 and max(cached, shifted) < 1e-5


def test_mask_and_positions():
    assert prefix_mask(2, 4).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert positions_2d(3, 1, 5).tolist() == [[0, 1, 2, 1, 1], [0, 0, 0, 1, 2]]
