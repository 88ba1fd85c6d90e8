"""Rows of prompts -> rendered, checked, tokenised, split; which of them a step draws."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import numpy as np

from rows import UserError, check_prompt, detect_encoding, list_files, read_json

VALIDATION = "validation.jsonl"  # in a run's output folder: what it is measured on


@dataclass
class Prompt:
    """One row of the data, ready to be sampled from.

    Args:
        input_ids: the rendered prompt, up to where the assistant begins to speak.
        source: `file:line`, for messages.
    """

    messages: list[dict]
    ground_truth: object
    data_source: str
    source: str
    extra_info: dict = field(default_factory=dict)
    input_ids: list[int] = field(default_factory=list)


def load_prompts(data_path: str, tokenizer, max_prompt_length: int, bad_rows_file: Path | None) -> list[Prompt]:
    """The prompts of a file or folder, in its order.

    Args:
        max_prompt_length: tokens; a longer prompt is a bad row, for its question would lose its beginning.
        bad_rows_file: bad rows are written there with their reasons and left out; None: they are an error.

    Raises:
        UserError: no file, no row, a file that is neither UTF-8 nor GB18030, bad rows (the first ten of them).
    """
    prompts, bad = [], []
    for path in list_files(data_path):
        encoding, _ = detect_encoding(path)
        for number, row, text in read_json(path, encoding):
            source = f"{path}:{number}"
            try:
                if isinstance(row, UserError):
                    raise row
                prompt = Prompt(*check_prompt(row), source=source, extra_info=row.get("extra_info") or {})
                prompt.input_ids = tokenizer.apply_chat_template(
                    prompt.messages, add_generation_prompt=True, return_dict=False
                )
                if len(prompt.input_ids) > max_prompt_length:
                    length = len(prompt.input_ids)
                    raise UserError(f"{length} tokens, more than --max_prompt_length {max_prompt_length}")
                prompts.append(prompt)
            except (UserError, jinja2.TemplateError) as error:  # the latter: the chat template refuses such messages
                bad.append({"source": source, "reason": str(error), "row": text.strip()})
    if bad and bad_rows_file is None:
        first = "\n".join(f"  {row['source']}: {row['reason']}" for row in bad[:10])
        raise UserError(f"{len(bad)} bad rows in {data_path}; mend them or give --skip_bad_rows true.\n{first}")
    if bad:
        bad_rows_file.parent.mkdir(parents=True, exist_ok=True)
        with bad_rows_file.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in bad)
        print(f"{data_path}: {len(bad)} bad rows left out, see {bad_rows_file}")
    if not prompts:
        raise UserError(f"{data_path}: no prompt in it.")
    return prompts


def load_split(data_args, tokenizer, seed: int, output_dir: str) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to learn from, and validation prompts; one that is among both is not learned from, and counted.

    Raises:
        UserError: see `load_prompts`; or nothing is left to learn from.
    """
    bad_rows_file = Path(output_dir, "bad_rows.jsonl") if data_args.skip_bad_rows else None
    if bad_rows_file:
        bad_rows_file.unlink(missing_ok=True)
    prompts = load_prompts(data_args.data_path, tokenizer, data_args.max_prompt_length, bad_rows_file)
    if data_args.eval_data_path:
        validation = load_prompts(data_args.eval_data_path, tokenizer, data_args.max_prompt_length, bad_rows_file)
    else:
        order = np.random.default_rng(seed).permutation(len(prompts))
        share = 0.05 if data_args.validation_split is None else data_args.validation_split
        validation = [prompts[row] for row in order[: max(1, round(share * len(prompts)))]]
    seen = {tuple(prompt.input_ids) for prompt in validation}
    kept = [prompt for prompt in prompts if tuple(prompt.input_ids) not in seen]
    if not kept:
        raise UserError(
            f"{data_args.data_path}: every prompt of it is a validation prompt too, so none is left to learn from."
        )
    if data_args.eval_data_path and len(kept) < len(prompts):
        print(
            f"{len(prompts) - len(kept)} prompts of {data_args.data_path} are validation prompts, too: not learned from"
        )
    return kept, validation


def check_groups(prompts: list[Prompt], data_args, args) -> None:
    """Raises UserError where the completions to a prompt, which are learned from together, might be too many tokens."""
    tokens = args.rollout_n * (max(len(prompt.input_ids) for prompt in prompts) + data_args.max_response_length)
    if tokens > args.ppo_max_token_len_per_gpu:
        raise UserError(
            f"{args.rollout_n} completions to the longest prompt may have {tokens:,} tokens with it, more than "
            f"--ppo_max_token_len_per_gpu {args.ppo_max_token_len_per_gpu}: give more of it, where there is memory for "
            "it, or a smaller --max_response_length or --rollout_n."
        )


def save_prompts(prompts: list[Prompt], path: Path) -> None:
    """Writes rows that `load_prompts` reads."""
    names = ("ground_truth", "data_source", "extra_info")
    rows = [{"prompt": prompt.messages} | {name: getattr(prompt, name) for name in names} for prompt in prompts]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def hash_prompts(prompts: list[Prompt]) -> str:
    """A hash of what is asked and what counts as right."""
    content = [[prompt.input_ids, prompt.ground_truth, prompt.data_source, prompt.extra_info] for prompt in prompts]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:16]


def prompts_of_draw(prompts: list[Prompt], draw: int, batch_size: int, seed: int) -> list[Prompt]:
    """The prompts of the `draw`-th batch: epoch after epoch, each in an order of its own.

    It depends on the number only, so that a resumed run draws what the uninterrupted one would have drawn.
    """
    positions = np.arange(draw * batch_size, (draw + 1) * batch_size)
    orders = {e: np.random.default_rng([seed, e]).permutation(len(prompts)) for e in set(positions // len(prompts))}
    return [prompts[orders[position // len(prompts)][position % len(prompts)]] for position in positions]
