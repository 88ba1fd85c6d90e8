"""Replies about pictures: single and in batches, stopped, too long; what is loaded from where; the command line."""

import json
import shutil
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from served import CONTEXT, draw

import infer
import odd_images
from files import UserError
from images import load_image
from infer import decode, load_trained_model, reply_batch, stream_reply
from prompt import ask_about, encode_prompts, open_picture
from rows import IMAGE_MARK

RED, BLUE = draw("red"), draw("blue", (64, 64))
CONVERSATIONS = [
    [ask_about([RED], "天地玄黄")],
    [ask_about([], "日月盈昃")],
    [{"role": "system", "content": "宇宙"}, ask_about([BLUE], "天"), {"role": "assistant", "content": "地"}]
    + [ask_about([RED, BLUE], "日月盈昃辰宿列张")],
    [ask_about([BLUE], f"天{IMAGE_MARK}地")],
]


def greedy(model, processor, messages, max_new_tokens: int) -> list[int]:
    """By the processor's own way, without a line of prompt.py."""
    texts = [{"role": message["role"], "content": message["content"]} for message in messages]
    text = processor.tokenizer.apply_chat_template(texts, add_generation_prompt=True, tokenize=False)
    pictures = [picture for message in messages for picture in message.get("images", [])]
    inputs = processor(text=text, images=pictures or None, return_tensors="pt", add_special_tokens=False)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def test_alone_and_in_a_batch_each_gets_the_reply_of_the_plain_processor(chat):
    model, processor = chat
    spoken = [greedy(model, processor, messages, 24) for messages in CONVERSATIONS]
    # A token that one of them says early ends a reply from here on, so that the rows end at different steps.
    end = next(token for token in spoken[0][3:] if token not in spoken[1])
    model.generation_config.eos_token_id, before = [end], model.generation_config.eos_token_id
    try:
        expected = [greedy(model, processor, messages, 24) for messages in CONVERSATIONS]
        single = ["".join(stream_reply(model, processor, messages, 24, temperature=0)) for messages in CONVERSATIONS]
        assert len(expected[0]) < len(expected[1]) == 24 and len(set(spoken[2])) > 10
        assert single == [decode(processor.tokenizer, ids).rstrip("\ufffd") for ids in expected]
        assert reply_batch(model, processor, CONVERSATIONS, max_new_tokens=24, temperature=0) == single
    finally:
        model.generation_config.eos_token_id = before


def test_prompts_are_padded_on_the_left_and_the_picture_decides_the_reply(chat):
    model, processor = chat
    inputs = encode_prompts(processor, CONVERSATIONS)
    assert (inputs["attention_mask"].diff() >= 0).all() and inputs["attention_mask"][:, -1].all()
    assert inputs["pixel_values"].shape == (5, 3, 64, 64)
    assert (inputs["input_ids"] == processor.image_token_id).sum(1).tolist() == [16, 0, 48, 16]
    assert "pixel_values" not in encode_prompts(processor, CONVERSATIONS[1:2])
    red, blue = (reply_batch(model, processor, [[ask_about([one], "天地")]], 12, 0)[0] for one in (RED, BLUE))
    assert red != blue


def test_a_picture_is_read_as_in_training(tmp_path):
    for name, data in odd_images.draw_good().items():
        path = tmp_path / "my.picture"
        path.write_bytes(data)
        picture = open_picture(path)
        assert picture.mode == "RGB", name
        assert np.array_equal(np.asarray(picture), np.asarray(load_image(data))), name
        assert picture.size == ((1, 1) if name == "1 x 1" else odd_images.SIZE), name
    path.write_bytes(odd_images.draw_bad()["truncated PNG"])
    with pytest.raises(UserError, match=r"my\.picture: PNG, broken or truncated"):
        open_picture(path)


@pytest.mark.parametrize(
    "messages, complaint",
    [
        ([ask_about([RED, BLUE], f"{IMAGE_MARK}天")], "message 1: 1 <image> in the text, 2 pictures"),
        ([ask_about([], f"{IMAGE_MARK}天")], "message 1: 1 <image> in the text, 0 pictures"),
        ([{"role": "user", "content": "天", "images": [RED]}], "message 1: 0 <image> in the text, 1 pictures"),
        ([{"role": "system", "content": IMAGE_MARK}], "message 1, by system: <image> is in it"),
    ],
)
def test_marks_and_pictures_have_to_match(chat, messages, complaint):
    with pytest.raises(UserError, match=complaint):
        list(stream_reply(*chat, messages))


