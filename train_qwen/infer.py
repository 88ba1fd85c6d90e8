"""Talks to a trained model: a full model folder, a LoRA adapter folder or a hub id.

    python infer.py output_zero2                                            chat in the terminal
    python infer.py output_zero2 --prompt "你是谁？" --temperature 0        one question
    python infer.py output_zero2 --file questions.txt --output replies.jsonl    one question a line, in batches

The way of a reply: messages -> encode_prompt (as in training) -> stream_tokens -> decode_pieces -> text.
"""

# The same in every recipe that has it: python tests/copies.py --fix FILE

import argparse
import json
import re
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from queue import Queue

import torch
from transformers import AutoModelForCausalLM

from files import UserError, detect_encoding
from template import encode_prompt, read_tokenizer

# PEFT still asks for it by its old name, whenever an adapter is loaded.
warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated")

HALF_CHARACTER = "\ufffd"  # what a tokenizer decodes the first bytes of an unfinished character to


# >>> model-path
def check_model_path(path: str, named_by: str = "") -> None:
    """Raises UserError where `path` is neither a folder with a model or an adapter nor the form of a hub id."""
    folder = Path(path)
    if folder.is_dir():
        if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            checkpoints = ", ".join(map(str, sorted(folder.glob("checkpoint-*")))) or "none"
            raise UserError(
                f"{named_by}{path}: neither config.json nor adapter_config.json is in this folder. "
                f"The training writes them when it ends; its checkpoints: {checkpoints}."
            )
    elif folder.exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", path):
        raise UserError(
            f"{named_by}{path}: there is no such folder. Train first (bash train_zero2.sh), or give the folder of a "
            "model or of an adapter, or a hub id (owner/name)."
        )


def find_base_model(path: str) -> str | None:
    """The base model of a LoRA adapter folder; None where `path` is a full model.

    A relative base is looked for here first, then in the folder of this recipe, where the training was started.

    Raises:
        UserError: the base is not there.
    """
    config = Path(path, "adapter_config.json")
    if not config.is_file():
        return None
    base = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    in_recipe = Path(__file__).parent / base
    base = str(in_recipe) if in_recipe.exists() and not Path(base).exists() else base
    check_model_path(base, named_by=f"{config} names as its base model ")
    return base


# <<< model-path


def load_trained_model(path: str, trust_remote_code=False, dtype: torch.dtype | None = None, device_map: str = "auto"):
    """Loads a model and its tokenizer for chat, in eval mode.

    Args:
        path: folder of a full model or of a LoRA adapter (its base is loaded too), or a hub id.
        dtype: by default bf16 where a GPU has it, else fp32.
        device_map: "auto" spreads a model over the GPUs there are; a device's name puts it there.

    Returns:
        model, tokenizer; `model.generation_config.eos_token_id` lists every token that ends a reply.

    Raises:
        UserError: there is no such model, or its tokenizer has no chat template.
    """
    check_model_path(path)
    base = find_base_model(path)
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = dtype or (torch.bfloat16 if has_bf16 else torch.float32)
    try:
        tokenizer = read_tokenizer(path, trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            base or path, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"{base or path}: no model could be read there ({str(error).splitlines()[0]}). Give a folder that holds "
            "config.json, tokenizer and weights, or a hub id; the readme says how to download one through a mirror."
        ) from None
    if tokenizer.chat_template is None:
        raise UserError(f"{path}: its tokenizer has no chat template. Give a chat model, or what train.py has written.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # A base model may name another end than the end-of-turn token that the training put into the tokenizer.
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    model.generation_config.eos_token_id = sorted(ends)
    if base is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, path)
    return model.eval(), tokenizer


def encode_prompts(tokenizer, conversations: list[list[dict]], tools: list[dict] | None = None, **template_kwargs):
    """The prompts of several conversations, padded on the left; see `template.encode_prompt`.

    Returns:
        `input_ids` and `attention_mask` of shape (conversations, tokens).
    """
    prompts = [encode_prompt(messages, tokenizer, tools, **template_kwargs) for messages in conversations]
    return tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")


