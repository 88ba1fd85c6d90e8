"""Conversations -> token ids: the prompt that serving sends, and the replies that training learns after it.

What precedes a reply is what `encode_prompt` gives; labels run from the first token of the reply to the first token at
which generation stops. One example holds all turns where the template only appends, else each turn is its own.
"""

# The same in every recipe that has it: python tests/copies.py --fix FILE

import json
import os
import re
from contextlib import suppress
from functools import lru_cache
from itertools import pairwise

from jinja2 import TemplateError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from rows import UserError

IGNORE_INDEX = -100
OPENED, CLOSED = "<think>", "</think>"


def read_tokenizer(path: str, trust_remote_code: bool = False):
    """The tokenizer in a folder or on the hub, such that what it saves is itself.

    Raises:
        OSError, ValueError: there is none.
    """
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if getattr(tokenizer, "legacy", None):  # Llama's flag, which save_pretrained drops: another tokenizer without it
        tokenizer.init_kwargs["legacy"] = True
    return tokenizer


def apply_template(messages: list[dict], tokenizer, tools: list[dict] | None, **settings):
    """`apply_chat_template` for every template: a thought under both of its names, a call's arguments as it wants them.

    Raises:
        jinja2.TemplateError, TypeError: the template refuses the messages.
    """
    standard = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    for message in standard:
        if "reasoning_content" in message:
            message["thinking"] = message["reasoning_content"]  # gpt-oss
    try:
        return tokenizer.apply_chat_template(standard, tools=tools, **settings)
    except TypeError:  # DeepSeek-V3: the arguments as the text that an API sends
        for message in standard:
            if "tool_calls" in message:
                message["tool_calls"] = [
                    call | {"function": {"name": function["name"], "arguments": json.dumps(function["arguments"])}}
                    for call in message["tool_calls"]
                    for function in (call["function"],)
                ]
        return tokenizer.apply_chat_template(standard, tools=tools, **settings)


def encode_prompt(messages: list[dict], tokenizer, tools: list[dict] | None = None, **template_kwargs) -> list[int]:
    """Token ids of a conversation up to where the assistant speaks next; training and serving both build it here.

    A special token that stands in a message is encoded as plain text: what a user types can't end their own turn.

    Args:
        messages: `[{"role", "content"}, ...]`, with `reasoning_content` and `tool_calls` where there are some.
        tools: functions that the model may call, as JSON schemas.
        template_kwargs: what the template itself asks for, such as `enable_thinking`.
    """
    tokenizer.chat_control_tokens = []  # <think> in a history is no special token, and is read as in training
    settings = {"add_generation_prompt": True, "sanitize_control_tokens": True, "return_dict": False}
    return apply_template(messages, tokenizer, tools, **settings, **template_kwargs)


def render(messages: list[dict], tokenizer, tools: list[dict] | None, prompt: bool, **template_kwargs) -> str:
    """The text of a conversation; with `prompt`, up to where the assistant speaks next."""
    settings = {"tokenize": False, "add_generation_prompt": prompt}
    return apply_template(messages, tokenizer, tools, **settings, **template_kwargs)


def control_pattern(tokenizer) -> re.Pattern:
    """Matches the tokens that a template sets its marks with: all that are special, or named (EOS, ...)."""
    return compile_control_pattern(tokenizer, len(tokenizer), tokenizer.eos_token)


@lru_cache(maxsize=4)
def compile_control_pattern(tokenizer, *state) -> re.Pattern:
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens = sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")


def stop_tokens(tokenizer) -> set[str]:
    """The tokens at which generation stops: the tokenizer's EOS, and those of the model's generation_config."""
    ids = read_generation_stops(tokenizer.name_or_path)
    return {tokenizer.eos_token, *tokenizer.convert_ids_to_tokens([i for i in ids if i < len(tokenizer)])}


@lru_cache(maxsize=4)
def read_generation_stops(name_or_path: str) -> list[int]:
    """Ids at which a model stops by its generation_config, or without one by its config; none for an adapter."""
    for read in (GenerationConfig.from_pretrained, lambda path: AutoConfig.from_pretrained(path).get_text_config()):
        with suppress(OSError, ValueError):
            ends = read(name_or_path).eos_token_id
            return ends if isinstance(ends, list) else [] if ends is None else [ends]
    return []