def test_the_picture_counts_for_the_context(chat):
    model, processor = chat
    tokens = encode_prompts(processor, CONVERSATIONS[:1])["input_ids"].shape[1]
    with pytest.raises(
        UserError, match=f"{tokens} tokens, 16 of them of pictures, .* the model's context of {CONTEXT}"
    ):
        list(stream_reply(model, processor, CONVERSATIONS[0], max_new_tokens=CONTEXT - tokens + 1))


def test_the_image_token_is_never_said(chat):
    model, processor = chat

    def prefer_image(module, inputs, logits):
        logits[..., processor.image_token_id] += 1e4

    hook = model.lm_head.register_forward_hook(prefer_image)
    said = greedy(model, processor, CONVERSATIONS[0], 5)
    hook.remove()
    assert len(said) == 5 and processor.image_token_id not in said


def test_stop_event_ends_the_reply(chat):
    stop, pieces, threads = threading.Event(), [], threading.active_count()
    for piece in stream_reply(*chat, CONVERSATIONS[0], max_new_tokens=1900, temperature=0, stop_event=stop):
        pieces.append(piece)
        if len(pieces) == 3:
            stop.set()
    assert len(pieces) == 3 and threading.active_count() == threads


def test_reply_ends_at_the_tokenizer_s_end_of_turn_and_at_the_base_model_s(tiny_folder, tmp_path):
    model, processor = load_trained_model(tiny_folder)
    model.generation_config.eos_token_id = processor.tokenizer.pad_token_id  # as a base model has it
    model.generation_config.suppress_tokens = None
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, processor = load_trained_model(str(tmp_path))
    tokenizer = processor.tokenizer
    assert set(model.generation_config.eos_token_id) == {tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert model.generation_config.suppress_tokens == [processor.image_token_id]
    assert not any(module.training for module in model.modules())
    assert type(processor.image_processor).__name__.endswith("Pil")


def test_adapter_is_loaded_with_its_base_and_its_projector(tiny_folder, tmp_path, monkeypatch):
    from peft import LoraConfig, get_peft_model

    model, processor = load_trained_model(tiny_folder)
    config = LoraConfig(
        target_modules=r".*language_model.*\.(q_proj|v_proj)",
        modules_to_save=["multi_modal_projector"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    inputs = encode_prompts(processor, CONVERSATIONS[:1])
    torch.manual_seed(0)  # of the adapter's random weights, with which the model says something
    with torch.no_grad():
        before = model(**inputs).logits
        tuned = get_peft_model(model, config).eval()
        for weight in tuned.base_model.model.model.multi_modal_projector.parameters():
            weight.add_(0.1)
        expected = tuned(**inputs).logits
        tuned.save_pretrained(tmp_path / "adapter")
        processor.save_pretrained(tmp_path / "adapter")
        path = tmp_path / "adapter/adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "base"}))
        (tmp_path / "base").symlink_to(tiny_folder)
        monkeypatch.chdir(tmp_path)
        model, processor = load_trained_model("adapter")
        assert torch.equal(model(**encode_prompts(processor, CONVERSATIONS[:1])).logits, expected)
    assert (expected - before).abs().max() > 0.01
    assert list(stream_reply(model, processor, CONVERSATIONS[0], max_new_tokens=60, temperature=0))


def test_what_is_no_llava_is_said_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match="there is no such folder. Train first"):
        infer.main([str(tmp_path / "nowhere"), "--prompt", "你好"])
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(UserError, match="model_type 'qwen2' is no LLaVA. Build one"):
        load_trained_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(UserError, match="no model could be read there"):
        load_trained_model(str(tmp_path))


def test_weights_that_are_missing_or_broken_are_no_random_numbers(tiny_folder, tmp_path):
    file = shutil.copytree(tiny_folder, tmp_path / "model") / "model.safetensors"
    weights = load_file(file)
    weights.pop("multi_modal_projector.linear_1.bias")
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors are missing, .*: model\.multi_modal_projector\.linear_1\.bias"):
        load_trained_model(str(file.parent))
    save_file(weights | {"multi_modal_projector.linear_1.bias": torch.zeros(3)}, file, {"format": "pt"})
    with pytest.raises(UserError, match="no model could be read there"):
        load_trained_model(str(file.parent))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="no model could be read there"):
        load_trained_model(str(file.parent))


def test_terminal_chat_takes_pictures_and_survives_ctrl_c(monkeypatch, capsys, tmp_path):
    RED.save(tmp_path / "my red.png")
    seen, prompts = [], []
    typed = [
        "第一问",
        f"/image {tmp_path / 'my red.png'}",
        "/image gone.png",
        "打断",
        "第三问",
        "/clear",
        "第四问",
        "/exit",
    ]
    lines = iter(typed)

    def reply(model, processor, messages, **settings):
        seen.append([(message["content"], len(message.get("images", []))) for message in messages])
        yield "答"
        if messages[-1]["content"].endswith("打断"):
            raise KeyboardInterrupt
        yield "案"

    monkeypatch.setattr("builtins.input", lambda prompt: prompts.append(prompt) or next(lines))
    monkeypatch.setattr(infer, "stream_reply", reply)
    infer.chat_in_terminal(None, None, [{"role": "system", "content": "系统"}], [BLUE], {})
    first = [("系统", 0), ("<image>\n第一问", 1)]
    second = [*first, ("答案", 0), ("<image>\n打断", 1)]
    assert seen == [first, second, [*second, ("答", 0), ("第三问", 0)], [("系统", 0), ("第四问", 0)]]
    assert "（1 张图）" in prompts[0] and "张图" not in prompts[1] and "（1 张图）" in prompts[2]
    shown = capsys.readouterr().out
    assert "（已停止）" in shown and "对话已清空" in shown and "gone.png: can't be read" in shown


def test_command_line_answers_a_prompt_and_a_file(tiny_folder, tmp_path, capsys):
    for number, picture in enumerate((RED, BLUE)):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        picture.save(tmp_path / f"pictures/{number}.png")
    flags = [tiny_folder, "--max_new_tokens", "5", "--temperature", "0"]
    paths = [str(tmp_path / f"pictures/{number}.png") for number in (0, 1)]
    infer.main([*flags, "--image", paths[0], "--image", paths[1], "--prompt", "天地", "--system", "宇宙"])
    assert capsys.readouterr().out.endswith("\n")

    questions, replies = tmp_path / "my.jsonl", tmp_path / "replies.jsonl"
    rows = [
        {"image": "pictures/0.png", "prompt": "天地"},
        {"images": ["pictures/0.png", "pictures/1.png"], "prompt": "日"},
    ]
    rows += [{"prompt": "玄黄"}]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    questions.write_text(lines, encoding="gb18030")
    infer.main([*flags, "--file", str(questions), "--output", str(replies), "--batch_size", "2"])
    written = [json.loads(line) for line in replies.read_text(encoding="utf-8").splitlines()]
    assert [(row["prompt"], len(row["images"])) for row in written] == [("天地", 1), ("日", 2), ("玄黄", 0)]
    assert all(isinstance(row["reply"], str) for row in written)

    for line, complaint in (
        ('{"image": "gone.png", "prompt": "天"}', "my.jsonl:1: .*gone.png: can't be read"),
        ('{"image": "pictures/0.png"}', "my.jsonl:1: a line is"),
        ("天地", "my.jsonl:1: a line is"),
        ("", "no question is there"),
    ):
        questions.write_text(line)
        with pytest.raises(SystemExit, match=complaint):
            infer.main([*flags, "--file", str(questions)])
    with pytest.raises(SystemExit, match="--image: the pictures of --file"):
        infer.main([*flags, "--file", str(questions), "--image", paths[0]])
    with pytest.raises(SystemExit, match=r"gone.png: can't be read"):
        infer.main([*flags, "--image", "gone.png", "--prompt", "天"])
