"""A LLaVA's processor without a model: words by characters, 24-pixel pictures of 9 tokens; and pictures to train on."""

import json

import numpy as np
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AddedToken, CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

IMAGE_TOKENS = 9
CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
MARKS = ["<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
MARKS += ["<s>", "</s>", "[INST]", "[/INST]", "<unk>"]


def make_tokenizer(template: str = CHATML, eos: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, so that it knows every text."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(characters)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("."), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    plain.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token=eos, pad_token="<|im_end|>", bos_token="<s>")
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    tokenizer.add_tokens([AddedToken("<image>", special=False, normalized=False)])
    tokenizer.chat_template = template
    return tokenizer


def make_processor(tokenizer=None, **image_settings) -> LlavaProcessor:
    size = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(**size | image_settings),
        tokenizer=tokenizer or make_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def write_pictures(folder, count: int, seed: int = 0) -> list[str]:
    """Pictures 0.png, 1.png, ... of noise; their names."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return [f"{number}.png" for number in range(count)]


def ask(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write_json(path, rows: list) -> str:
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8")
    return str(path)


def write_lines(path, rows: list) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_mixed_rows(folder, count: int) -> str:
    """Rows of one picture, of two, of none and of several turns, in turns; the folder."""
    names = write_pictures(folder / "images_dl", count)
    rows = []
    for number, name in enumerate(names):
        other = names[(number + 1) % count]
        rows += [
            {"images": [name], "messages": ask(f"<image>\n第{number}张是什么？", "一张图。" * (number + 1))},
            {"images": [name, other], "messages": ask("<image><image>\n比较。", f"不同{number}。")},
            {"messages": ask(f"{number}加一？", f"{number + 1}")},
            {
                "images": [name, other],
                "messages": [*ask("<image>是？", "图。"), *ask(f"<image>呢{number}？", "是。")],
            },
        ]
    write_lines(folder / "rows.jsonl", rows)
    return str(folder)