def split_thought(message: dict) -> tuple[str, str]:
    """The thought and the answer of an assistant's message, both without white space around them."""
    before, _, answer = message["content"].rpartition(CLOSED)
    thought = message.get("reasoning_content") or before.rpartition(OPENED)[2]
    return thought.strip(), answer.strip()


def find_reply(message: dict, asked: str, prompt: str, rendered: str, control: re.Pattern) -> str:
    """What the model has to write after `prompt`, and what the template sets behind it.

    Args:
        asked: the text of the message before.
        rendered: the conversation that ends with `message`.

    Raises:
        UserError: the prompt and the template's own text leave no place for the thought, or for the reply.
    """
    thought, answer = split_thought(message)
    end = prompt.rstrip()
    opened, closed = end.endswith(OPENED), end.endswith(CLOSED)
    if rendered.startswith(prompt):
        reply = rendered[len(prompt) :]
    elif opened and rendered.startswith(end.removesuffix(OPENED)):
        reply = rendered[len(end.removesuffix(OPENED)) :]
    else:  # what stands before the reply is rendered otherwise than in the prompt that serving sends
        place = max(rendered.rfind(message["content"].strip()), 0) or rendered.rfind(answer)
        if not answer:
            common = len(os.path.commonprefix([prompt, rendered]))
            cut = (mark.start() for mark in control.finditer(rendered) if mark.start() < common < mark.end())
            place = next(cut, common)
            if asked.strip() in rendered[place:]:
                raise UserError("the chat template rewrites earlier turns, so the beginning of a reply can't be found")
        reply = rendered[place:]
        closed |= not rendered[:place].rstrip().endswith(end[-8:])  # Gemma 4's prompt: an empty thought
    if thought not in reply or (opened and CLOSED not in reply):
        if closed:
            raise UserError("the chat template closes the thought before the reply, so this row's can't be learned")
        rest = reply.rpartition(CLOSED)[2].lstrip("\n")
        reply = f"{'' if opened else OPENED + chr(10)}{thought}\n{CLOSED}\n\n{rest}"
    elif opened and not rendered.startswith(prompt):
        reply = reply.lstrip().removeprefix(OPENED).lstrip("\n")
    return reply


def cut_reply(message: dict, reply: str, control: re.Pattern, stops: set[str]) -> tuple[str, str]:
    """The reply without what stands behind its end, and the token that ends it ("" where the template sets none).

    Raises:
        UserError: the template changes the answer or drops a tool call, or generation would stop within the reply.
    """
    _, answer = split_thought(message)
    words = control.sub(lambda token: "\0" * len(token[0]), reply)  # an answer "end" is not found in <|im_end|>
    said = [answer, *(call["function"]["name"] for call in message.get("tool_calls", []))]
    places = [words.rfind(text) for text in said]
    if -1 in places:
        what = "changes the answer" if places[0] == -1 else "drops the tool calls"
        raise UserError(f"the chat template {what}: {said[places.index(-1)][:40]!r} is not in what it renders")
    end = max(place + len(text) for place, text in zip(places, said, strict=True) if text)
    for token in control.findall(reply[:end]):
        if token in stops:
            raise UserError(f"generation would stop at {token} within the reply")
    marks = list(control.finditer(reply, end))
    found = next((mark for mark in marks if mark[0] in stops), None)
    if marks and not found and not message.get("tool_calls"):
        found = marks[-1]  # as `load_tokenizer` asks for it, which makes it the EOS
    if found:
        return reply[: found.start()], found[0]
    return reply.rstrip() if message.get("tool_calls") else reply[:end], ""


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_reply(tokenizer, context: str, context_ids: list[int], reply: str) -> list[int]:
    """Token ids of a reply that follows a context whose ids are given and stay as they are.

    Raises:
        UserError: the tokenizer has no ids that, after the context's, read as the reply.
    """
    whole = encode(tokenizer, context + reply)
    if whole[: len(context_ids)] == context_ids:
        return whole[len(context_ids) :]
    text = tokenizer.decode(whole)  # a merge over the border: the reply by itself, if it then reads the same
    for before in ("", "\n"):
        head, alone = encode(tokenizer, before), encode(tokenizer, before + reply)
        if alone[: len(head)] == head and tokenizer.decode(context_ids + alone[len(head) :]) == text:
            return alone[len(head) :]
    raise UserError("the tokenizer joins the end of the prompt and the beginning of the answer")


