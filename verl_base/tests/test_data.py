"""Tasks, rows, prompts, rewards: what is asked, and what counts as right."""

import copy
import json
import shutil
import sys

import numpy as np
import pytest
from transformers import Qwen3NextConfig

from conftest import QUESTIONS, make_policy, write_rows
from data import check_groups, hash_prompts, load_prompts, load_split, prompts_of_draw, save_prompts
from prepare import make_arithmetic, make_xiehouyu
from rewards import add, compute_score, steps_to_take, subtract, to_chinese
from rows import UserError
from tokenizer import find_end_of_turn, find_stop_tokens, load_tokenizer, read_generation_config
from worker_groups import collate_prompts


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "零"), (7, "七"), (10, "十"), (14, "十四"), (40, "四十"), (99, "九十九")]
    + [(100, "一百"), (105, "一百零五"), (110, "一百一十"), (198, "一百九十八")],
)
def test_numbers_are_written_out(number, text):
    assert to_chinese(number) == text


def test_worked_completions_are_right_and_well_formed():
    assert add(37, 25) == ("三十七加二十五等于几？", "七加五得十二，三加二得五，进一得六，答案：六十二", "六十二")
    assert subtract(92, 48)[1:] == ("十二减八得四，九借一得八，八减四得四，答案：四十四", "四十四")
    problems = make_arithmetic()
    for question, completion, answer in problems["sft"][:300]:
        x, y = question.removesuffix("等于几？").split("加" if "加" in question else "减")
        numbers = {to_chinese(number): number for number in range(200)}
        assert numbers[answer] == (numbers[x] + numbers[y] if "加" in question else numbers[x] - numbers[y])
        assert compute_score("arithmetic", completion, answer, {"question": question})["score"] == pytest.approx(1.6)


def test_no_problem_stands_in_two_files():
    questions = {name: {question for question, _, _ in rows} for name, rows in make_arithmetic().items()}
    assert {name: len(found) for name, found in questions.items()} == {"test": 256, "sft": 4000, "train": 8000}
    assert not questions["test"] & questions["train"] | questions["test"] & questions["sft"]


def test_validation_sayings_are_asked_for_in_words_that_training_has_not():
    sayings = make_xiehouyu()
    questions = {name: {question for question, _, _ in rows} for name, rows in sayings.items()}
    assert {name: len(found) for name, found in questions.items()} == {"test": 128, "sft": 896, "train": 512}
    assert not questions["test"] & (questions["train"] | questions["sft"])
    assert {answer for *_, answer in sayings["test"]} <= {answer for *_, answer in sayings["train"]}


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("七加五得十二，三加二得五，进一得六，答案：六十二", 1.6),
        ("答案：六十二", 1.1),
        ("七加五得十二，答案：六十三", 0.1 + 0.5 / 3),
        ("七加五得十三，三加二得六，进一得七，答案：六十二", 1.1),  # right by luck
        ("二加二得四，三加三得六，答案：六十四", 0.1),  # true steps, but not of this problem
        ("七加五得十二，进一得六，三加二得五，答案：六十三", 0.1 + 0.5 / 3),  # the others out of their order
        ("七加五得十二，三加二得五，进一得六，答案：六十二。", 0.0),  # something follows the number
        ("答案：六十三，答案：六十二", 0.0),  # two answers are none
        ("六十二", 0.0),
        ("", 0.0),
        ("想" * 90 + "答案：六十二", 1.1),  # how long it may be is said by --max_response_length
    ],
)
def test_reward_of_a_sum(completion, score):
    extra_info = {"question": "三十七加二十五等于几？"}
    assert compute_score("arithmetic", completion, "六十二", extra_info)["score"] == pytest.approx(score)


def test_steps_are_known_for_questions_of_this_kind_only():
    assert steps_to_take("四十五减二十六等于几？") == ["十五减六得九", "四借一得三", "三减二得一"]
    assert steps_to_take("三加五等于几？") == ["三加五得八", "零加零得零"]
    for question in ("", "三乘五等于几？", "三百加五等于几？", "三加五等于几", "三减五等于几？"):
        assert steps_to_take(question) == []
    assert compute_score("arithmetic", "三加五得八，零加零得零，答案：八", "八")["score"] == pytest.approx(1.1)


