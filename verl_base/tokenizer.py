"""The policy's tokenizer, and every token that ends a completion."""

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from rows import UserError


def load_tokenizer(model_args):
    """The model's tokenizer; its EOS is what ends an assistant's turn, or completions would never end.

    Raises:
        UserError: there is no such model, or not one of attention only, or it has no chat template, without which it
            can't be asked anything.
    """
    path = model_args.model_name_or_path
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=model_args.trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=model_args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: no model could be read there ({str(error).splitlines()[0]}). Give a folder that holds "
            "config.json, tokenizer and weights, or a hub id; the readme says how to download one through a mirror."
        ) from None
    others = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if others:
        raise UserError(
            f"{path}: it has layers of {', '.join(sorted(others))}, whose state can't be shared by the completions "
            "to a prompt. Take a model of attention only, or verl's own trainer (base03_main_ppo/train_vllm.sh)."
        )
    if tokenizer.chat_template is None:
        raise UserError(
            f"{path}: its tokenizer has no chat template, so it was not trained to answer. Take the chat or instruct "
            "version, or tune it on conversations first (base03_main_ppo/sft_cpu.sh shows how)."
        )
    end = find_end_of_turn(tokenizer)
    if end is not None:
        tokenizer.eos_token = end
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_generation_config(path: str, trust_remote_code: bool) -> GenerationConfig:
    """What a model's folder says of generating; without a generation_config.json, what its config says."""
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code))


def find_stop_tokens(tokenizer, generation_config: GenerationConfig) -> list[int]:
    """Every token that ends a completion: the EOS that `load_tokenizer` has set, and those that are configured.

    GLM-4 names three of them; at <|user|> alone, it would go on with what the user might say next.
    """
    configured = generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return sorted({tokenizer.eos_token_id, *configured} - {None})


def find_end_of_turn(tokenizer) -> str | None:
    """The special token that the chat template writes right after the assistant's words; None where it writes none."""
    words = "你好"
    turns = [{"role": "user", "content": "问"}, {"role": "assistant", "content": words}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    after = text[text.rindex(words) + len(words) :].strip()
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    ends = [token for token in special.union(tokenizer.all_special_tokens) if after.startswith(token)]
    return max(ends, key=len, default=None)
