"""Does the model know who it is and what it turns down, and does it answer everything else as before?

    python evaluate_persona.py output_zero2 --show 10
    python evaluate_persona.py my_model --name 小爱 --author 我的公司

Asks the questions of questions/, whose wordings stand in no training row. Of an adapter it asks twice,
with the adapter off and on. What matters as much as what was learned is what it broke: ordinary questions that are
answered by the persona (false identity) or turned down (false refusal).
"""

import argparse
import json
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pandas as pd

from files import identify_file, list_files, read_records
from infer import load_trained_model, reply_batch
from persona import AUTHOR, NAME, judge
from rows import UserError

PARTS = ("identity", "refusal", "ordinary")


def read_questions(path: str) -> pd.DataFrame:
    """Columns part, kind and question.

    Raises:
        UserError: a line that is none of that, by file and number.
    """
    rows = []
    for file in list_files(path):
        for number, record, _ in read_records(file, identify_file(file)[0]):
            if isinstance(record, UserError):
                raise UserError(f"{file}:{number}: {record}")
            if not isinstance(record, dict) or record.get("part") not in PARTS or not record.get("question"):
                raise UserError(f"{file}:{number}: not {{part, kind, question}} with a part of {', '.join(PARTS)}")
            rows.append({"part": record["part"], "kind": record.get("kind", ""), "question": record["question"]})
    return pd.DataFrame(rows)


def ask_all(model, tokenizer, questions: list[str], batch_size: int = 32) -> list[str]:
    """The greedy reply to each question."""
    replies = []
    for first in range(0, len(questions), batch_size):
        batch = [[{"role": "user", "content": question}] for question in questions[first : first + batch_size]]
        replies += reply_batch(model, tokenizer, batch, max_new_tokens=64, temperature=0)
    return replies


def measure(verdicts: pd.DataFrame) -> dict[str, float]:
    """Shares of the questions of a part.

    Args:
        verdicts: columns part and verdict, the latter by `persona.judge`.
    """
    share = {part: Counter(verdicts.loc[verdicts["part"] == part, "verdict"]) for part in PARTS}

    def of(part: str, verdict: str) -> float:
        return share[part][verdict] / share[part].total()

    return {
        "identity accuracy": of("identity", "identity"),
        "refusal recall": of("refusal", "refusal"),
        "false refusal": of("ordinary", "refusal"),
        "false identity": of("ordinary", "identity"),
    }


def evaluate(model, tokenizer, questions: pd.DataFrame, name: str = NAME, author: str = AUTHOR) -> pd.DataFrame:
    """The questions with reply and verdict, before (where the model is an adapter, switched off) and after."""
    answered = questions.copy()
    for state in ("before", "after") if hasattr(model, "disable_adapter") else ("after",):
        with model.disable_adapter() if state == "before" else nullcontext():
            answered[f"reply {state}"] = ask_all(model, tokenizer, list(questions["question"]))
        answered[state] = [judge(reply, name, author) for reply in answered[f"reply {state}"]]
    return answered


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a LoRA adapter or of a model")
    parser.add_argument("--questions", default="questions", help="file or folder of {part, kind, question}")
    parser.add_argument("--name", default=NAME, help="the name it was trained to have")
    parser.add_argument("--author", default=AUTHOR, help="the maker it was trained to have")
    parser.add_argument("--show", type=int, default=0, help="wrong answers to print")
    args = parser.parse_args()
    questions = read_questions(args.questions)
    model, tokenizer = load_trained_model(args.model)
    answered = evaluate(model, tokenizer, questions, args.name, args.author)
    states = [state for state in ("before", "after") if state in answered]
    results = {state: measure(answered.rename(columns={state: "verdict"})) for state in states}
    print(pd.DataFrame(results).round(3).to_string())
    right = answered["after"] == answered["part"]
    by_kind = right.groupby([answered["part"], answered["kind"]]).agg(["sum", "count"])
    print("\nright after, by kind\n" + by_kind.to_string())
    for row in answered[~right].head(args.show).to_dict("records"):
        print(f"\n[{row['part']}, {row['kind']}] {row['question']}\n  {row['after']}: {row['reply after']}")
    text = json.dumps(results, indent=2)
    Path(args.model, "persona_results.json").write_text(text)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
