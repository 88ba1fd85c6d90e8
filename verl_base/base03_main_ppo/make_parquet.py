"""Rows of a task's JSONL files -> parquet files for verl's own trainers.

python -m base03_main_ppo.make_parquet cache_data/arithmetic output_main_ppo/data
"""

import random
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet

from rows import UserError, check_prompt, detect_encoding, read_json


def make_prompt_row(row: object, source: str, split: str, number: int) -> dict:
    """A question in the form that verl's RLHFDataset reads; raises UserError for a row that can't be used."""
    messages, ground_truth, data_source = check_prompt(row)
    given, asked = row.get("extra_info") or {}, messages[-1]["content"]
    return {
        "data_source": data_source,
        "prompt": [{"role": message["role"], "content": message["content"]} for message in messages],
        "reward_model": {"style": "rule", "ground_truth": ground_truth},
        "extra_info": {"question": asked, **given, "split": split, "index": number, "source": source},
    }


def make_conversation_row(row: object) -> dict:
    """A worked example in the form that verl's SFT trainer reads; raises UserError for a row that can't be used."""
    turns = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(turns, list) or len(turns) < 2 or not isinstance(turns[-1], dict):
        raise UserError("messages is a list of a question and a reply at least")
    reply = turns[-1].get("content")
    if turns[-1].get("role") != "assistant" or not isinstance(reply, str) or not reply.strip():
        raise UserError("the last message must be the assistant's, and say something")
    check_prompt({"prompt": turns[:-1], "ground_truth": reply})
    return {"messages": [{"role": turn["role"], "content": turn["content"]} for turn in turns]}


def read_rows(path: Path, split: str) -> list[dict]:
    """The rows of a file in verl's form.

    Raises:
        UserError: bad rows, the first ten of them by `file:line`; or ground truths of more than one type.
    """
    rows, bad = [], []
    for number, row, _ in read_json(str(path), detect_encoding(str(path))[0]):
        source = f"{path}:{number}"
        try:
            if isinstance(row, UserError):
                raise row
            made = make_conversation_row(row) if split == "sft" else make_prompt_row(row, source, split, len(rows))
            if split != "sft" and rows:
                kinds = [type(other["reward_model"]["ground_truth"]).__name__ for other in (rows[0], made)]
                if kinds[0] != kinds[1]:
                    raise UserError(f"ground_truth is a {kinds[1]}, in the first row a {kinds[0]}: parquet knows one")
            rows.append(made)
        except UserError as error:
            bad.append(f"{source}: {error}")
    if bad:
        raise UserError("\n  ".join([f"{len(bad)} bad rows in {path}; mend or remove them.", *bad[:10]]))
    if not rows:
        raise UserError(f"{path}: no row in it.")
    return rows


def make_parquet(data: Path, output: Path) -> list[Path]:
    """Writes train.parquet and test.parquet, and sft_train.parquet and sft_test.parquet where there is an sft.jsonl.

    A training prompt that is a validation prompt as well is left out, and counted. A twentieth of the worked examples
    becomes sft_test.

    Raises:
        UserError: a file is missing, or holds bad rows.
    """
    tables = {}
    for split in ("train", "test"):
        if not (data / f"{split}.jsonl").is_file():
            raise UserError(
                f"{data}: there is no {split}.jsonl in it; DATA is a folder with train.jsonl and test.jsonl."
            )
        tables[split] = read_rows(data / f"{split}.jsonl", split)
    validation = {str(row["prompt"]) for row in tables["test"]}
    kept = [row for row in tables["train"] if str(row["prompt"]) not in validation]
    if len(kept) < len(tables["train"]):
        print(f"{len(tables['train']) - len(kept)} prompts of {data / 'train.jsonl'} are validated on, too: left out")
    tables["train"] = kept
    if (data / "sft.jsonl").is_file():
        examples = read_rows(data / "sft.jsonl", "sft")
        random.Random(0).shuffle(examples)
        share = max(1, len(examples) // 20)
        tables |= {"sft_test": examples[:share], "sft_train": examples[share:]}
    output.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), output / f"{name}.parquet")
    return [output / f"{name}.parquet" for name in tables]


if __name__ == "__main__":
    try:
        print(*make_parquet(Path(sys.argv[1]), Path(sys.argv[2])), sep="\n")
    except UserError as error:
        sys.exit(f"error: {error}")
