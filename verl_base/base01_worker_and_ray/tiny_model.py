"""A Qwen2 of 140,000 random weights, prompts for it, and the two things that lessons do with it."""

import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

PAD = 0
disable_progress_bar()  # 27 tensors are there at once


def save_tiny_model(folder: str) -> None:
    """Writes the model in fp32. It knows no end-of-sequence token, so every completion has the full length."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)


def make_prompts(count: int, longest: int = 8) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` [count, longest]: random tokens, padded on the left to 3 and more of them."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, longest + 1, (count, 1), generator=generator)
    mask = (torch.arange(longest) >= longest - lengths).long()
    return {"input_ids": torch.randint(1, 512, (count, longest), generator=generator) * mask, "attention_mask": mask}


def generate_greedily(model, input_ids: torch.Tensor, attention_mask: torch.Tensor, length: int = 12) -> torch.Tensor:
    """[prompts, prompt length] -> completions [prompts, length], the likeliest token at each place."""
    settings = GenerationConfig(do_sample=False, max_new_tokens=length, pad_token_id=PAD)
    device = model.device
    with torch.no_grad():
        sequences = model.generate(
            input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), generation_config=settings
        )
    return sequences[:, input_ids.shape[1] :].cpu()


def compute_log_probs(model, input_ids: torch.Tensor) -> torch.Tensor:
    """[rows, length] without padding -> log-probability [rows, length - 1] of each token after those before it."""
    input_ids = input_ids.to(model.device)
    log_probs = torch.log_softmax(model(input_ids=input_ids).logits[:, :-1].float(), dim=-1)
    return log_probs.gather(-1, input_ids[:, 1:, None]).squeeze(-1)
