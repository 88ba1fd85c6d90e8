"""The command line: flags, adapters, reports, disks and neighbours that misbehave."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from ranks import losses, read_history, run_train, train_here
from safetensors.torch import load_file

import train
from rows import UserError


def paths(model, data, output, eval_data=None):
    flags = ["--model_name_or_path", model, "--data_path", data, "--output_dir", str(output), "--logging_steps", "1"]
    return flags + (["--eval_data_path", eval_data] if eval_data else [])


LORA = ["--use_lora", "true", "--lora_r", "8", "--lora_alpha", "16", "--lora_dropout", "0.1"]


def test_lora_with_gradient_checkpointing_trains_the_named_layers(
    tiny_folder, data_file, eval_file, tmp_path, monkeypatch
):
    more = [
        *LORA,
        "--target_modules",
        "q_proj",
        "v_proj",
        "--gradient_checkpointing",
        "true",
        "--learning_rate",
        "1e-2",
    ]
    models = []
    load_model = train.load_model
    monkeypatch.setattr(train, "load_model", lambda *args: models.append(load_model(*args)) or models[0])
    train_here(monkeypatch, *paths(tiny_folder, data_file, tmp_path, eval_file), *more)
    assert models[0].base_model.model.model.layers[0].gradient_checkpointing
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in adapter} == {"q_proj", "v_proj"}
    assert all(weight.abs().max() > 0 for name, weight in adapter.items() if "lora_B" in name)
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] - 0.1


def test_lora_under_zero3_saves_a_whole_adapter_and_equals_one_process(tiny_folder, data_file, eval_file, tmp_path):
    more = [*LORA, "--lora_dropout", "0", "--gradient_checkpointing", "true", "--learning_rate", "1e-2"]
    more += ["--num_train_epochs", "1", "--save_strategy", "no"]
    zero3 = ["--deepspeed", "ds_zero3_no_offload.json", "--per_device_train_batch_size", "4"]
    run_train(*paths(tiny_folder, data_file, tmp_path / "z3", eval_file), *more, *zero3, processes=2)
    run_train(*paths(tiny_folder, data_file, tmp_path / "one", eval_file), *more, "--per_device_train_batch_size", "8")
    expected, found = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("one", "z3"))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert losses(tmp_path / "z3") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)


def test_a_loss_that_is_not_a_number_ends_the_run(tiny_folder, data_file, tmp_path, monkeypatch):
    with pytest.raises(FloatingPointError, match="lower --learning_rate"):
        train_here(monkeypatch, *paths(tiny_folder, data_file, tmp_path), "--learning_rate", "1e30")


def test_the_validation_loss_is_measured_at_the_end_where_it_was_not_before(
    tiny_folder, data_file, eval_file, tmp_path, monkeypatch
):
    more = ["--eval_strategy", "no", "--max_steps", "2", "--learning_rate", "1e-2"]
    train_here(monkeypatch, *paths(tiny_folder, data_file, tmp_path, eval_file), *more)
    results = json.loads((tmp_path / "train_results.json").read_text())
    assert results["eval_loss_after"] < results["eval_loss_before"]
    assert results["perplexity_after"] == pytest.approx(math.exp(results["eval_loss_after"]))


def test_what_was_not_measured_is_not_reported_and_a_log_file_gets_lines_for_a_bar(
    tiny_folder, data_file, eval_file, tmp_path, monkeypatch, capfd
):
    more = ["--eval_on_start", "false", "--disable_tqdm", "true", "--max_steps", "2", "--save_strategy", "no"]
    train_here(monkeypatch, *paths(tiny_folder, data_file, tmp_path, eval_file), *more)
    results = json.loads((tmp_path / "train_results.json").read_text())
    assert "eval_loss_after" in results and "eval_loss_before" not in results
    printed = "".join(capfd.readouterr())
    assert printed.count("'loss': ") == 2 and "tokens_per_s=" not in printed


def test_report_best_checkpoint_and_early_stopping(tiny_folder, data_file, eval_file, tmp_path, monkeypatch):
    more = ["--learning_rate", "3e-2", "--num_train_epochs", "12", "--early_stopping_patience", "2"]
    more += ["--load_best_model_at_end", "true", "--per_device_train_batch_size", "8"]
    train_here(monkeypatch, *paths(tiny_folder, data_file, tmp_path, eval_file), *more)
    results = json.loads((tmp_path / "train_results.json").read_text())
    validation = losses(tmp_path, "eval_loss")
    assert results["eval_loss_before"] == validation[0] and results["eval_loss_best"] == min(validation)
    assert len(validation) < 13, "it did not stop early"
    best = Path(results["best_checkpoint"])
    assert (best / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
    assert results["eval_loss_after"] == min(validation[1:]) and results["tokens_per_second"] > 0
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "chat_template.jinja").exists() and (tmp_path / "tokenizer.json").exists()


def test_tensors_in_the_logs_are_stored_as_numbers(tiny_folder, data_file, tmp_path, monkeypatch):
    import trainer

    plain_log = trainer.SFTTrainer.log

    def log_with_tensors(self, logs, start_time=None):
        plain_log(self, logs | {"grad_norm": torch.tensor(1.5), "metric": torch.tensor([1, 2])}, start_time)

    monkeypatch.setattr(trainer.SFTTrainer, "log", log_with_tensors)
    train_here(monkeypatch, *paths(tiny_folder, data_file, tmp_path), "--num_train_epochs", "1")
    entry = next(entry for entry in read_history(tmp_path) if "loss" in entry)
    assert entry["grad_norm"] == 1.5 and entry["metric"] == [1, 2]


def test_flags_from_a_file_and_no_validation_rows(tiny_folder, data_file, tmp_path, monkeypatch):
    config = {"model_name_or_path": tiny_folder, "data_path": data_file, "output_dir": str(tmp_path / "out")}
    config |= {"use_cpu": True, "max_steps": 1, "validation_split": 0, "save_strategy": "no"}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    from accelerate.state import AcceleratorState

    monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path / "config.yaml")])
    train.main()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert "eval_loss_before" not in json.loads((tmp_path / "out" / "train_results.json").read_text())


def parse_yaml(text: str, monkeypatch, tmp_path, *words):
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path / "config.yaml"), *words])
    return train.parse_arguments()


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("learning_rate: 1e-4\nmax_steps: 1", {"learning_rate": 1e-4, "max_steps": 1}),
        ("use_lora: true\nlora_dropout: 1e-1\nweight_decay: 1e-2", {"lora_dropout": 0.1, "weight_decay": 0.01}),
        ("use_lora: true\ntarget_modules: q_proj", {"target_modules": ["q_proj"]}),
        ("use_lora: true\ntarget_modules:\n- q_proj\n- v_proj", {"target_modules": ["q_proj", "v_proj"]}),
        ("save_strategy: no\nrun_name:\noptim_args: null", {"save_strategy": "no", "optim_args": None}),
        ("lr_scheduler_kwargs:\n  min_lr: 1e-6\n  on: true", {"lr_scheduler_kwargs": {"min_lr": 1e-6, "on": True}}),
    ],
)
def test_a_file_of_flags_is_read_like_a_command_line(text, flags, tmp_path, monkeypatch):
    model_args, data_args, args = parse_yaml(f"use_cpu: true\n{text}", monkeypatch, tmp_path, "--seed", "7")
    found = vars(model_args) | vars(data_args) | vars(args)
    assert {name: found[name] for name in flags} == flags and found["seed"] == 7


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("lerning_rate: 1e-4", "--lerning_rate: no such flag"),
        ("evaluation_strategy: epoch", "--evaluation_strategy: is now --eval_strategy"),
        ("- learning_rate", "config.yaml: holds no flags"),
        ("a: [", "config.yaml: while parsing"),
    ],
)
def test_a_file_of_flags_that_cannot_be_read(text, reason, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=reason) as raised:
        parse_yaml(text, monkeypatch, tmp_path)
    assert "\n" not in str(raised.value)


def test_a_single_step_has_no_warm_up_and_is_few(tiny_folder, data_file, tmp_path, monkeypatch, capsys):
    train_here(monkeypatch, *paths(tiny_folder, data_file, tmp_path), *LORA, "--max_steps", "1")
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    assert all(weight.abs().max() > 0 for name, weight in adapter.items() if "lora_B" in name)
    printed = capsys.readouterr().out
    assert "note        no warm-up: the run has a single step" in printed
    assert "note        LoRA may hardly change the answers: steps x learning rate is 0.0001, small models" in printed


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--lerning_rate", "1"], "--lerning_rate"),
        (["--lora_r", "16"], "--lora_r has no effect without --use_lora true"),
        (
            ["--validation_split", "0.1", "--eval_data_path", "x"],
            "--validation_split has no effect with --eval_data_path",
        ),
        (["--validation_split", "0", "--early_stopping_patience", "2"], "need validation rows"),
        (["--label_smoothing_factor", "0.1"], "--label_smoothing_factor is not taken: the loss is SFTTrainer.loss"),
        (["--save_only_model", "true"], "--save_only_model is not taken: a run can't go on"),
        (["--packing", "true", "--attn_implementation", "eager"], "--packing true has no effect with --attn_impl"),
        (["--fp16", "true"], "--fp16 true: needs a GPU"),
        (["--model_name_or_path", "./my_model"], r"\./my_model: no model could be read there"),
        (["--evaluation_strategy", "no"], "--evaluation_strategy: is now --eval_strategy"),
        (["--use_deepspeed", "true"], "--use_deepspeed: is now --deepspeed ds_zero2_no_offload.json"),
        (["--warmup-ratio=0.03"], r"--warmup-ratio: is now --warmup_steps, .* \(--warmup_steps 0.03\)"),
        (["--no_cuda", "--fp17"], "--no_cuda: is now --use_cpu true; --fp17: no such flag"),
        (["--learning_rate", "much"], "--learning-rate: invalid float value: 'much'$"),
        (["--num_train_epochs", "0"], "--num_train_epochs 0: nothing would be trained"),
        (["--max_steps", "0"], "--max_steps 0: nothing would be trained"),
        (["--max_steps", "1", "--warmup_steps", "1"], "--warmup_steps 1: the run has a single step"),
        ([*LORA, "--target_modules", "query"], "query: no such module; the linear ones are down_proj, gate_proj"),
    ],
)
def test_flags_that_cannot_work_are_named(flags, reason, tiny_folder, data_file, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=reason):
        train_here(monkeypatch, *paths(tiny_folder, data_file, tmp_path), *flags)


def test_bf16_without_the_hardware_for_it(tiny_folder, data_file, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    with pytest.raises(UserError, match="--bf16 true: this machine has no bf16 arithmetic"):
        train_here(monkeypatch, *paths(tiny_folder, data_file, tmp_path), "--bf16", "true")


def test_a_second_run_in_the_same_folder_is_refused(tiny_folder, data_file, tmp_path, monkeypatch):
    from checkpoint import lock_output_dir

    lock = lock_output_dir(str(tmp_path))
    assert "another run is writing there" in run_train(*paths(tiny_folder, data_file, tmp_path), status=1)
    lock.close()
    lock_output_dir(str(tmp_path)).close()


def test_a_full_disk_leaves_the_last_good_checkpoint(tiny_folder, data_file, tmp_path, monkeypatch):
    from checkpoint import is_complete

    more = ["--per_device_train_batch_size", "8", "--save_strategy", "steps", "--save_steps", "2"]
    save = torch.save
    saved = []

    def save_until_the_disk_is_full(value, path, *args, **kwargs):
        if str(path).endswith("optimizer.pt"):
            saved.append(path)
            if len(saved) == 2:
                Path(path).write_bytes(b"torn")
                raise OSError(28, "No space left on device")
        return save(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", save_until_the_disk_is_full)
    with pytest.raises(UserError, match="No space left on device. Free some space"):
        train_here(monkeypatch, *paths(tiny_folder, data_file, tmp_path), *more)
    assert is_complete(tmp_path / "checkpoint-2") and not is_complete(tmp_path / "checkpoint-4")
    monkeypatch.setattr(torch, "save", save)
    train_here(monkeypatch, *paths(tiny_folder, data_file, tmp_path), *more)
    assert [entry["step"] for entry in read_history(tmp_path) if "loss" in entry] == list(range(1, 10))
