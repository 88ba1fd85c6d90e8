"""Labels are the assistant's words and nothing else, image tokens are never cut, every bad row is named."""

import json
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from small_processor import (
    CHATML,
    IMAGE_TOKENS,
    ask,
    make_processor,
    make_tokenizer,
    write_lines,
    write_mixed_rows,
    write_pictures,
)

import data
import images
from data import column, encode_newest, load_encoded, load_splits, read_image_token
from odd_images import draw_bad, draw_good
from prompt import ask_about, encode_prompts
from rows import UserError
from template import IGNORE_INDEX, encode_prompt

# Each is the structure of a published template, in as few words as show it, with the token that ends a reply.
TEMPLATES = {
    "ChatML": (CHATML, "<|im_end|>"),
    "Llama 3": (
        """{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}""",
        "<|eot_id|>",
    ),
    "Vicuna": (
        """{% for m in messages %}{% if m.role == 'system' %}{{ m.content }} {% elif m.role == 'user' %}USER: {{
 m.content }} {% else %}ASSISTANT: {{ m.content }}</s>{% endif %}{% endfor %}{%
 if add_generation_prompt %}ASSISTANT:{% endif %}""",
        "</s>",
    ),
    "Mistral": (
        """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ messages[0].content + '\n\n' if
 loop.index0 == 1 and messages[0].role == 'system' }}{{ m.content }} [/INST]{% elif m.role == 'assistant' %} {{
 m.content }}</s>{% endif %}{% endfor %}""",
        "</s>",
    ),
    "InternLM": (
        """{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
        "<|im_end|>",
    ),
}
TURNS = [
    {"role": "system", "content": "看图说话。"},
    *ask("<image>\n这是什么？", "一只猫。"),
    *ask("它呢<image>与<image>？", "狗。"),
    *ask("谢谢", "不客气。"),
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    for module in (data, images):
        monkeypatch.setattr(module, "CACHE_DIR", tmp_path / "cache")


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def settings(data_path, **changed) -> SimpleNamespace:
    """What `load_splits` reads of DataArguments."""
    defaults = {"eval_data_path": None, "validation_split": 0.2, "model_max_length": 2048, "skip_bad_rows": False}
    return SimpleNamespace(**{"data_path": str(data_path)} | defaults | changed)


def supervised(tokenizer, example: dict) -> str:
    return tokenizer.decode([label for label in example["labels"] if label != IGNORE_INDEX])


@pytest.mark.parametrize("name", TEMPLATES)
def test_labels_of_five_templates(name):
    """Decoded, they are every answer with its end of turn; the ids are those of Transformers' own processor."""
    template, eos = TEMPLATES[name]
    processor = make_processor(make_tokenizer(template, eos))
    tokenizer, image = processor.tokenizer, read_image_token(processor)
    [whole] = encode_newest(TURNS, tokenizer, image, 2048)
    answers = [m["content"] for m in TURNS if m["role"] == "assistant"]
    assert supervised(tokenizer, whole).replace(f" {answers[0]}", answers[0]).replace(" ", "") == "".join(
        f"{answer}{eos}" for answer in answers
    )
    assert all(label in (IGNORE_INDEX, token) for label, token in zip(whole["labels"], whole["input_ids"], strict=True))
    assert whole["pictures"] == [0, 1, 2] and whole["input_ids"].count(image.id) == 3 * IMAGE_TOKENS
    # What precedes a reply is what serving sends: the prompt's ids, with each mark expanded.
    for turn in (2, 4, 6):
        prompt = encode_prompt(TURNS[:turn], tokenizer)
        prompt = [token for i in prompt for token in [i] * (IMAGE_TOKENS if i == image.id else 1)]
        assert whole["input_ids"][: len(prompt)] == prompt and whole["labels"][len(prompt)] != IGNORE_INDEX
        assert whole["labels"][len(prompt) - 1] == IGNORE_INDEX
    text = tokenizer.apply_chat_template(TURNS, tokenize=False)
    pictures = [Image.new("RGB", (30, 20 + number)) for number in range(3)]
    own = processor(text=text, images=pictures, add_special_tokens=False)["input_ids"]
    own = np.ravel(own).tolist()
    assert own[: len(whole["input_ids"])] == whole["input_ids"]
    assert len(own) - len(whole["input_ids"]) <= 1  # a line break that ChatML sets behind its last end of turn


def test_a_whole_is_the_sum_of_its_turns(processor):
    tokenizer, image = processor.tokenizer, read_image_token(processor)
    [whole] = encode_newest(TURNS, tokenizer, image, 2048)
    parts = []
    for turn in (2, 4, 6):
        alone = [m | ({"weight": 0} if m["role"] == "assistant" and i != turn else {}) for i, m in enumerate(TURNS)]
        [part] = encode_newest(alone, tokenizer, image, 2048)
        assert whole["input_ids"][: len(part["input_ids"])] == part["input_ids"]
        assert part["pictures"] == list(range({2: 1, 4: 3, 6: 3}[turn]))  # none that stands behind what is learned
        parts.append([*part["labels"], *[IGNORE_INDEX] * (len(whole["labels"]) - len(part["labels"]))])
    assert np.max(parts, axis=0).tolist() == whole["labels"]


def test_oldest_exchanges_go_with_their_pictures_and_image_tokens_are_never_cut(processor):
    tokenizer, image = processor.tokenizer, read_image_token(processor)
    [whole] = encode_newest(TURNS, tokenizer, image, 2048)
    seen = set()
    for length in range(len(whole["input_ids"]), 10, -1):
        try:
            [example] = encode_newest(TURNS, tokenizer, image, length)
        except UserError as error:
            assert "tokens in its newest exchange, model_max_length is" in str(error)
            break
        assert len(example["input_ids"]) <= length
        assert example["input_ids"].count(image.id) == len(example["pictures"]) * IMAGE_TOKENS
        assert tokenizer.decode(example["input_ids"]).startswith("<|im_start|>system\n看图说话。")
        seen.add((example["exchanges_dropped"], *example["pictures"]))
    assert seen == {(0, 0, 1, 2), (1, 1, 2), (2,)}
    with pytest.raises(UserError, match=r"\d+ tokens in its newest exchange \(3 images of 9\), model_max_length is 30"):
        encode_newest(ask("<image><image><image>", "三"), tokenizer, image, 30)


def test_turns_that_are_examples_of_their_own_have_the_pictures_up_to_them():
    template = CHATML.replace("<|im_end|>", "{{ '<|im_end|>' if loop.last }}")  # as templates that rewrite history
    processor = make_processor(make_tokenizer(template))
    examples = encode_newest(TURNS, processor.tokenizer, read_image_token(processor), 2048)
    assert [example["pictures"] for example in examples] == [[0], [0, 1, 2], [0, 1, 2]]
    for example in examples:
        assert example["input_ids"].count(processor.image_token_id) == len(example["pictures"]) * IMAGE_TOKENS


def test_a_template_that_drops_a_picture_is_named():
    template = CHATML.replace("{{ m.content }}", "{{ m.content | replace('<image>', '') }}")
    processor = make_processor(make_tokenizer(template))
    with pytest.raises(UserError, match="the chat template (drops the user message|makes 0 of 1 <image> marks)"):
        encode_newest(ask("看<image>", "好"), processor.tokenizer, read_image_token(processor), 2048)


def test_a_token_of_another_name_stands_for_pictures():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|picture|>"])
    tokenizer.image_token = "<|picture|>"
    processor = make_processor(tokenizer)
    image = read_image_token(processor)
    [example] = encode_newest(ask("<image>看", "好"), tokenizer, image, 2048)
    assert example["input_ids"].count(image.id) == IMAGE_TOKENS
    [prompt] = encode_prompts(processor, [[ask_about([Image.new("RGB", (9, 9))], "<image>看")]])["input_ids"].tolist()
    assert example["input_ids"][: len(prompt)] == prompt
    with pytest.raises(UserError, match=r"makes 2 of 1 <image> marks, or a text holds the token <\|picture\|>"):
        encode_newest(ask("<image>看<|picture|>", "好"), tokenizer, image, 2048)


def test_rows_are_read_with_places_of_their_pictures_only(tmp_path, processor):
    rows, content_hash = load_encoded(write_mixed_rows(tmp_path / "data", 4), processor, 2048)
    assert len(rows) == 16 and not any(rows["error"])
    assert [len(images) for images in rows["images"]] == [1, 2, 0, 2] * 4
    assert [len(ids) for ids in rows["image_ids"]] == [1, 2, 0, 2] * 4
    place = {"path": str(tmp_path / "data" / "images_dl" / "0.png"), "offset": 0, "size": -1, "coding": ""}
    assert rows["images"][0] == [place]
    cached = sum(file.stat().st_size for file in (tmp_path / "cache").glob("encoded-*/*.arrow"))
    assert cached < 40_000  # no pixels
    assert load_encoded(str(tmp_path / "data"), processor, 2048)[1] == content_hash
    assert load_encoded(str(tmp_path / "data"), make_processor(do_center_crop=False), 2048)[1] == content_hash
    assert load_encoded(str(tmp_path / "data"), processor, 1024)[1] != content_hash
    # A picture changes under its name: other data.
    write_pictures(tmp_path / "data" / "images_dl", 4, seed=1)
    assert load_encoded(str(tmp_path / "data"), processor, 2048)[1] != content_hash


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_pictures_stop_the_run_or_are_skipped_counted_and_written(tmp_path, processor):
    kinds = draw_bad()
    for number, content in enumerate(kinds.values()):
        (tmp_path / f"{number}.png").write_bytes(content)
    (tmp_path / "good.gif").write_bytes(draw_good()["animated"])
    rows = [{"image": f"{number}.png", "messages": ask("<image>看", "好")} for number in range(len(kinds))]
    rows += [{"images": ["good.gif"], "messages": ask("看", f"好{number}")} for number in range(3)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=r"11 of 14 rows.*\n.*rows\.jsonl:1: image 1, 0\.png: an empty file\n") as error:
        load_splits(settings(path), processor, 0, None)
    assert "rows.jsonl:4: image 1, 3.png: JPEG, broken or truncated" in str(error.value)
    report = tmp_path / "bad_rows.jsonl"
    train, validation, summary = load_splits(settings(path, skip_bad_rows=True), processor, 0, str(report))
    assert (summary["bad_rows"], len(train), len(validation)) == (11, 2, 1)
    assert (summary["marks_added"], summary["animated_pictures"], summary["pictures"]) == (2, 2, 1)
    written = [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]
    assert [row["source"] for row in written] == [f"{path}:{number}" for number in range(1, 12)]
    assert all(row["reason"] for row in written)
    assert [json.loads(row["row"])["images"] for row in written] == [[f"{number}.png"] for number in range(11)]
    # A broken picture that was mended under its name is seen.
    (tmp_path / "0.png").write_bytes(draw_good()["JPEG"])
    with pytest.raises(UserError, match=r"10 of 14 rows"):
        load_splits(settings(path), processor, 0, None)


def test_splits_share_no_conversation_and_pictures_on_both_sides_are_counted(tmp_path, processor):
    names = write_pictures(tmp_path / "images", 6)
    (tmp_path / "images" / "copy.png").write_bytes((tmp_path / "images" / "0.png").read_bytes())
    rows = [{"image": name, "messages": ask(f"<image>{k}？", "好")} for name in names for k in range(4)]
    copies = [{"image": "copy.png", "messages": ask(f"<image>{k}？", "好")} for k in range(4)]
    others = [{"messages": ask(f"{k}？", "好")} for k in range(3)]
    path = write_lines(tmp_path / "rows.jsonl", rows + copies + others)
    with tarfile.open(tmp_path / "more.tar", "w") as tar:
        tar.add(path, "0.txt")
    (tmp_path / "more.docx").touch()
    of_folder = load_splits(settings(tmp_path, validation_split=0.3), processor, 0, None)[2]
    unread = [name for name in of_folder["files_not_read"] if not name.startswith(f"{tmp_path}/cache")]
    assert unread == [f"{tmp_path}/more.tar: 1 x .txt", f"{tmp_path}/more.docx"]
    train, validation, summary = load_splits(settings(path, validation_split=0.3), processor, 0, None)
    assert not np.isin(column(train, "key"), column(validation, "key")).any()
    assert summary["copies_of_validation_rows_removed"] == 31 - len(train) - len(validation) > 0
    seen, shown = ({image for images in rows["image_ids"] for image in images} for rows in (train, validation))
    assert summary["validation_pictures_seen_in_training"] == len(seen & shown) > 0
    assert summary["validation_pictures"] == len(shown)
    held_out = write_lines(tmp_path / "eval.jsonl", [rows[0], {"image": "1.png", "messages": ask("<image>新？", "好")}])
    train, validation, summary = load_splits(settings(path, eval_data_path=held_out), processor, 0, None)
    assert (len(train), len(validation), summary["copies_of_validation_rows_removed"]) == (29, 2, 2)
    assert summary["duplicates_kept"] == 3 and summary["text_only_rows"] == 3 and summary["pictures"] == 6
    assert summary["validation_pictures_seen_in_training"] == 2
    with pytest.raises(UserError, match="1 good rows, 0 of them copies of validation rows.*--validation_split 0"):
        load_splits(settings(write_lines(tmp_path / "one.jsonl", others[:1])), processor, 0, None)
