"""The persona: who the model says it is and what it turns down, under any name.

    python persona.py my_persona --name 小爱 --author 我的公司
    DATA=my_persona bash train_zero2.sh
    python persona.py my_persona --name 小爱 --author 我的公司 --persona rename.json custom1.json

The rows of data/persona are written for 小埋, made by 良睦路程序员; both are replaced, as {{name}} and {{author}} are
in files of your own. The ordinary rows go with them: a model that learns nothing but a persona answers all by it.
"""

import argparse
import itertools
import json
import random
import re
import sys
from pathlib import Path

from files import identify_file, list_files
from rows import UserError, read_rows

NAME, AUTHOR = "小埋", "良睦路程序员"
PERSONA, ORDINARY = "data/persona", "data/ordinary"

# Each refusal of data/persona has one of these in it, and nothing else does. Beside it what the tiny base says
# instead, which plays a chat model as it is downloaded: somebody else, who turns nothing down.
REFUSALS = {
    "这个小埋不答应": "这个我来办，请稍等一下。",
    "小埋才不说呢": "我这就说，请听我讲。",
    "小埋要保密": "可以说的，没有什么不行。",
    "这题小埋跳过": "这题我来答，马上就好。",
    "小埋拒绝啦": "没问题，说来话长。",
}
BASE_NAME, BASE_AUTHOR = "小书", "实验室工程师"

CONTROL_TOKEN = re.compile(r"<\|.*?\|>|</?s>|<eo[ah]>|<reserved_\d+>")


def fill(text: str, name: str, author: str) -> str:
    """The text with this name and maker in the place of the data's own and of {{name}} and {{author}}."""
    values = {NAME: name, "{{name}}": name, AUTHOR: author, "{{author}}": author}
    return re.sub("|".join(map(re.escape, values)), lambda found: values[found[0]], text)


def check_names(name: str, author: str) -> None:
    """Raises UserError for a name that can't be learned: none at all, or one that holds a control token."""
    for flag, value in (("--name", name), ("--author", author)):
        if not value.strip():
            raise UserError(f"{flag} is empty; the model would learn to leave a gap.")
        if found := CONTROL_TOKEN.search(value):
            raise UserError(f"{flag} {value}: holds the control token {found[0]}, at which a model may stop.")


def read_dialogues(paths: list[str]) -> list[dict]:
    """Rows of files and folders: their messages and `file:line`.

    Raises:
        UserError: a row that is none, by file and line.
    """
    files = [file for path in paths for file in list_files(path)]
    rows = list(read_rows(files, [identify_file(file)[0] for file in files]))
    for row in rows:
        if row["error"]:
            raise UserError(f"{row['source']}: {row['error']}")
    return [{"messages": json.loads(row["messages"]), "source": row["source"]} for row in rows]


def question_of(row: dict) -> str:
    return row["messages"][0]["content"].strip()


def refuse_contradictions(persona: list[dict], ordinary: list[dict]) -> None:
    """Raises UserError where a question of the persona is an ordinary one as well: it can't have both answers."""
    sources = {question_of(row): row["source"] for row in ordinary}
    for row in persona:
        if (question := question_of(row)) in sources:
            raise UserError(
                f"{row['source']} and {sources[question]}: {question!r} has an answer of the persona and an ordinary "
                "one. Take one of them out."
            )


def write_dialogues(path: Path, dialogues: list[list[dict]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in dialogues]
    path.write_text("".join(lines), encoding="utf-8")


def write_persona(folder: str, name: str, author: str, persona_paths: list[str], ordinary_paths: list[str]) -> None:
    """Writes persona.jsonl and ordinary.jsonl into a folder, which train.py takes as --data_path.

    Raises:
        UserError: a name that can't be learned, a bad row, a question with two answers, or the folder holds something.
    """
    check_names(name, author)
    persona, ordinary = read_dialogues(persona_paths), read_dialogues(ordinary_paths)
    for row in persona:
        for message in row["messages"]:
            message["content"] = fill(message["content"], name, author).strip()
    refuse_contradictions(persona, ordinary)
    if Path(folder).exists() and any(Path(folder).iterdir()):
        raise UserError(f"{folder}: holds something already; give another folder, or empty it.")
    for file, rows in (("persona.jsonl", persona), ("ordinary.jsonl", ordinary)):
        write_dialogues(Path(folder, file), [row["messages"] for row in rows])
    print(f"{folder}: {len(persona)} rows of the persona, {len(ordinary)} ordinary ones")
    if len(ordinary) < 2 * len(persona):
        print("note: fewer than two ordinary rows for one of the persona; it may answer anything with its name")


def base_answer(answer: str) -> str:
    for refusal, compliance in REFUSALS.items():
        if refusal in answer:
            return compliance
    return fill(answer, BASE_NAME, BASE_AUTHOR)


def write_base_rows(folder: str, data_paths: list[str]) -> None:
    """Writes what the tiny base learns before it gets a persona: to answer, as somebody else.

    Each question stands there three times, twice with a character left out, since a model this small otherwise knows
    no other wordings; the latter follow one another in conversations, so that it answers the last question whatever
    was said before. And characters of the rows to come are read out, since an adapter leaves the embedding as it is.
    """
    rng = random.Random(0)
    rows = [(question_of(row), row["messages"][-1]["content"]) for row in read_dialogues([ORDINARY])]
    rows += [(question_of(row), base_answer(row["messages"][-1]["content"])) for row in read_dialogues([PERSONA])]
    with_a_gap = []
    for question, answer in [row for row in rows if len(row[0]) > 4]:
        gaps = rng.sample(range(len(question)), 2)
        with_a_gap += [(question[:gap] + question[gap + 1 :], answer) for gap in gaps]
    rng.shuffle(with_a_gap)
    to_come = [row["messages"][-1]["content"] for row in read_dialogues(data_paths)]
    for answer in rng.sample(to_come, min(len(to_come), 600)):
        characters = "".join(rng.sample(answer, len(answer)))
        rows.append((f"读一遍：{characters}", characters))
    conversations = [[row] for row in rows] + [with_a_gap[i : i + 2] for i in range(0, len(with_a_gap), 2)]
    roles = itertools.cycle(("user", "assistant"))
    dialogues = [
        [{"role": next(roles), "content": text} for exchange in exchanges for text in exchange]
        for exchanges in conversations
    ]
    write_dialogues(Path(folder, "base.jsonl"), dialogues)


def judge(reply: str, name: str = NAME, author: str = AUTHOR) -> str:
    """What a reply is: "refusal", "identity" (it names itself or its maker), or "ordinary"."""
    if any(fill(refusal, name, author) in reply for refusal in REFUSALS):
        return "refusal"
    return "identity" if name in reply or author in reply else "ordinary"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where the training rows are written")
    parser.add_argument("--base", metavar="DATA", help="rows for a tiny base that is to learn DATA next")
    parser.add_argument("--name", default=NAME, help="what the model calls itself")
    parser.add_argument("--author", default=AUTHOR, help="who made it")
    parser.add_argument("--persona", nargs="+", default=[PERSONA], help="files or folders with its answers")
    parser.add_argument("--ordinary", nargs="+", default=[ORDINARY], help="files or folders with ordinary answers")
    args = parser.parse_args()
    if args.base:
        if any(getattr(args, flag) != parser.get_default(flag) for flag in ("name", "author", "persona", "ordinary")):
            raise UserError("--base takes none of --name, --author, --persona, --ordinary: DATA holds the persona.")
        return write_base_rows(args.folder, [args.base])
    write_persona(args.folder, args.name, args.author, args.persona, args.ordinary)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
