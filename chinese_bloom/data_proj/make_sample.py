"""A small sample in the formats of BELLE's sets, to try prepare.py on: 3 JSON arrays of 40 rows in opendata/.

    python data_proj/make_sample.py
    python prepare.py data_proj/opendata my_data --validation 0.1

BELLE's own sets are on the hub as BelleGroup/train_0.5M_CN, BelleGroup/multiturn_chat_0.8M and others: put their files
into opendata/ instead. The rows are those of data/, and some are spoilt as raw data are.
"""

import json
from pathlib import Path

HERE = Path(__file__).parent
ROWS = 40


def read(language: str, kind: str) -> list[dict]:
    """The rows of data/ of one kind: "instruction" or "conversations"."""
    lines = (HERE.parent / "data" / f"{language}.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if kind in row]


def fold(turns: list[tuple[str, str]]) -> dict:
    """Turns of (speaker, text), the answer last, as a row of BelleGroup/multiturn_chat_0.8M has them."""
    *asked, (_, answer) = turns
    text = "\n".join(f"{speaker}:{text}" for speaker, text in asked)
    return {"instruction": f"{text}\nAssistant:", "input": "", "output": answer}


def make_dialogues() -> list[dict]:
    """The conversations of data/ and, as BELLE has them too, single exchanges in the same layout; the last 4 spoilt."""
    speakers = {"human": "Human", "gpt": "Assistant"}
    conversations = [
        [(speakers[turn["from"]], turn["value"]) for turn in row["conversations"]]
        for language in ("zh", "en", "fr", "es")
        for row in read(language, "conversations")
    ]
    for row in read("en", "instruction"):
        if not row["input"]:
            conversations.append([("Human", row["instruction"]), ("Assistant", row["output"])])
    dialogues = [fold(turns) for turns in conversations[: ROWS - 4]]
    broken = [("Human", "你好"), ("Human", "在吗？"), ("Assistant", "在的，请说。")]
    unanswered = [("Human", "请介绍一下你自己。"), ("Assistant", "")]
    return [*dialogues, dialogues[0], dialogues[7], fold(broken), fold(unanswered)]


def main():
    folder = HERE / "opendata"
    folder.mkdir(exist_ok=True)
    parts = [read("zh", "instruction")[:ROWS], read("code", "instruction")[:ROWS], make_dialogues()]
    for number, rows in enumerate(parts):
        lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        path = folder / f"data_{number}_BelleGroup.json"
        path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
