"""Records of three formats -> checked conversations, every row good or bad with its reason."""

# The same in every recipe that has it: python tests/copies.py --fix FILE

import json
from collections.abc import Iterator

from files import UserError, read_records

ROLES = {
    **{"system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant"},
    **{"gpt": "assistant", "function_call": "assistant", "tool": "tool", "observation": "tool"},
}
USED_OF_A_MESSAGE = {"role", "from", "content", "value", "tool_calls", "tool_call_id", "name", "reasoning_content"}
LEARNED = ("weight", "loss", "train")  # OpenAI's, ms-swift's and axolotl's name: 0 or false takes a turn out


def is_empty(value: object) -> bool:
    """None, and NaN: what spreadsheets and Parquet have where nothing was given."""
    return value is None or value != value


def from_json(value: object, name: str) -> object:
    """The value, read as JSON where it is a text, as tables and ShareGPT's tools have it; raises UserError."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} holds no JSON: {error}") from None


def refuse_lone_surrogates(value: object) -> None:
    """Raises UserError where a text holds half a character, which no file and no tokenizer can."""
    if any("\ud800" <= character <= "\udfff" for character in json.dumps(value, ensure_ascii=False)):
        raise UserError("a lone surrogate (a \\ud... without its other half)")


def read_text(content: object) -> str:
    """A message's text, given as a string or as a list of text parts; raises UserError for anything else."""
    if is_empty(content):
        return ""
    if isinstance(content, list):
        texts = []
        for part in content:
            kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
            text = (part.get("text") or part.get("value")) if kind == "text" else None
            if not isinstance(text, str):
                hint = "; train_llava trains on images" if kind in ("image", "image_url", "video") else ""
                raise UserError(f"a part of its content is {kind}, only text can be trained on here{hint}")
            texts.append(text)
        return "".join(texts)
    if not isinstance(content, str):
        raise UserError(f"the text is {type(content).__name__}, not a string")
    return content


