"""Lets a trained model write on: a text from the command line, the lines of a file, or what is typed in the terminal.

    python infer.py output_zero2                                                     in the terminal
    python infer.py output_zero2 --prompt "北京１月１日电" --temperature 0              one text
    python infer.py output_zero2 --file my_beginnings.txt --output continuations.jsonl    one text a line, in batches
    python infer.py output_zero2 --score "话说天下大势，分久必合"                         bits of each character

The way of a continuation: EOS + text -> token ids (as prepare.py makes them) -> stream_tokens -> decode_pieces -> text.
"""

import argparse
import json
import math
import re
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from queue import Queue

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from rows import UserError

HALF_CHARACTER = "\ufffd"  # what a tokenizer decodes the first bytes of an unfinished character to


def read_tokenizer(path: str, trust_remote_code: bool = False):
    """The tokenizer in a folder or on the hub, such that what it saves is itself.

    Raises:
        OSError, ValueError: there is none.
    """
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if getattr(tokenizer, "legacy", None):  # Llama's flag, which save_pretrained drops: another tokenizer without it
        tokenizer.init_kwargs["legacy"] = True
    return tokenizer


def check_model_path(path: str) -> None:
    """Raises UserError where `path` is neither a folder with a model nor the form of a hub id."""
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            checkpoints = ", ".join(map(str, sorted(folder.glob("checkpoint-*")))) or "none"
            raise UserError(
                f"{path}: config.json is not in this folder. The training writes it when it ends; its checkpoints: "
                f"{checkpoints}."
            )
    elif folder.exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", path):
        raise UserError(
            f"{path}: there is no such folder. Train first (bash train_zero2.sh), or give the folder of a model, or a "
            "hub id (owner/name)."
        )


def load_trained_model(path: str, trust_remote_code=False, dtype: torch.dtype | None = None, device_map: str = "auto"):
    """Loads a model and its tokenizer, in eval mode.

    Args:
        dtype: by default bf16 where a GPU has it, else fp32.
        device_map: "auto" spreads a model over the GPUs there are; a device's name puts it there.

    Raises:
        UserError: there is no such model.
    """
    check_model_path(path)
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = dtype or (torch.bfloat16 if has_bf16 else torch.float32)
    try:
        tokenizer = read_tokenizer(path, trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: no model could be read there ({str(error).splitlines()[0]}). Give a folder that holds "
            "config.json, tokenizer and weights, or a hub id."
        ) from None
    return model.eval(), tokenizer


def encode_texts(tokenizer, texts: list[str]):
    """Texts as the training has seen them, an EOS before each, padded on the left.

    What looks like a special token in a text is text. Returns `input_ids` and `attention_mask`, (texts, tokens).
    """
    rows = [[tokenizer.eos_token_id, *encode_plain(tokenizer, text)] for text in texts]
    longest = max(map(len, rows))
    masks = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    ids = [[tokenizer.eos_token_id] * (longest - len(row)) + row for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(masks)}


