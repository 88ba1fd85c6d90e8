"""Fine-tuning on chats: a template renders them, only replies are learned, and short chats share a row.

Labels are -100 but for what the assistant says and the token that ends it, at which generation stops. Padding wastes a
batch of short chats, so they are laid end to end; position_ids that begin again at 0 tell the model where each begins,
and no token may hear another chat's. Held against the library's template with `generation` marks, collator and model.

python code06_chat_packing.py
"""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import DataCollatorWithFlattening, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

CHATS = [
    [("user", "你好"), ("assistant", "你好！")],
    [
        ("system", "说短句"),
        ("user", "一年有几个月"),
        ("assistant", "十二个月"),
        ("user", "夏天呢"),
        ("assistant", "三个月"),
    ],
    [("user", "水往哪里流"), ("assistant", "往低处流")],
]
START, END, IGNORED = "<|im_start|>", "<|im_end|>", -100
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}{% generation %}"
    "{{ message.content }}<|im_end|>{% endgeneration %}{% else %}{{ message.content }}<|im_end|>{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each character and for both marks."""
    text = "\nsystemuserassistant" + "".join(content for chat in CHATS for _, content in chat)
    vocabulary = {token: number for number, token in enumerate(["<pad>", START, END, *sorted(set(text))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    marks = {"pad_token": "<pad>", "additional_special_tokens": [START, END]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **marks)


def render(chat: list[tuple[str, str]], tokenizer) -> tuple[list[int], list[int]]:
    """input_ids and labels by hand, message by message."""
    input_ids, labels = [], []
    for role, content in chat:
        head, said, line = (tokenizer.encode(text) for text in (f"{START}{role}\n", f"{content}{END}", "\n"))
        input_ids += head + said + line
        labels += [IGNORED] * len(head) + (said if role == "assistant" else [IGNORED] * len(said)) + [IGNORED]
    return input_ids, labels


def pack(rows: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """All in one row. A chat's first label is taken away: the last token of the chat before would be asked for it."""
    packed = {
        "input_ids": [token for ids, _ in rows for token in ids],
        "labels": [label for _, labels in rows for label in [IGNORED, *labels[1:]]],
        "position_ids": [place for ids, _ in rows for place in range(len(ids))],
    }
    return {name: torch.tensor([values]) for name, values in packed.items()}


def pad(rows: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    sequence, ids, labels = torch.nn.utils.rnn.pad_sequence, *zip(*rows, strict=True)
    ids, labels = ([torch.tensor(row) for row in part] for part in (ids, labels))
    mask = sequence([torch.ones_like(row) for row in ids], batch_first=True)
    labels = sequence(labels, batch_first=True, padding_value=IGNORED)
    return {"input_ids": sequence(ids, batch_first=True), "labels": labels, "attention_mask": mask}


def block_mask(position_ids: torch.Tensor) -> torch.Tensor:
    """[1, 1, length, length]: True where the query (row) hears the key: up to itself, in its own chat."""
    chat = (position_ids[0] == 0).cumsum(0)
    return ((chat[:, None] == chat) & torch.ones(len(chat), len(chat)).tril().bool())[None, None]


def learn(model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradients, as one vector."""
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


torch.manual_seed(0)
tokenizer = build_tokenizer()
rows = [render(chat, tokenizer) for chat in CHATS]
for chat, (ids, labels) in zip(CHATS, rows, strict=True):
    messages = [{"role": role, "content": content} for role, content in chat]
    theirs = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    assert ids == theirs["input_ids"] and [int(label != IGNORED) for label in labels] == theirs["assistant_masks"]
    learned = tokenizer.decode([label for label in labels if label != IGNORED])
    print(repr(tokenizer.decode(ids)), "learns", repr(learned))

packed, padded = pack(rows), pad(rows)
for some in (rows, [(ids, ids) for ids, _ in rows]):  # learned are the replies; or all tokens, the first among them
    flat = DataCollatorWithFlattening()([{"input_ids": ids, "labels": labels} for ids, labels in some])
    assert all(torch.equal(values, flat[name]) for name, values in pack(some).items())
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, initializer_range=0.2, **sizes))
ways = {
    "padded": padded,
    "packed": packed,
    "packed, mask by hand": packed | {"attention_mask": block_mask(packed["position_ids"])},
}
ways["packed, one text"] = packed | {"position_ids": torch.arange(packed["input_ids"].numel())[None]}
results = {way: learn(model, batch) for way, batch in ways.items()}
apart = {}
for way, (loss, gradients) in results.items():
    apart[way] = ((gradients - results["padded"][1]).norm() / results["padded"][1].norm()).item()
    print(f"{way:20} {ways[way]['input_ids'].numel():>4} tokens, loss {loss:.6f}, gradients off by {apart[way]:.1e}")
*same, careless = apart.values()
assert max(same) < 1e-5 < 0.1 < careless and (results["padded"][0] - results["packed"][0]).abs() < 1e-5
fewer = 1 - packed["input_ids"].numel() / padded["input_ids"].numel()
print(
    f"proof: ids, labels and packed rows of {len(CHATS)} chats equal the library's; packed, {fewer:.0%} fewer tokens, "
    f"gradients within {max(same):.1e}; off by {careless:.0%} if chats hear each other"
)
