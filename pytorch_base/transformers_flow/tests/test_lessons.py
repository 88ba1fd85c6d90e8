"""Each lesson, run in a copy of its file alone: what it prints, and that it leaves nothing. Times are never judged.

One lesson and those that don't need torch run by the command at their top, the others in processes of the warm server.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from warm import WarmServer

LESSONS = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
# What the lessons import, and what the library imports when it is first used.
MODULES = ["torch", "torch._dynamo", "transformers.models.qwen2.modeling_qwen2", "transformers.generation"]
MODULES += ["transformers.trainer", "peft"]
MODULES += ["transformers.models.qwen3_moe.modeling_qwen3_moe", "transformers.models.bert.modeling_bert"]
AS_TYPED = ["code01_tokenizers", "code01_unigram", "code01_wordpiece", "code03_attention"]
SMALL = r"(0\.0e\+00|\d\.\de-(0[6-9]|[1-9]\d))"  # below 1e-5
# What a lesson prints, in this order. Numbers in the proof are pinned where no other machine can have others.
SHOWN = {
    "code01_tokenizers": [
        r"𠮷野家的𨋢里，龘字不会读', 38 -> 29: ",
        r"proof: 100 merges and the tokens of 9 texts equal the library's, every text comes back; 2\.70 bytes a token",
    ],
    "code01_unigram": [
        r"94 pieces, log-likelihood by EM step:  -559\.17  -510\.89  -508\.72\n85 pieces",
        r"\n江边\|的人\|喜\|欢\|散\|步\n(.*\n)+江\|边\|的船\n",
        r"proof: each of 4 EM steps .*, by 48\.28 to 0\.00\d+, .* within \de-1\d; 12 cuts equal the library's; 1\.28 ",
    ],
    "code01_wordpiece": [
        r"\ntraining a tokenizer in 2019 ! -> train ##ing a token ##ize ##r in 2019 \[UNK\]\n",
        r"\ntraintraintraintrain -> train ##train ##train ##train\ntraintraintraintraintrain -> \[UNK\]\n",
        r"proof: 40 pieces of 21 words equal the library's, 7 of them \[UNK\]; 81,520 characters are Chinese, ",
    ],
    "code02_embeddings_rotary": [
        r"猫 at 10 and at 17 has the same row: True",
        r"rows with a gradient after 雨后的山: 后山的雨\n",
        r"\(5, 2\), distance 3: (\S+)\n  \(15, 12\), distance 3: \1\n  \(1005, 1002\), distance 3: \1\n",
        rf"proof: .*lookup {SMALL}, rotation {SMALL}, linear and YaRN {SMALL}; at one distance .* by \d\.\de-0[5-9]",
    ],
    "code03_attention": [
        r"慢 ■■■■■■■■···· ······■■····\n",
        r"慢 ····■■■■···· ······■■····\n",
        r"4 of 4 heads .* 12,288 bytes to keep\n2 of 4 heads .* 6,144 .*\n1 of 4 heads .* 3,072 ",
        rf"proof: 12 cases differ by at most {SMALL} \(eager\) {SMALL} \(sdpa\) {SMALL} \(F\.scaled_dot",
    ],
    "code03_flash_attention": [
        r"tiles +keeps +412,800 .*\nat once +keeps +987,200 .*\nlibrary +keeps +412,800 ",
        rf"proof: output and gradients .* library's by {SMALL}; 15 of 25 tiles, each 1/17 of the scores; ",
    ],
    "code04_mixture_of_experts": [
        r"a token is computed with 9,472 of 37,120 parameters",
        rf"proof: output, loss and gradients .* by {SMALL}; 26% .* has [34]\.\d times its share, with the loss 1\.\d",
    ],
    "code04_qwen2": [
        r"tied True: 38 tensors, 112,448 numbers, lm_head in the file: False",
        r"tied False: 39 tensors, 113,472 numbers, lm_head in the file: True",
        rf"proof: a block differs from the library's by {SMALL}, a checkpoint's logits by {SMALL}",
    ],
    "code05_generation": [
        r"greedy +今天\S+\nrepetition_penalty +今天\S+\ntemperature +今天\S+ 今天\S+ 今天\S+\n",
        r"beam +今天\S+\nbeam +在河边钓鱼。■\nbeam +她\S+\nbeam +山里",
        rf"proof: 18 texts have the ids of model\.generate, probabilities differ by at most {SMALL}",
    ],
    "code05_kv_cache": [
        r"cache of 148 tokens: 151,552 bytes; .* = 151,552\n",
        rf"proof: 128 ids .* equal the library's, .* by {SMALL}; 151,552 bytes as by the formula, [\d.]+ times as fast",
    ],
    "code06_chat_packing": [
        r"learns '十二个月<\|im_end\|>三个月<\|im_end\|>'\n",
        r"padded +213 tokens, loss (\d\.\d{4}).*\npacked +127 tokens, loss \1.*\npacked, mask by hand +127 .* \1",
        rf"proof: .* 3 chats equal the library's; packed, 40% fewer tokens, gradients within {SMALL}; off by \d\d% if ",
    ],
    "code06_loss": [
        r"一年有几个月？十二个 -> 月\n",
        r"whole batch, 40 labels: (\S+); of the library: \S+\n",
        r"with 10 and 30 labels:\n  mean of means: .* off by [1-9]\.\de-01\n",
        rf"proof: .* library's by {SMALL}; .* off by {SMALL} if divided by all tokens, and by \d\d% as a mean of means",
    ],
    "code06_chunked_loss": [
        r"whole +: loss \S+ at most \d,\d{3},\d{3} bytes alive\nin chunks: loss \S+ at most \d,\d{3},\d{3} bytes alive",
        r"the logits alone have 1,949,696 bytes, a chunk of them 262,144\n",
        rf"proof: in chunks of 16 tokens .* by {SMALL}, gradients by {SMALL}, with 4\.\d times less memory at the peak",
    ],
    "code06_masked_lm": [
        r"of 36,000 tokens 1[45]\.\d% are chosen; (79|8[01])\.\d% of them masked, (9|10)\.\d% as they were\n",
        r"\n他在\[MASK\]里钓鱼 -> 河\n他在\[MASK\]里跑步 -> 雨\n",
        rf"proof: 48,000 masked ids and labels equal the library's, its losses differ by {SMALL}; .* 河/雨 ",
    ],
    "code07_lora": [
        r"loss of ours: +(\d\.\d\d\d).*\nloss of PEFT's: +\1",
        r"trained: 3,328 of 79,936 numbers",
        rf"proof: .* logits {SMALL}, gradients {SMALL}, A and B {SMALL}, merged - unmerged {SMALL}, "
        rf"merged weights {SMALL}",
    ],
    "code08_trainer_loop": [
        r"step 1: loss (\d\.\d\d)\d+, the Trainer's \1",
        rf"proof: losses of 9 steps differ by at most {SMALL}, final weights by {SMALL}",
    ],
    "code09_mixed_precision": [
        r"a gradient of 1e-8 in fp16: 0\.0; scaled by 2\^16, in fp16, and back: 1\.00e-08",
        r"1\.0000 in bf16, 0\.9000 in a master of fp32",
        rf"proof: of 30 steps \d were left out and \d doubled .* by GradScaler; losses are equal, .* by {SMALL}",
    ],
    "code10_gradient_checkpointing": [
        r"by hand +loss \S+ 250,860 bytes",
        r"library +loss \S+ 250,860 bytes",
        rf"proof: gradients differ by at most {SMALL}, by \d\.\de-0[1-4] where .*; 29\.4 times fewer bytes kept",
    ],
    "code11_quantisation": [
        r"weight \[64, 128\]: 32,768 bytes -> 8,448; no number moved by more than 0\.500 steps of its row",
        r"layers of a Qwen2: 1,183,744 -> 307,200 bytes",
        rf"proof: int8 weights differ from torch's by {SMALL}; 3\.85 times smaller, logits off by \d\.\d\d%;",
    ],
    "code11_nf4": [
        r"values: -1\.0000 -0\.6962 .* 0\.0000 .* 0\.7230 1\.0000\n",
        r"4,194,304 bytes: packed 524,288, scale_codes 16,384, outer 256, mean 4\n",
        rf"proof: values differ from the published by {SMALL}; 4\.127 bits a weight, 7\.75 times smaller;",
    ],
    "code12_speculative_sampling": [
        r"天天地天: 0\.6989 0\.6989 0\.5703\n",
        r"proof: the probabilities of 81 texts differ from the target's by at most \d\.\de-1\d, by 0\.13 if ",
    ],
    "code12_speculative_decoding": [
        r"村口有一\[棵\S*\]",
        r"proof: 60 ids equal the target's and the library's; (\d\d) passes .* instead of 60 \(the library: \d\d\), ",
    ],
}

# Lesson and what is broken in it.
BROKEN = [
    ("code01_unigram", "math.log(count / total)", "2 * math.log(count / total)"),
    ("code01_unigram", "count / total)", "count**2 / sum(n**2 for n in counts.values()))"),
    ("code01_unigram", "min(scores.values()) - 10", "min(scores.values()) - 1"),
    ("code01_wordpiece", "begin : max(fits)", "begin : min(fits)"),
    ("code01_wordpiece", "(0xF900, 0xFAFF), ", ""),
    ("code01_wordpiece", ", (0x2F800, 0x2FA1F)]", "]"),
    ("code03_flash_attention", "output[:, queries] * shrink +", "output[:, queries] +"),
    ("code03_flash_attention", " - shared[:, queries])", ")"),
    ("code04_mixture_of_experts", "EXPERTS * (share *", "EXPERTS * (share**2 *"),
    ("code04_mixture_of_experts", "weights / weights.sum(-1, keepdim=True) if renormalise else weights", "weights"),
    ("code04_mixture_of_experts", 'used += weights["gate.weight"].numel()\n', ""),
    ("code05_generation", "topk(2 * BEAMS)", "topk(BEAMS)"),
    ("code05_generation", "(score / step, ids)", "(score, ids)"),
    ("code06_chat_packing", "[IGNORED, *labels[1:]]", "labels"),
    ("code06_chat_packing", "(chat[:, None] == chat) & ", ""),
    ("code06_chat_packing", "(said if role", "(head if role"),
    ("code06_masked_lm", "draw(0.5) & chosen", "draw(0.1) & chosen"),
    ("code06_masked_lm", "logits[chosen]", "logits.roll(1, 1)[chosen]"),
]


@pytest.fixture(scope="session")
def server():
    server = WarmServer(MODULES, ENVIRONMENT)
    yield server
    server.close()


@pytest.mark.parametrize("lesson", SHOWN)
def test_lesson_proves_its_point(lesson, tmp_path, server):
    source = (LESSONS / f"{lesson}.py").read_text(encoding="utf-8")
    (tmp_path / f"{lesson}.py").write_text(source, encoding="utf-8")
    if lesson in AS_TYPED:
        process = subprocess.run(
            [sys.executable, f"{lesson}.py"],
            cwd=tmp_path,
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=240,  # the process is killed then
        )
        status, printed, errors = process.returncode, process.stdout, process.stderr
    else:
        status, printed, errors, _ = server.run(tmp_path / f"{lesson}.py", tmp_path, seconds=240)
    assert status == 0, errors[-5000:]
    for pattern in SHOWN[lesson]:
        found = re.search(pattern, printed)
        assert found, f"{pattern}\nis not in what is left of the output:\n{printed}"
        printed = printed[found.start() :]
    assert printed.startswith("proof: ") and printed.count("\n") == 1, "the proof is not the last line"
    left = {path.name for path in tmp_path.iterdir()} - {f"{lesson}.py", "__pycache__"}
    assert not left, f"the lesson leaves {left} behind"


@pytest.mark.parametrize(("lesson", "right", "wrong"), BROKEN)
def test_broken_lesson_fails(lesson, right, wrong, tmp_path, server):
    source = (LESSONS / f"{lesson}.py").read_text(encoding="utf-8")
    assert source.count(right) == 1
    (tmp_path / "broken.py").write_text(source.replace(right, wrong), encoding="utf-8")
    status, printed, errors, _ = server.run(tmp_path / "broken.py", tmp_path, seconds=240)
    assert status == 1 and "AssertionError" in errors and "proof:" not in printed, printed + errors


def test_lessons_find_in_torch_what_they_name():
    """Without more imports than `import torch`: the server has more, and would hide that a lesson lacks one."""
    nodes = [node for path in LESSONS.glob("*.py") for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    names = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
    names = sorted(name for name in names if re.fullmatch(r"(torch|nn)(\.\w+)+", name))
    find = "import sys, torch\nfrom torch import nn\nfor name in sys.argv[1:]: eval(name)"
    run = subprocess.run([sys.executable, "-c", find, *names], capture_output=True, text=True, timeout=120)
    assert names and run.returncode == 0, run.stderr


def test_every_lesson_is_short_explained_and_alone():
    names = {path.stem for path in LESSONS.glob("*.py")}
    assert names == set(SHOWN)
    readme = (LESSONS / "readme.md").read_text(encoding="utf-8")
    for name in names:
        source = (LESSONS / f"{name}.py").read_text(encoding="utf-8")
        tree = ast.parse(source)
        assert source.count("\n") < 120, f"{name} is too long"
        assert f"python {name}.py" in ast.get_docstring(tree), f"{name} doesn't say how to run it"
        assert f"\npython {name}.py\n" in readme and f"| `{name}.py` |" in readme
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        imported = {name for node in nodes for name in ([a.name for a in node.names] + [getattr(node, "module", "")])}
        assert not imported & names, f"{name} imports another lesson"