def encode_plain(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def context_length(model) -> int:
    """Tokens that the model can have before it; models with ALiBi (Bloom) set no limit."""
    return getattr(model.config, "max_position_embeddings", sys.maxsize)


def generation_settings(
    model, tokenizer, inputs, max_new_tokens=100, temperature=0.8, top_p=0.9, top_k=0, repetition_penalty=1.0
) -> dict:
    """Arguments of `generate`; temperature 0 takes the likeliest token each time.

    Raises:
        UserError: text and continuation together are longer than the model's context.
    """
    tokens = inputs["input_ids"].shape[1]
    if tokens + max_new_tokens > context_length(model):
        raise UserError(
            f"the text has {tokens} tokens, with max_new_tokens {max_new_tokens} that is more than the model's context "
            f"of {context_length(model)}. Shorten the text or lower max_new_tokens."
        )
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    else:  # neutral values, else generate warns of the model's own ones
        sampling = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
    sampling["repetition_penalty"] = repetition_penalty
    return {**sampling, "max_new_tokens": max_new_tokens, "pad_token_id": tokenizer.eos_token_id}


def stream_tokens(model, inputs, settings: dict, stop_event: threading.Event | None = None) -> Iterator[int]:
    """Yields the ids of a continuation as they are generated, the EOS included.

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
            on_device = {name: values.to(model.device) for name, values in inputs.items()}
            model.generate(**on_device, **settings, stopping_criteria=[pass_on])
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


def decode_pieces(tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Yields the text of growing ids in pieces that never end within a character; special tokens are left out.

    Each step decodes only the last piece and what came after it: the whole text would take quadratic time, the new
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


def stream_continuation(model, tokenizer, text: str, stop_event=None, **settings) -> Iterator[str]:
    """Yields what the model writes after `text`, piece by piece, until it ends the document or has enough.

    Args:
        settings: those of `generation_settings`.

    Raises:
        UserError: text and continuation together are longer than the model's context.
    """
    inputs = encode_texts(tokenizer, [text])
    settings = generation_settings(model, tokenizer, inputs, **settings)
    with closing(stream_tokens(model, inputs, settings, stop_event)) as tokens:
        yield from decode_pieces(tokenizer, tokens)


def continue_batch(model, tokenizer, texts: list[str], **settings) -> list[str]:
    """What the model writes after each of several texts, side by side; raises as `stream_continuation`."""
    inputs = encode_texts(tokenizer, texts)
    settings = generation_settings(model, tokenizer, inputs, **settings)
    on_device = {name: values.to(model.device) for name, values in inputs.items()}
    found = model.generate(**on_device, **settings)[:, inputs["input_ids"].shape[1] :]
    return [decode(tokenizer, ids).rstrip(HALF_CHARACTER) for ids in found]


@torch.no_grad()
def token_bits(model, ids: list[int]) -> torch.Tensor:
    """Bits that each token but the first costs after those before it, as many as the context holds: (tokens - 1,)."""
    length = min(context_length(model), 1024)
    stride, bits = max(1, length // 2), []
    for first in range(1, len(ids), stride):
        window = torch.tensor([ids[max(0, first + stride - length) : first + stride]], device=model.device)
        logits = model(input_ids=window, use_cache=False).logits[0, :-1].float()
        new = min(stride, len(ids) - first)
        bits.append(F.cross_entropy(logits, window[0, 1:], reduction="none")[-new:].cpu() / math.log(2))
    return torch.cat(bits) if bits else torch.zeros(0)


def character_bits(model, tokenizer, text: str) -> list[tuple[str, float]]:
    """Each character of a text with the bits that it costs; the characters of a token share its bits alike.

    A character that is spelt in several tokens, its bytes, costs the sum of theirs. 2 to the power of the mean is the
    perplexity a character; the sum over the text's UTF-8 bytes is the bits per byte of the training's report.
    """
    if not text:
        return []
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    costs = [0.0] * len(text)
    ids = [tokenizer.eos_token_id, *encoded["input_ids"]]
    for bits, (start, end) in zip(token_bits(model, ids).tolist(), encoded["offset_mapping"], strict=True):
        start = min(start, len(text) - 1)
        for place in range(start, max(end, start + 1)):
            costs[place] += bits / max(end - start, 1)
    return list(zip(text, costs, strict=True))


def continue_in_terminal(model, tokenizer, settings: dict) -> None:
    """Reads beginnings from the terminal and streams what follows, until /exit or the end of the input."""
    print("请输入开头，模型接着写。/exit 退出，Ctrl-C 停止当前续写。")
    with suppress(EOFError, KeyboardInterrupt):
        for text in iter(lambda: input("\n开头："), "/exit"):
            try:
                print(text, end="", flush=True)
                for piece in stream_continuation(model, tokenizer, text, **settings):
                    print(piece, end="", flush=True)
                print()
            except KeyboardInterrupt:
                print("（已停止）")
            except UserError as error:
                print(f"\n（{error}）")


def continue_file(model, tokenizer, file: str, output: str, batch_size: int, settings: dict) -> None:
    """Continues each line of a text file; writes a line of {"prompt", "continuation"} for each, batch by batch.

    Raises:
        UserError: there is no text in it, or it isn't UTF-8.
    """
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: {error}; --file takes a UTF-8 text file with one beginning a line.") from None
    beginnings = [line for line in text.split("\n") if line.strip()]
    if not beginnings:
        raise UserError(f"{file}: no text is there; --file takes a text file with one beginning a line.")
    with open(output, "w", encoding="utf-8") as found:
        for first in range(0, len(beginnings), batch_size):
            batch = beginnings[first : first + batch_size]
            for prompt, text in zip(batch, continue_batch(model, tokenizer, batch, **settings), strict=True):
                found.write(json.dumps({"prompt": prompt, "continuation": text}, ensure_ascii=False) + "\n")
            found.flush()
            print(f"{first + len(batch)}/{len(beginnings)} -> {output}")


def print_score(model, tokenizer, text: str) -> None:
    """The bits of each character of a text, and what they make together."""
    costs = character_bits(model, tokenizer, text)
    for character, bits in costs:
        print(f"{bits:6.2f}  {character}")
    total = sum(bits for _, bits in costs)
    size = max(len(text.encode()), 1)
    print(f"{total:.1f} bits: {total / size:.3f} a byte, perplexity a character {2 ** (total / max(len(text), 1)):.1f}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model, or a hub id")
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--prompt", help="continue this text and end")
    task.add_argument("--file", help="continue each line of a text file and end")
    task.add_argument("--score", help="the bits of each character of this text")
    parser.add_argument("--output", default="continuations.jsonl", help="where --file writes")
    parser.add_argument("--batch_size", type=int, default=8, help="lines that --file continues side by side")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="longest continuation, in tokens")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
    parser.add_argument("--top_p", type=float, default=0.9, help="samples among the likeliest tokens of this share")
    parser.add_argument("--top_k", type=int, default=0, help="samples among this many likeliest tokens; 0: all")
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1 makes repetition less likely")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code that comes with the model")
    args = parser.parse_args(argv)

    names = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty")
    settings = {name: getattr(args, name) for name in names}
    try:
        model, tokenizer = load_trained_model(args.model, args.trust_remote_code)
        if args.file:
            continue_file(model, tokenizer, args.file, args.output, args.batch_size, settings)
        elif args.score:
            print_score(model, tokenizer, args.score)
        elif args.prompt is not None:
            print(args.prompt, end="", flush=True)
            for piece in stream_continuation(model, tokenizer, args.prompt, **settings):
                print(piece, end="", flush=True)
            print()
        else:
            continue_in_terminal(model, tokenizer, settings)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