def encode_conversation(messages: list[dict], tokenizer, tools: list[dict] | None = None) -> list[dict]:
    """Token ids of a conversation and its labels: the id where the assistant speaks, -100 elsewhere.

    Returns:
        Examples of `input_ids`, `labels` and `turns` (which of the messages are learned); one where the template only
        appends, else one for each turn.

    Raises:
        UserError: a message holds a control token, the chat template refuses the conversation or drops a part of it,
            or nothing is left to learn from.
    """
    control, stops = control_pattern(tokenizer), stop_tokens(tokenizer)
    for number, message in enumerate(messages, start=1):
        texts = (message["content"], message.get("reasoning_content") or "", str(message.get("tool_calls", "")))
        if found := next(filter(None, map(control.search, texts)), None):
            raise UserError(f"message {number}: the text holds the control token {found[0]}")
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and message.get("weight", 1)]
    if not turns:
        raise UserError("no assistant turn is left to learn from")
    try:
        prompts = [render(messages[:turn], tokenizer, tools, prompt=True) for turn in turns]
        rendered = [render(messages[: turn + 1], tokenizer, tools, prompt=False) for turn in turns]
        if tools and render(messages[: turns[0]], tokenizer, None, prompt=True) == prompts[0]:
            raise UserError("the chat template knows no tools")
    except (TemplateError, TypeError) as error:
        raise UserError(f"the chat template refuses it: {error}") from None
    for message in messages[: turns[-1]]:
        if message["role"] in ("system", "user") and message["content"].strip() not in prompts[-1]:
            raise UserError(f"the chat template drops the {message['role']} message {message['content'][:20]!r}")
    replies = []
    for turn, prompt, text in zip(turns, prompts, rendered, strict=True):
        reply = find_reply(messages[turn], messages[turn - 1]["content"], prompt, text, control)
        replies.append(cut_reply(messages[turn], reply, control, stops))
    for number, (before, after) in enumerate(pairwise(prompts)):
        reply, stop = replies[number]
        following = after.removeprefix(before + reply)
        if not stop and following != after:  # GLM: a turn ends where the next begins
            replies[number] = (reply, next((token for token in stops if following.startswith(token)), ""))
    return [
        example
        for group in group_turns(prompts, replies)
        for example in encode_turns(tokenizer, turns, prompts, replies, group)
    ]


def group_turns(prompts: list[str], replies: list[tuple[str, str]]) -> list[list[int]]:
    """Neighbouring turns whose later prompts only append to the earlier ones and their replies."""
    groups = [[0]]
    for number in range(1, len(prompts)):
        reply, stop = replies[number - 1]
        if stop and prompts[number].startswith(prompts[number - 1] + reply + stop):
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


def encode_turns(tokenizer, turns, prompts, replies, group: list[int]) -> list[dict]:
    """One example of all turns of a group, or one of each where the ids of its last prompt are others."""
    input_ids, labels, learned = [], [], ""
    for number in group:
        reply, stop = replies[number]
        if learned:  # a text is tokenised anew after a control token, here the stop of the turn before
            context = replies[number - 1][1] + prompts[number][len(learned) :]
            context_ids = encode(tokenizer, context)
            new = context_ids[1:]
        else:
            context = prompts[number]
            context_ids = new = encode(tokenizer, context)  # no message holds a control token: that is `encode_prompt`
        ids = encode_reply(tokenizer, context, context_ids, reply + stop)
        if not stop:
            ids = [*ids, tokenizer.eos_token_id]
        prompt_length = len(input_ids) + len(new)
        input_ids = input_ids + new + ids
        labels = labels + [IGNORE_INDEX] * len(new) + ids
        learned = prompts[number] + reply + stop
    if len(group) > 1 and encode(tokenizer, prompts[group[-1]]) != input_ids[:prompt_length]:
        alone = [encode_turns(tokenizer, turns, prompts, replies, [number]) for number in group]
        return [example for examples in alone for example in examples]
    return [{"input_ids": input_ids, "labels": labels, "turns": [turns[number] for number in group]}]
