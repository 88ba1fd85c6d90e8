"""Scores of a pair are what one would compute by hand; "before" is the model that the training began with."""

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from ranks import train_here

import compare
import demo
from compare import describe_scores, find_before, load_models, score_pair
from conftest import make_pairs, write_rows
from infer import load_trained_model
from rows import UserError
from tiny import build_tiny_model

PROMPT, REPLIES = "天地玄黄", ("宇宙洪荒日月盈昃", "宇宙寒来暑往，秋收冬藏。Yes")


@pytest.fixture(scope="module")
def before(tiny_folder):
    return load_trained_model(tiny_folder)[0]


@pytest.fixture(scope="module", params=["all weights", "adapter"])
def after(tiny_folder, request):
    """A model that differs from `before` in all weights, or by an adapter only."""
    model, _ = load_trained_model(tiny_folder)
    torch.manual_seed(0)
    if request.param == "adapter":
        config = LoraConfig(target_modules="all-linear", lora_alpha=64, init_lora_weights=False)
        return get_peft_model(model, config).eval()
    for weight in model.parameters():
        weight.data += 0.02 * torch.randn_like(weight)
    return model


def log_probability_by_hand(model, tokenizer, reply: str) -> tuple[float, int]:
    """Of a reply and its `</s>`, in nats, and how many tokens that are."""
    messages = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": reply}]
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    assert whole[: len(prompt)] == prompt and whole[-1] == tokenizer.eos_token_id
    with torch.no_grad():
        log_probabilities = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    of_reply = [log_probabilities[i - 1, whole[i]].item() for i in range(len(prompt), len(whole))]
    return math.fsum(of_reply), len(of_reply)


def test_scores_are_those_computed_by_hand(before, after, tokenizer):
    has_adapter = hasattr(after, "disable_adapter")
    scores = score_pair(None if has_adapter else before, after, tokenizer, PROMPT, REPLIES, beta=0.3)
    for name, model in (("before", before), ("after", after)):
        expected, tokens = zip(*(log_probability_by_hand(model, tokenizer, reply) for reply in REPLIES), strict=True)
        assert scores[name] == pytest.approx(expected, abs=1e-4)
        assert scores["tokens"] == list(tokens)
    assert abs(scores["after"][0] - scores["before"][0]) > 0.1, "nothing differs, so nothing is tested"
    rewards = [0.3 * (scores["after"][i] - scores["before"][i]) for i in (0, 1)]
    assert scores["rewards"] == pytest.approx(rewards, abs=1e-4)
    assert scores["margin"] == pytest.approx(rewards[0] - rewards[1], abs=1e-4)
    assert scores["preferred"] == int(rewards[1] > rewards[0])


def test_order_of_the_replies_doesnt_matter_and_the_model_itself_prefers_none(before, after, tokenizer):
    one = score_pair(before, after, tokenizer, PROMPT, REPLIES)
    other = score_pair(before, after, tokenizer, PROMPT, REPLIES[::-1])
    assert one["after"] == pytest.approx(other["after"][::-1], abs=1e-4)
    assert one["margin"] == pytest.approx(-other["margin"], abs=1e-4)
    assert one["preferred"] == 1 - other["preferred"]
    same = score_pair(before, before, tokenizer, PROMPT, REPLIES)
    assert (same["rewards"], same["margin"], same["preferred"]) == ([0, 0], 0, None)


def test_table():
    scores = {"tokens": [2, 4], "before": [-8.0, -9.0], "after": [-5.0, -10.0], "rewards": [0.3, -0.1], "margin": 0.4}
    text = describe_scores(scores | {"preferred": 0})
    assert "| 回答一 | 2 | -8.00 | -4.000 | -5.00 | -2.500 | +0.300 |\n" in text
    assert "| 回答二 | 4 | -9.00 | -2.250 | -10.00 | -2.500 | -0.100 |\n" in text
    assert text.endswith("奖励差（回答一减回答二）：+0.400，训练后的模型更偏好**回答一**。")
    assert "分不出高下" in describe_scores(scores | {"preferred": None})


