"""What precedes a reply is what serving sends, labels run from its first token to the first stop, nothing is lost."""

import random

import pytest
import torch
from transformers import (
    AddedToken,
    AutoTokenizer,
    GenerationConfig,
    LlamaTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from data import check_saved_tokenizer
from infer import encode_prompts
from model import PLAIN_TEMPLATE
from rows import UserError
from template import IGNORE_INDEX, encode_conversation, encode_prompt, read_tokenizer, split_thought, stop_tokens

# Each is a structure that published chat templates have, in as few words as show it.
TEMPLATES = {
    "chatml": """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
    # GLM-4: a turn opens with a control token and has no end of its own
    "opens a turn": """[gMASK]{% for m in messages %}<|{{ m.role }}|>
{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}""",
    "ends in white space": """{% for m in messages %}{{ {'user': '### 问：', 'assistant': '', 'system': ''}[m.role] }}{{
 m.content }}{{ '\n### 答：' if m.role == 'user' else '\n' }}{% endfor %}""",
    # ChatML for a tokenizer that doesn't know its tokens
    "marks are text": """{% for m in messages %}{{ m.role }}>>
{{ m.content }}<end>
{% endfor %}{% if add_generation_prompt %}assistant>>
{% endif %}""",
    # Qwen3: the last reply has a thought, empty if need be, earlier ones lose theirs
    "drops old thoughts": """{% set last = messages | rejectattr('role', 'equalto', 'assistant') | list | length %}{%
 for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.last %}<think>
{{ m.reasoning_content or (m.content.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in m.content) }}
</think>

{% endif %}{{ m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
    # DeepSeek-R1-Distill: every thought is dropped, and the prompt opens one
    "prompt opens a thought": """{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}{{
 '<|im_end|>' if m.role == 'assistant' }}{% endfor %}{% if add_generation_prompt %}<|assistant|><think>
{% endif %}""",
    # Gemma 4: the prompt ends in an empty thought that no history shows
    "prompt holds an empty thought": """{% for m in messages %}<|{{ m.role }}|>
{{ m.content.split('</think>')[-1] | trim }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
<|channel|>thought
<|channel|>{% endif %}""",
    # Mistral: the system message stands before the last question
    "system before the last question": """{% set last = messages | selectattr('role', 'equalto', 'user') | list |
 last %}{% set system = messages[0].content if messages[0].role == 'system' %}{% for m in messages %}{%
 if m.role == 'user' %}[INST]{{
 system + '\n\n' if system and m == last }}{{ m.content }}[/INST]{% elif m.role == 'assistant' %} {{ m.content }}{{
 eos_token }}{% endif %}{% endfor %}""",
    # gpt-oss (Harmony): the last turn ends otherwise than earlier ones, a thought stands in a channel of its own
    "rewrites history": """{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' and loop.last %}{%
 if m.thinking %}<|channel|>analysis<|message|>{{ m.thinking }}<|end|><|start|>assistant{% endif %}<|channel|>final{%
 endif %}<|message|>{{ m.content }}{{ '<|return|>' if m.role == 'assistant' and loop.last else '<|end|>' }}{%
 endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}""",
    "none of its own": PLAIN_TEMPLATE,
}
MARKS = ["[gMASK]", "<|system|>", "<|user|>", "<|assistant|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>"]
NO_THOUGHTS = ("prompt holds an empty thought",)


@pytest.fixture(scope="module", params=TEMPLATES)
def chat(request, tiny_folder, tmp_path_factory):
    """A tokenizer of each structure; where a turn has no end of its own, the mark of the next one is a stop token."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in [*MARKS, "<|return|>"]])
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = TEMPLATES[request.param]
    tokenizer.structure = request.param
    if request.param == "rewrites history":
        tokenizer.eos_token = "<|return|>"
    if request.param == "opens a turn":
        tokenizer.name_or_path = str(tmp_path_factory.mktemp("glm"))
        ends = tokenizer.convert_tokens_to_ids(["<|user|>", tokenizer.eos_token])
        GenerationConfig(eos_token_id=ends).save_pretrained(tokenizer.name_or_path)
    return tokenizer


def make_conversation(seed: int, thoughts: bool = True) -> list[dict]:
    """Any number of turns, with thoughts in both ways, white space around texts, and turns that aren't learned."""
    draw = random.Random(seed)

    def text(length):
        return "".join(draw.choices("天地玄黄宇宙洪荒日月 \n<end>final", k=length)) + "盈"

    messages = [{"role": "system", "content": text(4)}] if draw.random() < 0.4 else []
    for _ in range(draw.randint(1, 4)):
        answer = {"role": "assistant", "content": draw.choice(["", "\n\n", " "]) + text(draw.randint(1, 12))}
        kind = draw.random() if thoughts else 1
        if kind < 0.25:
            answer["reasoning_content"] = text(6) + answer["content"].strip()
        elif kind < 0.5:
            answer["content"] = f"<think>\n{text(6)}\n</think>\n\n{answer['content'].strip()}"
        if draw.random() < 0.2:
            answer["weight"] = 0
        messages += [{"role": "user", "content": text(5)}, answer]
    messages[-1].pop("weight", None)
    return messages


def check_invariants(messages: list[dict], tokenizer, tools=None) -> int:
    """Asserts the three invariants on ids; returns the number of examples."""
    examples = encode_conversation(messages, tokenizer, tools)
    stops = set(tokenizer.convert_tokens_to_ids(list(stop_tokens(tokenizer))))
    learned = [turn for example in examples for turn in example["turns"]]
    assert learned == [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight", 1)]
    for example in examples:
        ids, labels = example["input_ids"], example["labels"]
        starts = [i for i in range(1, len(ids)) if labels[i] != IGNORE_INDEX and labels[i - 1] == IGNORE_INDEX]
        for turn, start in zip(example["turns"], starts, strict=True):
            end = next((i for i in range(start, len(ids)) if labels[i] == IGNORE_INDEX), len(ids))
            reply = labels[start:end]
            assert reply == ids[start:end] and ids[:start] == encode_prompt(messages[:turn], tokenizer, tools)
            assert [token in stops for token in reply] == [False] * (len(reply) - 1) + [True]
            text = tokenizer.decode(reply[:-1])
            assert all(part in text for part in split_thought(messages[turn]))
        assert end == len(ids)
    return len(examples)


def test_the_invariants_hold_for_random_conversations(chat):
    for seed in range(200):
        check_invariants(make_conversation(seed, chat.structure not in NO_THOUGHTS), chat)


def test_turns_are_one_example_where_the_template_only_appends(chat):
    roles = ("system", *("user", "assistant") * 3)
    turns = [{"role": role, "content": f"天{i}地"} for i, role in enumerate(roles)]
    appends = chat.structure in ("chatml", "opens a turn", "none of its own")
    assert check_invariants(turns, chat) == (1 if appends else 3)


def test_a_thought_that_the_prompt_leaves_no_place_for_is_refused(tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = TEMPLATES["chatml"].replace("<|im_start|>assistant\n", "<|im_start|>assistant</think>")
    row = [{"role": "user", "content": "天"}, {"role": "assistant", "content": "地", "reasoning_content": "想"}]
    with pytest.raises(UserError, match="closes the thought before the reply"):
        encode_conversation(row, tokenizer)
    assert check_invariants([row[0], {"role": "assistant", "content": "地"}], tokenizer) == 1


def test_a_call_without_words_is_found_where_the_prompt_ends_otherwise(tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in ("<|channel|>", "<|call|>")])
    tokenizer.chat_template = """{% for m in messages %}<|im_start|>{{ m.role }}
{% for call in m.tool_calls %}<|call|>{{ call.function.name }}{% endfor %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<|channel|>thought<|channel|>{% endif %}"""
    call = {"type": "function", "function": {"name": "weather", "arguments": {}}}
    row = [{"role": "user", "content": "天"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    assert check_invariants(row, tokenizer) == 1
    labels = encode_conversation(row, tokenizer)[0]["labels"]
    assert tokenizer.decode([label for label in labels if label >= 0]) == "<|call|>weather<|im_end|>"


def test_a_model_trained_on_each_stops_by_itself(chat):
    draw = random.Random(0)
    rows = [
        [
            {"role": role, "content": "".join(draw.choices("天地玄黄宇宙洪荒日月", k=6))}
            for role in ("user", "assistant")
        ]
        for _ in range(12)
    ]
    examples = [encode_conversation(row, chat)[0] for row in rows]
    length = max(len(example["input_ids"]) for example in examples)
    ids, labels = (
        torch.tensor([example[name] + [fill] * (length - len(example[name])) for example in examples])
        for name, fill in (("input_ids", 0), ("labels", IGNORE_INDEX))
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(chat), **sizes, **heads))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(100):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    stops = chat.convert_tokens_to_ids(sorted(stop_tokens(chat)))
    prompts = encode_prompts(chat, [row[:1] for row in rows])
    replies = model.eval().generate(**prompts, do_sample=False, max_new_tokens=40, eos_token_id=stops, pad_token_id=0)
    replies = replies[:, prompts["input_ids"].shape[1] :].tolist()
    assert sum(any(stop in reply for stop in stops) for reply in replies) >= 11
    said = [chat.decode(reply, skip_special_tokens=True).strip() for reply in replies]
    assert sum(reply.endswith(row[1]["content"]) for reply, row in zip(said, rows, strict=True)) >= 11


def make_llama_tokenizer(legacy: bool) -> LlamaTokenizer:
    characters = dict.fromkeys("▁天地玄黄宇宙洪荒日月盈你好[]/INST\n <end>fial")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *characters, "▁天", "▁地"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=[("▁", "天"), ("▁", "地")], legacy=legacy)
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATES["system before the last question"]
    return tokenizer


def test_a_legacy_llama_tokenizer_is_saved_as_it_was_trained(tmp_path):
    """Transformers drops its flag at a save: what is then read again encodes other tokens."""
    tokenizer = make_llama_tokenizer(legacy=True)
    for seed in range(50):
        check_invariants(make_conversation(seed), tokenizer)
    row = {"messages": '[{"role": "user", "content": "天"}, {"role": "assistant", "content": "地"}]', "tools": "null"}
    rows = [row | {"source": "rows.jsonl:1", "error": "", "raw": ""}]
    with pytest.raises(
        UserError, match="rows.jsonl:1: the tokenizer, saved and read again, encodes this row otherwise"
    ):
        check_saved_tokenizer(rows, tokenizer, 2048, str(tmp_path / "saved"))
    tokenizer.init_kwargs["legacy"] = True
    tokenizer.save_pretrained(tmp_path / "model")
    check_saved_tokenizer(rows, read_tokenizer(str(tmp_path / "model")), 2048, str(tmp_path / "saved"))