def context_length(model) -> int:
    """Tokens that the model can have before it; models with ALiBi (Bloom) set no limit."""
    return getattr(model.config, "max_position_embeddings", sys.maxsize)


def generation_settings(model, tokenizer, inputs, max_new_tokens, temperature, top_p, repetition_penalty) -> dict:
    """Arguments of `generate`; temperature 0 takes the likeliest token each time.

    Raises:
        UserError: prompt and reply together are longer than the model's context.
    """
    tokens = inputs["input_ids"].shape[1]
    if tokens + max_new_tokens > context_length(model):
        raise UserError(
            f"the conversation has {tokens} tokens, with max_new_tokens {max_new_tokens} that is more than the model's "
            f"context of {context_length(model)}. Start anew, shorten the text or lower max_new_tokens."
        )
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    else:  # neutral values, else generate warns of the model's own ones
        sampling = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
    sampling["repetition_penalty"] = repetition_penalty
    return {**sampling, "max_new_tokens": max_new_tokens, "pad_token_id": tokenizer.pad_token_id}


def stream_tokens(model, inputs, settings: dict, stop_event: threading.Event | None = None) -> Iterator[int]:
    """Yields the ids of a reply as they are generated, the end-of-turn token included.

    Generation runs in a thread of its own. It ends within a token when `stop_event` is set or the iterator is closed,
    and an error in it is raised here.

    Args:
        inputs: `input_ids` and `attention_mask` of shape (1, tokens).
        settings: arguments of `generate`.
    """
    tokens, abandoned = Queue(), threading.Event()
    stop_event = stop_event or threading.Event()

    def pass_on(input_ids, scores, **kwargs):
        tokens.put(input_ids[0, -1].item())
        return torch.full((1,), stop_event.is_set() or abandoned.is_set(), device=input_ids.device)

    def generate():
        try:
            model.generate(**inputs.to(model.device), **settings, stopping_criteria=[pass_on])
            tokens.put(None)
        except Exception as error:
            tokens.put(error)

    thread = threading.Thread(target=generate, daemon=True)
    thread.start()
    try:
        while (token := tokens.get()) is not None:
            if isinstance(token, Exception):
                raise token
            if stop_event.is_set():
                return
            yield token
    finally:
        abandoned.set()
        thread.join()


