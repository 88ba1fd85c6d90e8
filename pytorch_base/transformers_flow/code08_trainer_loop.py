"""The Trainer's loop in plain PyTorch: the same losses at every step, and the same weights in the end.

What Trainer.train() does with a data set: shuffle by seed + epoch, pad batches, collect the batches of one step, divide
each loss by the tokens of all of them, clip the gradient's norm, take a step of AdamW (Loshchilov & Hutter, "Decoupled
Weight Decay Regularization", 2017) with no decay on biases and norms, lower the learning rate after a warm-up.

python code08_trainer_loop.py
"""

import copy
from tempfile import TemporaryDirectory

import torch
from transformers import PrinterCallback, Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments

TEXT = """春天，燕子飞回来了。 夏天，荷花开满了池塘，青蛙叫个不停。 秋天，稻子熟了，田里一片金黄。
冬天，下雪了。 早上，太阳从山后面慢慢升起来。 中午，大家在树下休息。 傍晚，炊烟升起来了，孩子们跑回家。
夜里，星星很亮。 雨天，爷爷在屋里修渔网。 晴天，奶奶把被子拿出来晒，院子里满是太阳的味道。"""
IGNORED, END = -100, 0
SEED, EPOCHS, BATCH_SIZE, ACCUMULATION = 7, 3, 2, 2
LEARNING_RATE, WEIGHT_DECAY, WARMUP_STEPS, MAX_GRAD_NORM = 5e-3, 0.1, 3, 1.0
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Rows {"input_ids": ids} -> input_ids, labels and attention_mask [batch, length], padded on the right."""
    ids, pad = [torch.tensor(row["input_ids"]) for row in rows], torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, batch_first=True, padding_value=END),
        "labels": pad(ids, batch_first=True, padding_value=IGNORED),
        "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
    }


def learning_rate(step: int, num_steps: int) -> float:
    """Linear: up from 0 during the warm-up, then down to 0 at the last step's end. `step` counts from 0."""
    if step < WARMUP_STEPS:
        return LEARNING_RATE * step / WARMUP_STEPS
    return LEARNING_RATE * (num_steps - step) / (num_steps - WARMUP_STEPS)


def clip(gradients: list[torch.Tensor]) -> None:
    """Shortens all gradients together to MAX_GRAD_NORM, if they are longer."""
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    for gradient in gradients:
        gradient *= (MAX_GRAD_NORM / (norm + 1e-6)).clamp(max=1)


def adamw(parameter, mean, square, step: int, rate: float, weight_decay: float) -> None:
    """One step in place; so are the running means of the gradient and of its square. `step` counts from 1."""
    mean += (1 - BETA1) * (parameter.grad - mean)
    square += (1 - BETA2) * (parameter.grad**2 - square)
    parameter *= 1 - rate * weight_decay
    parameter -= rate * mean / (1 - BETA1**step) / ((square / (1 - BETA2**step)).sqrt() + EPSILON)


def train(model, rows: list[dict]) -> list[float]:
    """Returns the loss of each step, the mean over its supervised tokens."""
    losses, step = [], 0
    per_step = BATCH_SIZE * ACCUMULATION
    num_steps = EPOCHS * -(-len(rows) // per_step)
    moments = [(torch.zeros_like(parameter), torch.zeros_like(parameter)) for parameter in model.parameters()]
    model.train()
    for epoch in range(EPOCHS):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED + epoch)).tolist()
        for start in range(0, len(rows), per_step):  # the last step of an epoch may have fewer batches
            mine = order[start : start + per_step]
            batches = [collate([rows[i] for i in mine[j : j + BATCH_SIZE]]) for j in range(0, len(mine), BATCH_SIZE)]
            num_tokens = sum((batch["labels"][:, 1:] != IGNORED).sum() for batch in batches)
            losses.append(0.0)
            for batch in batches:
                loss = model(**batch, num_items_in_batch=num_tokens).loss  # the sum over its tokens, by all tokens
                loss.backward()
                losses[-1] += loss.item()
            with torch.no_grad():
                clip([parameter.grad for parameter in model.parameters()])
                for (name, parameter), (mean, square) in zip(model.named_parameters(), moments, strict=True):
                    decay = 0.0 if "norm" in name or "bias" in name else WEIGHT_DECAY
                    adamw(parameter, mean, square, step + 1, learning_rate(step, num_steps), decay)
            model.zero_grad()
            step += 1
    return losses


torch.manual_seed(0)
characters = ["■", *sorted({character for text in TEXT.split() for character in text})]
rows = [{"input_ids": [characters.index(character) for character in text] + [END]} for text in TEXT.split()]
config = Qwen2Config(vocab_size=len(characters), hidden_size=64, intermediate_size=128, num_hidden_layers=2, **HEADS)
ours = Qwen2ForCausalLM(config)
theirs = copy.deepcopy(ours)
losses = train(ours, rows)
with TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder,
        seed=SEED,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH_SIZE,
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        warmup_steps=WARMUP_STEPS,
        max_grad_norm=MAX_GRAD_NORM,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(theirs, arguments, data_collator=collate, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
their_losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
for step, (loss, other) in enumerate(zip(losses, their_losses, strict=True), 1):
    print(f"step {step}: loss {loss:.6f}, the Trainer's {other:.6f}")
loss_gap = max(abs(loss - other) for loss, other in zip(losses, their_losses, strict=True))
pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
weight_gap = max((mine - other).abs().max().item() for mine, other in pairs)
assert loss_gap < 1e-5 and weight_gap < 1e-5 and losses[-1] < losses[0] - 0.5
print(f"proof: losses of {len(losses)} steps differ by at most {loss_gap:.1e}, final weights by {weight_gap:.1e}")