@pytest.mark.parametrize(
    ("prompt", "replies", "beta", "problem"),
    [
        (" ", REPLIES, 0.1, "请填写"),
        (PROMPT, ("", REPLIES[1]), 0.1, "请填写"),
        (PROMPT, (REPLIES[0], "\n"), 0.1, "请填写"),
        (PROMPT, (REPLIES[0], REPLIES[0]), 0.1, "两个回答完全相同"),
        (PROMPT, REPLIES, 0, "β 必须大于 0"),
        (PROMPT, REPLIES, None, "β 必须大于 0"),
        (PROMPT, (REPLIES[0], "天<reserved_106>"), 0.1, "control token <reserved_106>"),
        (PROMPT, (REPLIES[0], REPLIES[1] * 500), 0.1, "超过了模型的上下文长度（4096 个词元）"),
        (PROMPT * 2000, REPLIES, 0.1, "of 4095 that a prompt may have"),
    ],
)
def test_pair_that_cant_be_scored_is_refused(prompt, replies, beta, problem, before, tokenizer):
    with pytest.raises(UserError, match=problem.replace("(", r"\(")):
        score_pair(before, before, tokenizer, prompt, replies, beta)


def make_folder(path, model: str | None = None, base: str | None = None) -> str:
    """The small files of a model or, with `base`, of an adapter, which train.py began with `model`."""
    path.mkdir(parents=True)
    if base is None:
        (path / "config.json").write_text("{}")
    else:
        (path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    if model is not None:
        (path / "run.json").write_text(json.dumps({"model": model}))
    return str(path)


def test_before_is_what_the_training_began_with(tmp_path, monkeypatch):
    sft = make_folder(tmp_path / "output_sft")
    other = make_folder(tmp_path / "recipe" / "sft_adapter", base=sft)
    monkeypatch.setattr(compare, "RECIPE", tmp_path / "recipe")
    assert find_before(make_folder(tmp_path / "output")) == sft, "beside a model without a run.json"
    assert find_before(make_folder(tmp_path / "named", model="output_sft")) == sft, "beside it, wherever both are"
    assert find_before(make_folder(tmp_path / "deep" / "elsewhere", model=sft)) == sft
    assert find_before(make_folder(tmp_path / "hub", model="owner/name")) == "owner/name"
    for number, start in enumerate((None, sft)):
        assert find_before(make_folder(tmp_path / f"adapter{number}", model=start, base=sft)) is None
    adapter = make_folder(tmp_path / "went_on", model="sft_adapter", base=sft)
    assert find_before(adapter) == other, "an adapter that was trained on is more than its base"
    monkeypatch.chdir(tmp_path)
    assert find_before("output/") == sft


@pytest.mark.parametrize(
    ("model", "base"), [(None, None), ("gone", None), ("/gone/model", None), ("/gone/adapter", "/some/base")]
)
def test_without_a_model_to_compare_with_before_has_to_be_given(model, base, tmp_path, capsys):
    folder = make_folder(tmp_path / "output", model, base)
    with pytest.raises(SystemExit, match=f"python demo.py {folder} --before my_model"):
        demo.main([folder])
    with pytest.raises(SystemExit, match="nowhere: there is no such folder"):
        demo.main([str(tmp_path / "nowhere")])


def test_model_with_another_tokenizer_is_refused(tiny_folder, tmp_path):
    build_tiny_model([row["rejected"] for row in make_pairs(50)], str(tmp_path), vocab_size=300, hidden_size=64)
    with pytest.raises(UserError, match=f"{tmp_path}: has another tokenizer than {tiny_folder}"):
        load_models(tiny_folder, str(tmp_path))


def test_adapters_that_were_trained_here(tiny_folder, tmp_path, monkeypatch):
    """A new one is switched off; one that was trained on is compared with what it was."""
    monkeypatch.setattr("data.CACHE_DIR", tmp_path / "cache")
    monkeypatch.setattr("train.CACHE_DIR", tmp_path / "cache")
    data = write_rows(tmp_path / "pairs.jsonl", make_pairs(4))
    flags = ["--data_path", data, "--use_lora", "true", "--max_steps", "1", "--validation_split", "0"]
    flags += ["--save_strategy", "no", "--learning_rate", "1e-2", "--lr_scheduler_type", "constant"]
    first, second = (str(tmp_path / name) for name in ("first", "second"))
    train_here(monkeypatch, "--model_name_or_path", tiny_folder, "--output_dir", first, *flags)
    train_here(monkeypatch, "--model_name_or_path", first, "--output_dir", second, *flags)
    assert find_before(first) is None and find_before(second) == first
    scored = []
    for path in (first, second):
        scored.append(score_pair(*load_models(path, find_before(path)), PROMPT, REPLIES))
    assert scored[0]["after"] == pytest.approx(scored[1]["before"], abs=1e-4)
    assert abs(scored[1]["after"][0] - scored[1]["before"][0]) > 1e-3
