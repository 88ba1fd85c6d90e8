"""Masked language modelling, BERT's training: 15% of the tokens are asked for, and both sides are read to answer.

Of the tokens that are chosen 80% become [MASK], 10% a random token, 10% stay, so that the model has to doubt all that
it reads: in use there is no [MASK] (Devlin et al., "BERT", 2018). Only the chosen ones have a label, and there is no
shift: a place predicts itself. Masks and loss are held against the library's data collator and BertForMaskedLM.

python code06_masked_lm.py
"""

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, DataCollatorForLanguageModeling, PreTrainedTokenizerFast

ROWS = [
    f"{who}在{where}里{''.join(what)}" for who in "他她我" for where, *what in ("山看花", "河钓鱼", "家做饭", "雨跑步")
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, UNKNOWN, CLS, SEP, MASK = range(5)
IGNORED, SHARE, STEPS = -100, 0.15, 150


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each character, [CLS] before and [SEP] behind."""
    vocabulary = [*SPECIAL, *sorted({character for row in ROWS for character in row})]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
    names = ["pad_token", "unk_token", "cls_token", "sep_token", "mask_token"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **dict(zip(names, SPECIAL, strict=True)))


def mask_tokens(input_ids: torch.Tensor, vocab_size: int, generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [batch, length] -> what the model reads, and the labels: the ids of the chosen places, -100 elsewhere."""

    def draw(share: float | torch.Tensor) -> torch.Tensor:
        return torch.bernoulli(share * torch.ones(input_ids.shape), generator=generator).bool()

    chosen = draw(SHARE * (input_ids > MASK))  # none of the special tokens
    masked = draw(0.8) & chosen
    replaced = draw(0.5) & chosen & ~masked  # half of what is left
    words = torch.randint(vocab_size, input_ids.shape, generator=generator)
    read = torch.where(masked, MASK, torch.where(replaced, words, input_ids))
    return read, torch.where(chosen, input_ids, IGNORED)


def loss_by_hand(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean of -log p over the chosen places; no shift."""
    chosen = labels != IGNORED
    return -logits[chosen].log_softmax(-1).gather(-1, labels[chosen][:, None]).mean()


torch.manual_seed(0)
tokenizer = build_tokenizer()
input_ids = tokenizer(ROWS, return_tensors="pt", return_token_type_ids=False)["input_ids"]
size = len(tokenizer)
many = input_ids.repeat(500, 1)
read, labels = mask_tokens(many, size, torch.Generator().manual_seed(1))
collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=SHARE, seed=1)
collator.generator = torch.Generator().manual_seed(1)
theirs = collator([{"input_ids": row} for row in many])
assert torch.equal(read, theirs["input_ids"]) and torch.equal(labels, theirs["labels"])
chosen = labels != IGNORED
same, masked = (read == many)[chosen].float().mean().item(), (read == MASK)[chosen].float().mean().item()
share = chosen.sum().item() / (many > MASK).sum().item()
print(f"of {(many > MASK).sum():,} tokens {share:.1%} are chosen; {masked:.1%} of them masked, {same:.1%} as they were")
assert abs(share - SHARE) < 0.01 and abs(masked - 0.8) < 0.02 and abs(same - 0.1 - 0.1 / size) < 0.02
print("reads: ", *tokenizer.convert_ids_to_tokens(read[3]))
print("labels:", *["·" if i == IGNORED else tokenizer.convert_ids_to_tokens(i) for i in labels[3].tolist()])

sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
config = BertConfig(vocab_size=size, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes)
model, gap = BertForMaskedLM(config), 0.0
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(STEPS):
    read, labels = mask_tokens(input_ids.repeat(4, 1), size, torch.Generator().manual_seed(step))
    output = model(input_ids=read, labels=labels)
    loss = loss_by_hand(output.logits, labels)
    gap = max(gap, (loss - output.loss).abs().item())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 30 == 0:
        print(f"step {step:>3}: loss {loss:.3f}")

model.eval()
answers = {}
for text, where in (("他在[MASK]里钓鱼", 3), ("他在[MASK]里跑步", 3), ("我在家里[MASK]饭", 5)):
    asked = tokenizer(text, return_tensors="pt", return_token_type_ids=False)["input_ids"]
    with torch.no_grad():
        answers[text] = tokenizer.convert_ids_to_tokens(model(asked).logits[0, where].argmax().item())
    print(text, "->", answers[text])
assert list(answers.values()) == ["河", "雨", "做"] and gap < 1e-5  # what decides stands behind
print(
    f"proof: {many.numel():,} masked ids and labels equal the library's, its losses differ by {gap:.1e}; "
    f"the same words before [MASK] give {'/'.join(list(answers.values())[:2])} by what comes after"
)
