"""The loss of a language model: shift, mask, mean; and why small batches that are accumulated need the token count.

Position t predicts token t + 1, a label of -100 is not learned, and the loss is the mean of -log p over the labels that
are. A batch too large for the memory is taken in parts whose gradients add up. If each part takes the mean over its own
tokens, a token of a short answer weighs more than one of a long answer, and the result is not the large batch's
(transformers had this mistake until 4.46); each part has to divide by the number of tokens of all parts.

python code06_loss.py
"""

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

ROWS = [("一年有几个月？", "十二个月。"), ("春天之后是什么季节？", "夏天。"), ("水往哪里流？", "往低处。")]
ROWS += [("为什么要早睡？", "早睡的人第二天有精神，做事不容易出错，也少生病。")]
IGNORED, END = -100, 0


def build_batch(rows: list[tuple[str, str]], characters: list[str]) -> dict[str, torch.Tensor]:
    """input_ids, labels, attention_mask [batch, length], padded on the right; answers and their end are the labels."""
    input_ids, labels = [], []
    for question, answer in rows:
        learned = [characters.index(character) for character in answer] + [END]
        input_ids.append(torch.tensor([characters.index(character) for character in question] + learned))
        labels.append(torch.tensor([IGNORED] * len(question) + learned))
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(input_ids, batch_first=True, padding_value=END),
        "labels": pad(labels, batch_first=True, padding_value=IGNORED),
        "attention_mask": pad([torch.ones_like(row) for row in input_ids], batch_first=True),
    }


def loss_by_hand(model, batch: dict[str, torch.Tensor], num_tokens: int | None = None) -> torch.Tensor:
    """Sum of -log p of the labels, divided by `num_tokens` or, where that is None, by their number in this batch."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]  # the last has no next
    labels = batch["labels"][:, 1:]
    learned = labels != IGNORED
    log_probs = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)  # [batch, length - 1]
    return -(log_probs * learned).sum() / (learned.sum() if num_tokens is None else num_tokens)


def gradients(model, losses) -> torch.Tensor:
    """The gradients that add up over several losses, as one vector."""
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


torch.manual_seed(0)
characters = ["■", *sorted({character for row in ROWS for text in row for character in text})]
config = Qwen2Config(
    vocab_size=len(characters),
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.1,
)
model = Qwen2ForCausalLM(config)
batch = build_batch(ROWS, characters)
print("what the first row learns: after … comes …")
for place, label in enumerate(batch["labels"][0, 1:].tolist()):
    if label != IGNORED:
        print(f"  {''.join(characters[i] for i in batch['input_ids'][0, : place + 1])} -> {characters[label]}")

loss, theirs = loss_by_hand(model, batch), model(**batch).loss
num_tokens = (batch["labels"] != IGNORED).sum().item()
whole = gradients(model, [loss])
gap = max((loss - theirs).abs().item(), (whole - gradients(model, [theirs])).abs().max().item())
print(f"loss of the whole batch, {num_tokens} labels: {loss:.6f}; of the library: {theirs:.6f}")
assert gap < 1e-5

parts = [build_batch(ROWS[start : start + 2], characters) for start in (0, 2)]
counts = [(part["labels"] != IGNORED).sum().item() for part in parts]
means = [loss_by_hand(model, part) / len(parts) for part in parts]
shares = [loss_by_hand(model, part, num_tokens) for part in parts]
print(f"two parts of 2 rows, with {counts[0]} and {counts[1]} labels:")
errors = {}
for name, losses in (("mean of means", means), ("by all tokens", shares)):
    errors[name] = (gradients(model, losses) - whole).norm().item() / whole.norm().item()
    print(f"  {name}: {sum(losses):.6f}, gradient off by {errors[name]:.1e}")
library = [model(**part, num_items_in_batch=num_tokens).loss for part in parts]  # what the Trainer hands over
gap = max(gap, *((ours - other).abs().item() for ours, other in zip(shares, library, strict=True)))
assert errors["mean of means"] > 0.01 and errors["by all tokens"] < 1e-5 and gap < 1e-5
print(
    f"proof: losses and gradients differ from the library's by {gap:.1e}; in two parts the gradient is off by "
    f"{errors['by all tokens']:.1e} if divided by all tokens, and by {errors['mean of means']:.0%} as a mean of means"
)