def read_calls(calls: object) -> list[dict]:
    """Tool calls as templates want them: `{"type": "function", "function": {"name", "arguments": {...}}}`."""
    calls = from_json(calls, "a tool call")
    checked = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise UserError("a tool call is an object with name and arguments")
        arguments = from_json(function.get("arguments") or {}, "a tool call's arguments")
        if not isinstance(arguments, dict):
            raise UserError("a tool call's arguments are an object")
        kept = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        checked.append(kept | {"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return checked


def read_tools(tools: object) -> list[dict] | None:
    """The functions that the model may call, a list or its JSON text; None where there are none."""
    tools = from_json(tools, "tools") if tools else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError("tools is a list of objects")
    refuse_lone_surrogates(tools)
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def standard_message(turn: object) -> tuple[dict, list[str]]:
    """A message of any format under its standard names, and the keys that were not used.

    Returns:
        `role`, `content` and, where there are some, `reasoning_content`, `tool_calls`, `tool_call_id`, `name`, and
        `weight` 0 on a turn that is not to be learned.

    Raises:
        UserError: what is wrong with it.
    """
    turn = {key: value for key, value in turn.items() if not is_empty(value)}
    given = turn.get("role", turn.get("from"))
    role = ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise UserError(f"unknown role {given!r}, known are {', '.join(ROLES)}")
    message, content = {"role": role}, turn.get("content", turn.get("value"))
    if given == "function_call":
        message |= {"content": "", "tool_calls": read_calls(content)}
    else:
        message["content"] = read_text(content)
    if role == "assistant" and turn.get("tool_calls"):
        message["tool_calls"] = read_calls(turn["tool_calls"])
    if role == "assistant" and read_text(turn.get("reasoning_content")).strip():
        message["reasoning_content"] = read_text(turn["reasoning_content"])
    message |= {key: turn[key] for key in ("tool_call_id", "name") if isinstance(turn.get(key), str)}
    if not message["content"].strip() and role != "tool" and "tool_calls" not in message:
        raise UserError("the text is empty")
    refuse_lone_surrogates(message)
    unused = set(turn) - USED_OF_A_MESSAGE - set(LEARNED)
    for key in LEARNED:
        if role != "assistant" and turn.get(key):
            unused.add(key)
        elif turn.get(key, 1) not in (0, 1):
            raise UserError(f"{key} is {turn[key]!r}; a turn is learned (1, true) or not (0, false)")
        elif role == "assistant" and not turn.get(key, 1):
            message["weight"] = 0
    return message, sorted(unused)


def to_messages(row: object) -> tuple[list[dict], list[dict] | None, list[str]]:
    """One row of any of the three formats as messages of `standard_message`, its tools, and the keys not used.

    Raises:
        UserError: what the row lacks, in words.
    """
    if not isinstance(row, dict):
        raise UserError(f"a row is a JSON object, this is a {type(row).__name__}")
    row = {key: value for key, value in row.items() if not is_empty(value)}
    name = next((name for name in ("messages", "conversations") if name in row), None)
    if "chosen" in row and "rejected" in row:
        raise UserError("a preference row (chosen, rejected); baichuan2_dpo trains on those")
    if name:
        turns, used = from_json(row[name], name), {name, "system", "tools"}
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise UserError(f"{name} is a list of objects with role and content, or from and value")
    elif "instruction" in row or "output" in row:
        turns, used = read_instruction(row), {"instruction", "input", "output", "history", "system", "tools"}
    else:
        hint = "; model_clm trains on plain text" if "text" in row else ""
        raise UserError(f"none of messages, conversations, instruction among its keys {sorted(row)}{hint}")
    if row.get("system"):
        turns = [{"role": "system", "content": row["system"]}, *turns]
    messages, unused = [], set(row) - used
    for number, turn in enumerate(turns, start=1):
        try:
            message, unused_of_it = standard_message(turn)
        except UserError as error:
            raise UserError(f"message {number} ({turn.get('role', turn.get('from'))}): {error}") from None
        messages.append(message)
        unused |= {f"{name or 'history'}[].{key}" for key in unused_of_it}
    check_order(messages)
    return messages, read_tools(row.get("tools")), sorted(unused)


def read_instruction(row: dict) -> list[dict]:
    """The turns of a row of instruction, input, output and history; raises UserError where one is missing."""
    if "output" not in row:
        raise UserError("no output")
    question, addition, history = row.get("instruction", ""), row.get("input", ""), row.get("history", [])
    if not isinstance(question, str) or not isinstance(addition, str):
        raise UserError("instruction and input are strings")
    history = from_json(history, "history")
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise UserError("history is a list of [question, answer] pairs")
    pairs = [*history, ("\n".join(text for text in (question, addition) if text.strip()), row["output"])]
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]


def check_order(messages: list[dict]) -> None:
    """Raises UserError where an answer has no question, a result no call, or the end no answer.

    Questions in a row and later system messages are left to the chat template.
    """
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError("no assistant turn, so there is nothing to learn")
    before = {"role": "system"}
    for number, message in enumerate(messages, start=1):
        role, answers = message["role"], before["role"] in ("user", "tool")
        asked = any(earlier["role"] == "user" for earlier in messages[: number - 1])
        if role == "assistant" and not (answers or asked and before["role"] == "system"):
            raise UserError(f"message {number}: roles in the wrong order, assistant where user was expected")
        if role == "tool" and before["role"] != "tool" and "tool_calls" not in before:
            raise UserError(f"message {number}: roles in the wrong order, a tool's result without its call")
        before = message
    if before["role"] != "assistant":
        raise UserError(f"the last message is the {before['role']}'s, so its answer is missing")


def read_rows(paths: list[str], encodings: list[str]) -> Iterator[dict]:
    """Every row of every file, good or bad: its messages and tools as JSON, its `file:line`, and what is wrong."""
    row = None
    for path, encoding in zip(paths, encodings, strict=True):
        for number, value, text in read_records(path, encoding):
            row = {"messages": "", "tools": "null", "source": f"{path}:{number}"}
            row |= {"error": "", "raw": "", "unused_keys": "[]"}
            try:
                if isinstance(value, UserError):
                    raise value
                messages, tools, unused_keys = to_messages(value)
                row.update(
                    {"messages": json.dumps(messages, ensure_ascii=False), "unused_keys": json.dumps(unused_keys)}
                )
                row["tools"] = json.dumps(tools, ensure_ascii=False)
            except UserError as error:
                row.update(error=str(error), raw=text.strip())
            yield row
    if row is None:
        raise UserError(f"{', '.join(paths)}: no row in it.")
