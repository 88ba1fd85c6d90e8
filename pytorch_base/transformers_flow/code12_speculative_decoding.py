"""Speculative decoding, greedily: a small model guesses, the large one checks all guesses in one pass.

One pass of a large model over five tokens costs hardly more than over one, since its weights have to be read once for
either. So a small model (the draft) writes some tokens, and the large one (the target) computes at once what it would
have written at each of these places: as far as both agree the guesses are taken, and the target's own token follows.
The text is the target's, word for word (Leviathan et al., "Fast Inference from Transformers via Speculative Decoding",
2023; for drawn tokens see code12_speculative_sampling.py). Held against `generate(assistant_model=...)`.

python code12_speculative_decoding.py
"""

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import set_verbosity_error

TEXT = """村口有一棵老槐树，树下有一口老井，井水又清又甜，村里的人都到这里挑水。
夏天的晚上，村里的人都到老槐树下乘凉，老人讲故事，孩子听故事。
老人讲，老槐树是他爷爷的爷爷种的，老井是他爷爷挖的，井水从来没有干过。"""
GUESSES, NEW_TOKENS = 4, 60


def train(hidden_size: int, num_layers: int, steps: int, input_ids: torch.Tensor) -> Qwen2ForCausalLM:
    """A Qwen2 that has seen the text `steps` times."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=int(input_ids.max()) + 1,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = Qwen2ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        model(input_ids=input_ids, labels=input_ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def greedy(model, input_ids: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """[1, length] -> [1, length + num_tokens]."""
    for _ in range(num_tokens):
        token = model(input_ids).logits[:, -1].argmax(-1, keepdim=True)
        input_ids = torch.cat([input_ids, token], dim=1)
    return input_ids


def speculate(target, draft, input_ids: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """As greedy(target, ...); and for each pass of the target how many guesses it was given, and how many it took."""
    end, passes = input_ids.shape[1] + num_tokens, []
    while (length := input_ids.shape[1]) < end:
        guessed = greedy(draft, input_ids, min(GUESSES, end - length - 1))  # one place is left for the target's own
        guesses = guessed[:, length:]
        wanted = target(guessed).logits[:, length - 1 :].argmax(-1)  # [1, guesses + 1], the first after the text
        agree = (guesses == wanted[:, :-1]).long().cumprod(-1).sum().item()  # up to the first difference
        input_ids = torch.cat([input_ids, wanted[:, : agree + 1]], dim=1)
        passes.append((guesses.shape[1], agree))
    return input_ids, passes


def count_passes(model) -> list[int]:
    """Will have one entry for each forward pass of the model."""
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))
    return seen


set_verbosity_error()  # generate warns of how it calls itself
characters = sorted(set(TEXT))
input_ids = torch.tensor([[characters.index(character) for character in TEXT]])
target, draft = train(128, 3, 40, input_ids), train(32, 1, 25, input_ids)
torch.set_grad_enabled(False)
prompt = input_ids[:, :4]
alone = greedy(target, prompt, NEW_TOKENS)
seen = count_passes(target)
ours, passes = speculate(target, draft, prompt, NEW_TOKENS)
ours_passes = len(seen)

seen.clear()
draft.generation_config.num_assistant_tokens = GUESSES
draft.generation_config.num_assistant_tokens_schedule = "constant"
draft.generation_config.assistant_confidence_threshold = 0.0
theirs = target.generate(prompt, assistant_model=draft, do_sample=False, max_new_tokens=NEW_TOKENS)
their_passes = len(seen)

place = prompt.shape[1]
print("".join(characters[i] for i in prompt[0]), end="")
for _, agree in passes:
    written = "".join(characters[i] for i in ours[0, place : place + agree + 1])
    print(f"[{written[:-1]}]{written[-1]}", end="")
    place += agree + 1
print("\n  in brackets what the draft guessed rightly, behind it what the target added itself")
guessed, taken = map(sum, zip(*passes, strict=True))
assert torch.equal(ours, alone) and torch.equal(theirs, alone) and ours_passes == len(passes) < NEW_TOKENS
print(
    f"proof: {NEW_TOKENS} ids equal the target's and the library's; {ours_passes} passes of the target instead of "
    f"{NEW_TOKENS} (the library: {their_passes}), {taken} of {guessed} guesses taken, {taken / guessed:.0%}"
)
