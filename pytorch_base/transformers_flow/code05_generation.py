"""Generation: greedy, repetition penalty, temperature, top-k, top-p and beam search, each as `model.generate` does it.

A model gives scores (logits) for the next token; what follows is choice. Temperature makes it bolder or more careful,
top-k keeps the k likeliest tokens, top-p the fewest that have a share p together (Holtzman et al., "The Curious Case of
Neural Text Degeneration", 2019), a repetition penalty makes less likely what was there (Keskar et al., "CTRL", 2019).
Beam search keeps several beginnings, and gives the text that is likeliest as a whole.

python code05_generation.py
"""

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

SENTENCES = """今天下雨，我在家里看书。
今天下雨，他在家里做饭。
今天下雨，她在雨里跑步。
今天天晴，我在河边看书。
今天天晴，她在河边钓鱼。
今天天晴，他去山里看花。
明天下雨，他去山里钓鱼。""".splitlines()
END, MAX_NEW_TOKENS, BEAMS, STEPS = 0, 12, 3, 24
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def train_tiny_model() -> tuple[Qwen2ForCausalLM, list[str]]:
    """A Qwen2 that has seen the sentences STEPS times, and its vocabulary of characters."""
    vocabulary = ["■", *sorted({character for sentence in SENTENCES for character in sentence})]
    rows = [[vocabulary.index(character) for character in sentence] + [END] for sentence in SENTENCES]
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=len(vocabulary), num_key_value_heads=2, eos_token_id=END, pad_token_id=END, **SIZES)
    model = Qwen2ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        model(input_ids=torch.tensor(rows), labels=torch.tensor(rows)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), vocabulary


def choose(logits: torch.Tensor, input_ids: torch.Tensor, settings: dict) -> torch.Tensor:
    """Logits [1, vocabulary] after [1, length] -> those of the tokens that may come, -inf elsewhere."""
    if penalty := settings.get("repetition_penalty"):
        seen = logits.gather(1, input_ids)
        logits = logits.scatter(1, input_ids, torch.where(seen < 0, seen * penalty, seen / penalty))
    logits = logits / settings.get("temperature", 1)
    if top_k := settings.get("top_k"):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p := settings.get("top_p"):
        ordered, places = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # share of all likelier tokens
        logits = logits.scatter(1, places, ordered.masked_fill(before >= top_p, -torch.inf))
    return logits


def generate(model, input_ids: torch.Tensor, do_sample: bool, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    """One prompt [1, length] -> ids of prompt and reply, and the probabilities [steps, vocabulary] at each step."""
    probabilities = []
    for _ in range(MAX_NEW_TOKENS):
        logits = choose(model(input_ids).logits[:, -1], input_ids, settings)
        probabilities.append(logits.softmax(-1))
        token = torch.multinomial(probabilities[-1], 1) if do_sample else logits.argmax(-1, keepdim=True)
        input_ids = torch.cat([input_ids, token], dim=1)
        if token.item() == END:
            break
    return input_ids, torch.cat(probabilities)


def beam_search(model, input_ids: torch.Tensor) -> torch.Tensor:
    """One prompt [1, length] -> the best of BEAMS finished texts, by log p per new token; by the sum 在。 would win."""
    beams, scores, finished = input_ids, torch.zeros(1), []
    for step in range(1, MAX_NEW_TOKENS + 1):
        totals = scores[:, None] + model(beams).logits[:, -1].log_softmax(-1)  # [beams, vocabulary]
        best = totals.flatten().topk(2 * BEAMS)  # enough to go on, even if half of them end here
        candidates = [divmod(place, totals.shape[1]) for place in best.indices.tolist()]
        running = []
        for rank, ((beam, token), score) in enumerate(zip(candidates, best.values, strict=True)):
            ids = torch.cat([beams[beam], torch.tensor([token])])
            if token != END and step < MAX_NEW_TOKENS:
                running.append((ids, score))
            elif rank < BEAMS:
                finished.append((score / step, ids))
        if len(finished) >= BEAMS:
            break
        beams, scores = (torch.stack(parts) for parts in zip(*running[:BEAMS], strict=True))
    return max(finished, key=lambda pair: pair[0])[1][None]


model, vocabulary = train_tiny_model()
torch.set_grad_enabled(False)
prompts = {text: torch.tensor([[vocabulary.index(c) for c in text]]) for text in ("今天", "在", "她", "山里")}
prompt = prompts["今天"]
METHODS = {
    "greedy": {"do_sample": False},
    "repetition_penalty": {"do_sample": False, "repetition_penalty": 1.5},
    "temperature": {"do_sample": True, "temperature": 0.7},
    "top_k": {"do_sample": True, "top_k": 3},
    "top_p": {"do_sample": True, "top_p": 0.8},
    "all": {"do_sample": True, "repetition_penalty": 1.2, "temperature": 1.5, "top_k": 8, "top_p": 0.9},
}
gap, count = 0.0, 0
for name, settings in METHODS.items():
    print(f"{name:18}", end="")
    for seed in range(3 if settings["do_sample"] else 1):
        torch.manual_seed(seed)
        ids, probabilities = generate(model, prompt, **settings)
        torch.manual_seed(seed)
        returned = {"output_scores": True, "return_dict_in_generate": True}
        theirs = model.generate(prompt, **settings, **returned, max_new_tokens=MAX_NEW_TOKENS)
        assert torch.equal(ids, theirs.sequences)
        gap, count = max(gap, (probabilities - torch.cat(theirs.scores).softmax(-1)).abs().max().item()), count + 1
        print("", "".join(vocabulary[i] for i in ids[0]), end="")
    print()
settings = {"num_beams": BEAMS, "early_stopping": True, "do_sample": False, "max_new_tokens": MAX_NEW_TOKENS}
for prompt in prompts.values():
    beams, count = beam_search(model, prompt), count + 1
    assert torch.equal(beams, model.generate(prompt, **settings))
    print(f"{'beam':18}", "".join(vocabulary[i] for i in beams[0]))
assert gap < 1e-5
print(f"proof: {count} texts have the ids of model.generate, probabilities differ by at most {gap:.1e}")
