"""Records of preference data -> checked pairs: a prompt, the reply to prefer and the reply to avoid.

Read are the shapes of TRL, LLaMA-Factory, ms-swift, UltraFeedback and hh-rlhf. Where the sides are whole conversations,
the prompt is what they share: a reply cut off at the other side's prompt would be learned with words of the prompt.
"""

import json
import re
from collections.abc import Iterator
from itertools import pairwise

from files import UserError, read_records
from rows import check_order, from_json, is_empty, read_instruction, read_tools, standard_message

# What rows call their parts. The first name that is there is read, further ones are reported as unused.
CHOSEN = ("chosen", "chosen_messages", "output", "response", "messages")
REJECTED = ("rejected", "rejected_response", "rejected_messages")
PROMPT_TEXTS = ("prompt", "instruction", "question", "query")
PROMPTS = (*PROMPT_TEXTS, "messages", "conversations", "context")
CANDIDATES = ("completions", "responses", "answers", "candidates", "output")
ANSWERS = ("messages", "conversations", "output", "response", "completion")

MARKER = re.compile(r"\n\n(Human|Assistant):")


def is_transcript(value: object) -> bool:
    """Whether it is one of hh-rlhf's texts, in which each turn is a paragraph that begins with its speaker."""
    return isinstance(value, str) and value.lstrip().startswith("Human:") and "\n\nAssistant:" in value


def split_transcript(text: str, name: str) -> list[dict]:
    """The turns of such a text; raises UserError where one speaks twice in a row."""
    parts = MARKER.split("\n\n" + text.lstrip())[1:]
    for number, (before, speaker) in enumerate(pairwise(parts[::2]), start=2):
        if speaker == before:
            raise UserError(f"{name}, turn {number}: {speaker} speaks twice in a row")
    return [{"role": role.lower(), "content": said.strip()} for role, said in zip(parts[::2], parts[1::2], strict=True)]


def unpack(value: object) -> object:
    """The value, or the messages whose JSON it is, as in a table's cells; JSON of anything else stays a text."""
    try:
        turns = from_json(value, "it")
    except UserError:
        return value
    listed = turns if isinstance(turns, list) else [turns]
    is_messages = listed and all(isinstance(turn, dict) and {"role", "from"} & turn.keys() for turn in listed)
    return turns if is_messages else value


def read_prompt(row: dict, name: str) -> tuple[list[dict], set[str]]:
    """The turns of the prompt, a text or messages, and the keys that were read for it; raises UserError."""
    value = unpack(row[name])
    if is_transcript(value):
        return split_transcript(value.rstrip().removesuffix("\n\nAssistant:"), name), {name}
    if isinstance(value, str) and name in PROMPT_TEXTS:
        additions = {key: row[key] for key in ("input", "history") if key in row}
        return read_instruction({"instruction": value, "output": ""} | additions)[:-1], {name, *additions}
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"{name} holds no messages, which are objects with role and content, or from and value")
    return turns, {name}


def read_side(value: object, name: str) -> list[dict]:
    """The turns of one side, its answer alone or a whole conversation; raises UserError."""
    value = unpack(value)
    turns = split_transcript(value, name) if is_transcript(value) else value if isinstance(value, list) else [value]
    turns = [{"role": "assistant", "content": turn} if isinstance(turn, str) else turn for turn in turns]
    if not turns or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"{name} is no answer, which is a text, a message or a list of messages")
    if len(turns) > 1 and all(turn.get("role", turn.get("from")) in ("assistant", "gpt", None) for turn in turns):
        raise UserError(f"{name} holds {len(turns)} answers, a pair has one on each side: write a row for each pair")
    return turns


def read_messages(turns: list[dict], name: str) -> tuple[list[dict], set[str]]:
    """Messages of `rows.standard_message`, and the keys not used; raises UserError with the message's number."""
    messages, unused = [], set()
    for number, turn in enumerate(turns, start=1):
        where = f"{name}, message {number} ({turn.get('role', turn.get('from'))})" if len(turns) > 1 else name
        if not {"content", "value"} & turn.keys():  # the Chinese hh-rlhf calls it text
            turn = {"content" if key == "text" else key: value for key, value in turn.items()}
        try:
            message, unused_of_it = standard_message(turn)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if message.pop("weight", 1) == 0 and number == len(turns):
            raise UserError(f"{where}: weight, loss or train takes this reply out, so there is nothing to compare")
        messages.append(message)
        unused |= {f"{name}[].{key}" for key in unused_of_it}
    return messages, unused


def said(messages: list[dict]) -> list[dict]:
    """The messages without the white space at their ends, to compare them."""
    return [message | {"content": message["content"].strip()} for message in messages]