def test_reward_of_a_cut_off_completion_and_of_a_saying():
    assert compute_score("arithmetic", "答案：六十", "六十", {"finished": False})["score"] == 0
    assert compute_score("xiehouyu", "费力不讨好", "费力不讨好")["score"] == pytest.approx(1.1)
    assert compute_score("xiehouyu", "费力", "费力不讨好")["score"] == pytest.approx(0.1)
    assert compute_score("math", "62", 62)["acc"] == 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "一加一等于几？"}, "no ground_truth"),
        ({"prompt": "", "ground_truth": "二"}, "the text is empty"),
        ({"prompt": 5, "ground_truth": "二"}, "prompt is a text, or a list of messages"),
        ({"prompt": [{"role": "robot", "content": "一"}], "ground_truth": "二"}, "unknown role 'robot'"),
        ({"prompt": [{"role": "assistant", "content": "一"}], "ground_truth": "二"}, "must be the user's"),
        ({"prompt": "一" * 100, "ground_truth": "二"}, "tokens, more than --max_prompt_length 64"),
        ([1, 2], "a row is a JSON object"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path, tokenizer, row, reason):
    good = {"prompt": "一加一等于几？", "ground_truth": "二"}
    path = write_rows(tmp_path / "my.jsonl", [good, row])
    with pytest.raises(UserError, match="1 bad rows") as error:
        load_prompts(path, tokenizer, 64, None)
    assert f"{path}:2: " in str(error.value) and reason in str(error.value)
    prompts = load_prompts(path, tokenizer, 64, tmp_path / "out" / "bad_rows.jsonl")
    assert [prompt.ground_truth for prompt in prompts] == ["二"]
    bad = json.loads((tmp_path / "out" / "bad_rows.jsonl").read_text("utf-8"))
    assert bad["source"] == f"{path}:2" and reason in bad["reason"]


def test_verls_rows_and_gb18030_are_read(tmp_path, tokenizer):
    row = {
        "data_source": "arithmetic",
        "prompt": [{"role": "system", "content": "你会算术。"}, {"role": "user", "content": "一加一等于几？"}],
        "reward_model": {"style": "rule", "ground_truth": "二"},
        "extra_info": {"index": 3},
    }
    (tmp_path / "my.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="gb18030")
    (prompt,) = load_prompts(str(tmp_path / "my.jsonl"), tokenizer, 64, None)
    assert (prompt.ground_truth, prompt.data_source, prompt.extra_info) == ("二", "arithmetic", {"index": 3})
    text = tokenizer.decode(prompt.input_ids)
    assert text == (
        "<|im_start|>system\n你会算术。<|im_end|>\n<|im_start|>user\n一加一等于几？<|im_end|>\n<|im_start|>assistant\n"
    )


def test_what_a_chat_template_refuses_is_a_bad_row(tmp_path, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer.chat_template = refuse + tokenizer.chat_template
    turns = [{"role": "system", "content": "你是老师。"}, {"role": "user", "content": "问"}]
    rows = [{"prompt": "问", "ground_truth": "答"}, {"prompt": turns, "ground_truth": "答"}]
    path = write_rows(tmp_path / "train.jsonl", rows)
    with pytest.raises(UserError, match="train.jsonl:2: no system role"):
        load_prompts(path, tokenizer, 64, None)


def test_prompts_are_saved_as_they_were_read(tmp_path, tokenizer):
    rows = [{"prompt": "问", "ground_truth": 7, "data_source": "math", "extra_info": {"tests": [1, 2]}}]
    prompts = load_prompts(write_rows(tmp_path / "train.jsonl", rows), tokenizer, 64, None)
    save_prompts(prompts, tmp_path / "saved.jsonl")
    again = load_prompts(str(tmp_path / "saved.jsonl"), tokenizer, 64, None)
    assert again[0].ground_truth == 7 and again[0].extra_info == {"tests": [1, 2]}
    assert hash_prompts(again) == hash_prompts(prompts)
    again[0].extra_info = {"tests": [1]}
    assert hash_prompts(again) != hash_prompts(prompts)


def test_a_group_that_might_not_fit_is_refused(data_file, tokenizer, parse_arguments):
    prompts = load_prompts(data_file, tokenizer, 64, None)
    _, data_args, args = parse_arguments(max_response_length=64, ppo_max_token_len_per_gpu=256)
    with pytest.raises(
        UserError, match="4 completions to the longest prompt may have .* --ppo_max_token_len_per_gpu 256"
    ):
        check_groups(prompts, data_args, args)
    _, data_args, args = parse_arguments(max_response_length=32, ppo_max_token_len_per_gpu=256)
    check_groups(prompts, data_args, args)


def test_validation_prompts_are_not_learned_from(tmp_path, tokenizer, parse_arguments):
    rows = [{"prompt": question, "ground_truth": "二"} for question in QUESTIONS]
    train, test = write_rows(tmp_path / "a.jsonl", rows), write_rows(tmp_path / "b.jsonl", rows[:5])
    _, data_args, _ = parse_arguments(data_path=train, eval_data_path=test, validation_split=None)
    prompts, validation = load_split(data_args, tokenizer, 1, str(tmp_path))
    assert len(validation) == 5 and len(prompts) == len(rows) - 5
    _, data_args, _ = parse_arguments(data_path=train, validation_split=0.25)
    prompts, validation = load_split(data_args, tokenizer, 1, str(tmp_path))
    asked = {prompt.messages[0]["content"] for prompt in prompts}
    assert len(validation) == 16 and not asked & {prompt.messages[0]["content"] for prompt in validation}


def test_each_epoch_draws_every_prompt_once(data_file, tokenizer):
    prompts = load_prompts(data_file, tokenizer, 64, None)
    drawn = [prompt.source for draw in range(8) for prompt in prompts_of_draw(prompts, draw, 16, seed=3)]
    first, second = drawn[:64], drawn[64:]
    assert sorted(first) == sorted(second) == sorted(prompt.source for prompt in prompts)
    assert first != second
    crossing = prompts_of_draw(prompts[:10], 1, 8, seed=3)  # two of the first epoch, six of the second
    assert len({prompt.source for prompt in crossing[2:]}) == 6


def test_prompts_are_padded_on_the_left(tmp_path, tokenizer):
    rows = [{"prompt": text, "ground_truth": "二"} for text in ("一加一等于几？", "一加一加一加一等于几？")]
    prompts = load_prompts(write_rows(tmp_path / "my.jsonl", rows), tokenizer, 64, None)
    batch = collate_prompts(prompts, tokenizer.pad_token_id).batch
    lengths = [len(prompt.input_ids) for prompt in prompts]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["input_ids"][0, -lengths[0] :].tolist() == prompts[0].input_ids
    assert np.unique(batch["input_ids"][0, : -lengths[0]]).tolist() == [tokenizer.pad_token_id]


def test_eos_is_what_ends_a_turn(tmp_path, tokenizer, parse_arguments):
    assert find_end_of_turn(tokenizer) == "<|im_end|>"
    folder = make_policy(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "tokenizer_config.json").read_text())
    config["eos_token"] = "<|endoftext|>"  # as base models come
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(config))
    model_args, _, _ = parse_arguments(model_name_or_path=folder)
    assert load_tokenizer(model_args).eos_token == "<|im_end|>"