# >>> decode-pieces
def decode_pieces(tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Yields the text of a growing reply in pieces that never end within a character; special tokens are left out.

    Each step decodes only the last piece and what came after it: the whole reply would take quadratic time, the new
    tokens alone would lose a space where the tokenizer drops it at the start of a text.
    """
    ids, start, shown, piece = [], 0, 0, ""
    for token in tokens:
        ids.append(token)
        before, after = (decode(tokenizer, part) for part in (ids[start:shown], ids[start:]))
        piece = after[len(before) :]
        if piece and not piece.endswith(HALF_CHARACTER):
            yield piece
            start, shown, piece = shown, len(ids), ""
    if rest := piece.rstrip(HALF_CHARACTER):
        yield rest


def decode(tokenizer, ids: list[int]) -> str:
    """Text of token ids, without special tokens."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


# <<< decode-pieces


def stream_reply(
    model, tokenizer, messages, max_new_tokens=512, temperature=0.7, top_p=0.8, repetition_penalty=1.0, stop_event=None
) -> Iterator[str]:
    """Yields the reply to `messages` ([{"role", "content"}, ...]) piece by piece.

    Setting `stop_event` (threading.Event), or closing the iterator, ends the generation within a token.

    Raises:
        UserError: prompt and reply together are longer than the model's context.
    """
    inputs = encode_prompts(tokenizer, [messages])
    settings = generation_settings(model, tokenizer, inputs, max_new_tokens, temperature, top_p, repetition_penalty)
    with closing(stream_tokens(model, inputs, settings, stop_event)) as tokens:
        yield from decode_pieces(tokenizer, tokens)


def reply_batch(
    model, tokenizer, conversations, max_new_tokens=512, temperature=0.7, top_p=0.8, repetition_penalty=1.0
) -> list[str]:
    """The replies to several conversations (a list of what `stream_reply` takes), generated side by side.

    Raises:
        UserError: the longest prompt and its reply together are longer than the model's context.
    """
    inputs = encode_prompts(tokenizer, conversations)
    settings = generation_settings(model, tokenizer, inputs, max_new_tokens, temperature, top_p, repetition_penalty)
    replies = model.generate(**inputs.to(model.device), **settings)[:, inputs["input_ids"].shape[1] :]
    return [decode(tokenizer, reply).rstrip(HALF_CHARACTER) for reply in replies]


def chat_in_terminal(model, tokenizer, start: list[dict], settings: dict) -> None:
    """Reads questions from the terminal and streams the replies until /exit or the end of the input."""
    messages = start
    print("请输入问题。/clear 清空对话，/exit 退出，Ctrl-C 停止当前回答。")
    with suppress(EOFError, KeyboardInterrupt):
        for question in iter(lambda: input("\n用户：").strip(), "/exit"):
            if question == "/clear":
                messages = start
                print("对话已清空。")
            elif question:
                reply, asked = "", [*messages, {"role": "user", "content": question}]
                print("助手：", end="", flush=True)
                try:
                    for piece in stream_reply(model, tokenizer, asked, **settings):
                        reply += piece
                        print(piece, end="", flush=True)
                    print()
                except KeyboardInterrupt:
                    print("（已停止）")
                except UserError as error:
                    print(f"（{error}）")
                messages = [*asked, {"role": "assistant", "content": reply}] if reply else messages


def answer_file(model, tokenizer, file: str, output: str, batch_size: int, start: list[dict], settings: dict) -> None:
    """Answers a text file with one question a line; writes a line of {"prompt", "reply"} for each, batch by batch.

    Raises:
        UserError: there is no question in it.
    """
    text = Path(file).read_text(encoding=detect_encoding(file)[0]) if Path(file).is_file() else ""
    questions = [line.strip() for line in text.split("\n") if line.strip()]
    if not questions:
        raise UserError(f"{file}: no question is there; --file takes a text file with one question a line.")
    with open(output, "w", encoding="utf-8") as replies:
        for first in range(0, len(questions), batch_size):
            batch = questions[first : first + batch_size]
            conversations = [[*start, {"role": "user", "content": question}] for question in batch]
            for question, reply in zip(batch, reply_batch(model, tokenizer, conversations, **settings), strict=True):
                replies.write(json.dumps({"prompt": question, "reply": reply}, ensure_ascii=False) + "\n")
            replies.flush()
            print(f"{first + len(batch)}/{len(questions)} -> {output}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model or of a LoRA adapter, or a hub id")
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--prompt", help="answer this question and end")
    task.add_argument("--file", help="answer a text file with one question a line and end")
    parser.add_argument("--output", default="replies.jsonl", help="where --file writes its replies")
    parser.add_argument("--batch_size", type=int, default=8, help="questions that --file answers side by side")
    parser.add_argument("--system", default="", help="system prompt")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="longest reply, in tokens")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 always takes the likeliest token")
    parser.add_argument("--top_p", type=float, default=0.8, help="samples among the likeliest tokens of this share")
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1 makes repetition less likely")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code that comes with the model")
    args = parser.parse_args(argv)

    settings = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_p", "repetition_penalty")}
    start = [{"role": "system", "content": args.system}] if args.system else []
    try:
        model, tokenizer = load_trained_model(args.model, args.trust_remote_code)
        if args.file:
            answer_file(model, tokenizer, args.file, args.output, args.batch_size, start, settings)
        elif args.prompt:
            for piece in stream_reply(model, tokenizer, [*start, {"role": "user", "content": args.prompt}], **settings):
                print(piece, end="", flush=True)
            print()
        else:
            chat_in_terminal(model, tokenizer, start, settings)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