def refuse_other_rows(row: dict) -> None:
    """Raises UserError for a row that has not both sides, with what it is instead."""
    if "chosen" in row or any(name in row for name in REJECTED):
        raise UserError("no rejected reply" if "chosen" in row else "no chosen reply")
    has_answer = any(name in row for name in ANSWERS)
    if has_answer and ("label" in row or "kto_tag" in row):
        raise UserError("a KTO row (an answer and whether it is good); DPO compares chosen with rejected")
    if listed := [name for name in CANDIDATES if isinstance(row.get(name), list)]:
        raise UserError(f"{listed[0]} is a list of answers; write a better one as chosen and a worse one as rejected")
    if has_answer:
        raise UserError("no rejected reply; train_qwen trains on single answers")
    raise UserError(f"neither chosen nor rejected among its keys {sorted(row)}")


def to_pair(row: object) -> tuple[list[dict], dict, dict, list[dict] | None, list[str]]:
    """One row as its prompt (a user's or a tool's message is the last), chosen, rejected, tools, and the keys not used.

    Raises:
        UserError: what is wrong with the row, in words.
    """
    if not isinstance(row, dict):
        raise UserError(f"a row is a JSON object, this is a {type(row).__name__}")
    row = {key: value for key, value in row.items() if not is_empty(value)}
    names = [next((name for name in options if name in row), None) for options in (CHOSEN, REJECTED)]
    if None in names:
        refuse_other_rows(row)
    asked = next((name for name in PROMPTS if name in row and name not in names), None)
    values = [row[name] for name in names]
    if asked and is_transcript(row[asked]) and all(isinstance(value, str) for value in values):
        opening = row[asked].rstrip().removesuffix("\n\nAssistant:")
        values = [value if is_transcript(value) else f"{opening}\n\nAssistant: {value}" for value in values]
    turns = [read_side(value, name) for value, name in zip(values, names, strict=True)]
    if names[0] == "messages" and len(turns[1]) == 1:  # ms-swift's rejected_response: all but its last answer is shared
        turns[1] = [*turns[0][:-1], *turns[1]]
    (chosen, unused), (rejected, more) = map(read_messages, turns, names)
    prompt, of_prompt, used = [], set(), set()
    if asked:
        prompt_turns, used = read_prompt(row, asked)
        prompt, of_prompt = read_messages(prompt_turns, asked)
    for name, side in zip(names, (chosen, rejected), strict=True):
        if side[-1]["role"] != "assistant":
            raise UserError(f"{name} ends with the {side[-1]['role']}'s message, not with an answer")
    if said(chosen) == said(rejected):
        raise UserError("chosen and rejected are the same")
    if len(chosen) > 1 or len(rejected) > 1:
        prompt = split_off(chosen, rejected, prompt, asked)
    if row.get("system"):
        prompt = read_messages([{"role": "system", "content": row["system"]}], "system")[0] + prompt
    if not prompt or prompt[-1]["role"] not in ("user", "tool"):
        last = f"ends with the {prompt[-1]['role']}'s message" if prompt else "is missing"
        raise UserError(f"the prompt {last}; a reply answers a user or a tool")
    check_order([*prompt, chosen[-1]])
    unused |= more | of_prompt | set(row) - {*names, *used, "system", "tools"}
    return prompt, chosen[-1], rejected[-1], read_tools(row.get("tools")), sorted(unused)


def split_off(chosen: list[dict], rejected: list[dict], given: list[dict], name: str | None) -> list[dict]:
    """The prompt of two whole conversations; raises UserError where they share not all but the last message.

    Args:
        given: what stands beside them under `name`: the same prompt, a part of it or the chosen conversation.
    """
    shorter = min(len(chosen), len(rejected))
    shared = next((n for n in range(shorter) if chosen[n] != rejected[n]), shorter)
    if not shared == len(chosen) - 1 == len(rejected) - 1:
        raise UserError(
            f"the two conversations part at message {shared + 1}, before the last answer "
            f"(chosen has {len(chosen)} messages, rejected {len(rejected)})"
        )
    if any(message not in said(chosen) for message in said(given)):
        raise UserError(f"{name} is another than that of the two conversations")
    return chosen[:-1]


def read_pairs(paths: list[str], encodings: list[str]) -> Iterator[dict]:
    """Every record of every file, good or bad: its parts as JSON, its `file:line`, and what is wrong with it."""
    row = None
    for path, encoding in zip(paths, encodings, strict=True):
        for number, value, text in read_records(path, encoding):
            row = {"prompt": "", "chosen": "", "rejected": "", "tools": "null", "source": f"{path}:{number}"}
            row |= {"error": "", "raw": "", "unused_keys": "[]"}
            try:
                if isinstance(value, UserError):
                    raise value
                parts = zip(("prompt", "chosen", "rejected", "tools", "unused_keys"), to_pair(value), strict=True)
                row |= {name: json.dumps(part, ensure_ascii=False) for name, part in parts}
            except UserError as error:
                row |= {"error": str(error), "raw": text.strip()}
            yield row
    if row is None:
        raise UserError(f"{', '.join(paths)}: no row in it.")
