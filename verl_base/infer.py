"""Asks a trained policy, and the model that it was trained from, and shows what each of several completions would earn.

python infer.py output                                            the validation questions, before and after
python infer.py output --question 三十七加二十五等于几？ --ground_truth 六十二 --n 8
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from data import VALIDATION, Prompt, load_prompts
from reward_manager import load_reward_function
from rows import UserError
from tokenizer import find_end_of_turn, find_stop_tokens

MAX_PROMPT_LENGTH = 4096  # tokens


def load_trained_model(path: str, trust_remote_code: bool = False, device: str | None = None):
    """Model and tokenizer of a folder or hub id; a folder with a LoRA adapter gets its base model under it.

    Raises:
        UserError: there is no model.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        tokenizer.eos_token = find_end_of_turn(tokenizer) or tokenizer.eos_token
        if Path(path, "adapter_config.json").exists():
            from peft import AutoPeftModelForCausalLM

            model = AutoPeftModelForCausalLM.from_pretrained(path, trust_remote_code=trust_remote_code)
        else:
            model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no trained model there ({str(error).splitlines()[0]}).") from None
    stop_tokens = find_stop_tokens(tokenizer, model.generation_config)
    # What else a folder recommends for chatting would change the samples.
    model.generation_config = GenerationConfig(eos_token_id=stop_tokens, pad_token_id=tokenizer.pad_token_id)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), tokenizer


def read_results(path: str) -> dict:
    """train_results.json of a run's folder: the model that it began with, what judged it, what it was measured on.

    Raises:
        UserError: there is none.
    """
    results = Path(path, "train_results.json")
    if not results.is_file():
        raise UserError(f"{path}: no train_results.json there, so no run of train.py has come to its end in it.")
    return json.loads(results.read_text("utf-8"))


def load_run(
    path: str, reward_function: str | None = None, timeout: float = 300.0
) -> tuple[dict[str, tuple], object, int]:
    """What the page and the command line ask.

    Args:
        path: the output folder of a run.
        reward_function: file.py:function; the run's own unless given.
        timeout: seconds that it has for a completion.

    Returns:
        Model and tokenizer `before` and `after` the training, the reward function, tokens of the longest completion.

    Raises:
        UserError: no run has come to its end there, or its model or reward function is gone.
    """
    results = read_results(path)
    trust = results["trust_remote_code"]
    judge = load_reward_function(reward_function or results["reward_function"], timeout=timeout)
    models = {"before": load_trained_model(results["model"], trust), "after": load_trained_model(path, trust)}
    return models, judge, results["max_response_length"]


@torch.no_grad()
def sample_scored(
    model, tokenizer, prompt: Prompt, reward_function, max_new_tokens: int, n: int = 8, temperature: float = 1.0
):
    """n sampled completions to one prompt, as dicts, with what the reward function gives each (`score`, `acc` ...).

    Args:
        reward_function: a `RewardFunction`.

    Raises:
        UserError: it failed on one of them.
    """
    inputs = tokenizer.apply_chat_template(
        prompt.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    settings = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        num_return_sequences=n,
        max_new_tokens=max_new_tokens,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    sequences = model.generate(**inputs.to(model.device), generation_config=settings)
    asked = []
    for ids in sequences[:, inputs["input_ids"].shape[1] :]:
        ends = torch.isin(ids, torch.tensor(model.generation_config.eos_token_id, device=ids.device)).nonzero()
        finished = len(ends) > 0
        completion = tokenizer.decode(ids[: ends[0, 0]] if finished else ids)  # as in training, special tokens and all
        asked.append((prompt, completion, finished))
    said = zip(asked, reward_function.ask(asked), strict=True)
    return [{"completion": completion, **figures} for (_, completion, _), figures in said]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the output folder of a run")
    parser.add_argument("--question", help="one question; without it those of --file are asked")
    parser.add_argument("--ground_truth", default="", help="its right answer")
    parser.add_argument("--data_source", default="arithmetic", help="which rule of rewards.py judges it")
    parser.add_argument("--file", help="prompts as train.py reads them; the run's validation prompts unless given")
    parser.add_argument("--first", type=int, default=5, help="so many of the file's prompts")
    parser.add_argument("--reward_function", help="file.py:function; the run's own unless given")
    parser.add_argument("--reward_timeout", type=float, default=300.0, help="seconds that it has for a completion")
    parser.add_argument("--n", type=int, default=8, help="completions to each")
    parser.add_argument("--temperature", type=float, default=1.0)
    args = parser.parse_args(argv)
    models, reward_function, max_new_tokens = load_run(args.model, args.reward_function, args.reward_timeout)
    if args.question:
        messages = [{"role": "user", "content": args.question}]
        prompts = [Prompt(messages, args.ground_truth, args.data_source, source="--question")]
    else:
        file = args.file or str(Path(args.model, VALIDATION))
        prompts = load_prompts(file, models["after"][1], MAX_PROMPT_LENGTH, None)
    for prompt in prompts[: args.first]:
        print(f"\n{prompt.messages[-1]['content']}  [{prompt.ground_truth}]")
        for name, (model, tokenizer) in models.items():
            rows = sample_scored(model, tokenizer, prompt, reward_function, max_new_tokens, args.n, args.temperature)
            mean = sum(row["score"] for row in rows) / len(rows)
            print(f"  {name}: mean score {mean:.2f}")
            for (completion, score), count in Counter((row["completion"], row["score"]) for row in rows).most_common():
                print(f"    {count} x {completion!r} [{score:.2f}]")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