@pytest.mark.parametrize(
    ("configured", "stops"),
    [
        ({"generation_config.json": {"eos_token_id": [0, 2]}, "config.json": {"eos_token_id": 5}}, [0, 2]),
        ({"generation_config.json": {"eos_token_id": 7}}, [2, 7]),
        ({"generation_config.json": {"top_p": 0.8}, "config.json": {"eos_token_id": 5}}, [2]),  # it stands alone
        ({"config.json": {"eos_token_id": [0, 5]}}, [0, 2, 5]),
        ({"config.json": {"eos_token_id": None}}, [2]),
    ],
)
def test_stop_tokens_are_one_set(tmp_path, tokenizer, policy_folder, configured, stops):
    """What the template ends a turn by, and what the folder names, as Transformers reads it with the model."""
    from infer import load_trained_model

    shutil.copytree(policy_folder, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").unlink()
    for name, changes in configured.items():
        path = tmp_path / "model" / name
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))
    assert find_stop_tokens(tokenizer, read_generation_config(str(tmp_path / "model"), False)) == stops
    model, _ = load_trained_model(str(tmp_path / "model"))  # as the page and the command line load it
    assert model.generation_config.eos_token_id == stops


def test_saved_tokenizer_is_the_one_that_was_trained(tmp_path):
    from transformers import AutoTokenizer

    from tiny import train_chat_tokenizer

    trained = train_chat_tokenizer(QUESTIONS, vocab_size=400)
    trained.save_pretrained(tmp_path)
    text = "<|im_start|>user\n三加二五等于几？<|im_end|>"
    ids = trained(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == ids
    assert [trained.decode([token]) for token in ids][3:7] == ["三", "加", "二", "五"]


def test_models_that_cannot_be_used(tmp_path, parse_arguments):
    model_args, _, _ = parse_arguments(model_name_or_path=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no model could be read there"):
        load_tokenizer(model_args)
    folder = make_policy(tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    model_args, _, _ = parse_arguments(model_name_or_path=folder)
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(model_args)
    hybrid = Qwen3NextConfig(layer_types=["linear_attention", "full_attention"], num_hidden_layers=2)
    hybrid.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="it has layers of linear_attention"):
        load_tokenizer(model_args)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout_n": 1}, "compared with the others of its group"),
        ({"rollout_n": 0}, "compared with the others of its group"),
        ({"temperature": 0}, "--temperature 0"),
        ({"algorithm": "ppo2"}, "known are grpo"),
        ({"train_batch_size": 6, "ppo_mini_batch_size": 4}, "not a multiple"),
        ({"train_batch_size": 6, "ppo_mini_batch_size": 3}, "2 processes evenly"),
        ({"lora_r": 4}, "--lora_r has no effect without --use_lora"),
        ({"total_training_steps": 0}, "must be at least 1"),
        ({"eval_data_path": "x.jsonl"}, "--validation_split has no effect"),
        ({"num_generations": 8}, "num_generations"),
        ({"max_response_length": 0}, "--max_response_length 0: must be at least 1"),
        ({"lr_scheduler_type": "linear"}, "known are constant, cosine"),
        ({"loss_agg_mode": "mean"}, "known are token-mean"),
        ({"max_num_gen_batches": 8}, "no effect on grpo"),
        ({"kl_loss_type": "k4"}, "known are kl, k1, .* low_var_kl\\+"),
        ({"loss_mode": "ppo"}, "known are vanilla, gspo"),
        ({"kl_loss_coef": 0, "kl_loss_type": "k2"}, "--kl_loss_type has no effect without --kl_loss_coef above 0"),
        ({"kl_coef": 0.1}, "--kl_coef has no effect without --use_kl_in_reward true"),
        ({"algorithm": "rloo", "norm_adv_by_std_in_grpo": "false"}, "no effect without the advantages of grpo or dapo"),
        ({"rollout_is": "token"}, "--rollout_is has no effect without --recompute_log_probs true"),
        ({"overlong_buffer_len": 9}, "at most --max_response_length 8"),
        ({"report_to": "swanlab"}, "pip install swanlab"),
        ({"report_to": "tensorbord"}, "known are none, tensorboard"),
        ({"nproc": 0}, "--nproc 0: must be at least 1"),
        ({"lora_r": 0, "use_lora": "true"}, "--lora_r 0: must be at least 1"),
        ({"ppo_max_token_len_per_gpu": 0}, "--ppo_max_token_len_per_gpu 0: must be at least 1"),
        ({"temperature": "nan"}, "--temperature nan: must be more than 0"),
        ({"val_temperature": -1}, "--val_temperature -1.0: must be more than 0"),
        ({"max_grad_norm": 0}, "--max_grad_norm 0.0: must be more than 0"),
        ({"rollout_is_threshold": 0}, "--rollout_is_threshold 0.0: must be more than 0"),
        ({"reward_timeout": 0}, "--reward_timeout 0.0: must be more than 0"),
        ({"learning_rate": "nan"}, "--learning_rate nan: must be more than 0"),
        ({"seed": -1}, "--seed -1: must be at least 0"),
        ({"kl_loss_coef": -0.1}, "--kl_loss_coef -0.1: must be at least 0"),
        ({"clip_ratio_low": -0.2}, "--clip_ratio_low -0.2: must be at least 0"),
        ({"clip_ratio_high": "nan"}, "--clip_ratio_high nan: must be at least 0"),
    ],
)
def test_flags_that_cannot_work(parse_arguments, changes, message):
    with pytest.raises(UserError, match=message):
        parse_arguments(**changes)


def test_more_workers_than_cores(parse_arguments, tmp_path):
    from cluster import local_cluster

    with pytest.raises(UserError, match="500 processes asked for"), local_cluster(500, tmp_path):
        pass


def test_flags_from_a_file(monkeypatch, tmp_path):
    from arguments import parse_arguments

    yaml = "algorithm: dapo\nmax_response_length: 100\ntrain_batch_size: 64\nlearning_rate: 1e-6\nbf16: false\n"
    (tmp_path / "my.yaml").write_text(yaml + "use_lora: true\ntarget_modules: [q_proj, v_proj]\neval_data_path: null\n")
    monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path / "my.yaml")])
    model_args, _, args = parse_arguments()
    assert (args.learning_rate, args.bf16, model_args.target_modules) == (1e-6, False, ["q_proj", "v_proj"])
    assert (args.algorithm, args.train_batch_size, args.clip_ratio_high, args.kl_loss_coef) == ("dapo", 64, 0.28, 0)
    assert (args.overlong_buffer_len, args.mask_truncated_completions, args.use_kl_in_reward) == (20, False, False)
