"""A request of OpenAI's chat API: its parameters and pictures, checked, and its errors in OpenAI's form."""

import asyncio
import inspect
import json
from typing import Annotated, Any, Literal

from fastapi import HTTPException, Request
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Json,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from rows import IMAGE_MARK, SPELLED_MARK, join_parts

# >>> api-parameters
# Parameters that would change the reply and that this server doesn't have, with the values that ask for nothing.
UNSUPPORTED = {
    "n": [1],
    "tool_choice": ["none", "auto"],
    "functions": [[]],
    "function_call": ["none", "auto"],
    "response_format": [{"type": "text"}],
    "logprobs": [False],
    "top_logprobs": [0],
    "logit_bias": [{}],
    "presence_penalty": [0],
    "frequency_penalty": [0],
    "modalities": [["text"]],
    "audio": [],
    "reasoning_effort": [],
    "verbosity": [],
    "web_search_options": [],
}
# Parameters that don't change the reply. What is neither here nor above nor in ChatRequest is refused as unknown.
IGNORED = ["user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"]

BODY_SECONDS = 30  # a client that hasn't sent its body by then is dropped


def drop_nulls(fields):
    """The fields of a JSON object that are not null, since null is the same as left out."""
    return {name: value for name, value in fields.items() if value is not None} if isinstance(fields, dict) else fields


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class FunctionCall(BaseModel):
    name: str
    arguments: Annotated[Json[dict[str, Any]], BeforeValidator(lambda text: "{}" if text == "" else text)]


class ToolCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


# <<< api-parameters


class ImageUrl(BaseModel):
    model_config = ConfigDict(extra="forbid")
    url: str
    detail: Literal["auto", "low", "high"] = "auto"  # LLaVA sees every picture in one size
    _data: bytes | None = PrivateAttr(None)  # what was fetched from an http(s) address


class ImagePart(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["image_url"]
    image_url: ImageUrl


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        list[Annotated[TextPart | ImagePart, Field(discriminator="type")]],
        BeforeValidator(lambda text: [{"type": "text", "text": text}] if isinstance(text, str) else text),
    ] = []
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] = []
    tool_call_id: str | None = None
    annotations: list = []

    @model_validator(mode="after")
    def check_content(self):
        if "content" not in self.model_fields_set and not self.tool_calls:
            raise ValueError("content is missing")
        for part in self.content:
            if isinstance(part, ImagePart) and self.role != "user":
                raise ValueError(f"a picture in a message by {self.role}; only users show pictures")
            if isinstance(part, TextPart) and self.role == "assistant":
                part.text = part.text.replace(IMAGE_MARK, SPELLED_MARK)
            if isinstance(part, TextPart) and IMAGE_MARK in part.text:
                raise ValueError(f"the text has {IMAGE_MARK}, the model's mark for a picture; send an image_url part")
        return self

    def to_template(self) -> dict:
        """The message as chat templates know it: text and marks in one string, arguments as dict, nothing that is null.

        A picture stands where its part stands. Pictures after all the text, as OpenAI's examples have them, are put
        before it, where LLaVA's training data have them.
        """
        fields = self.model_dump(exclude={"annotations", "content"}, exclude_unset=True)
        role = "system" if self.role == "developer" else self.role
        parts = [part.text if isinstance(part, TextPart) else None for part in self.content]
        texts = [part for part in parts if part is not None]
        if parts[: len(texts)] == texts:
            parts = [*parts[len(texts) :], "".join(texts)]
        return {**fields, "role": role, "content": join_parts(parts)}


# >>> api-request
class Function(BaseModel):
    model_config = ConfigDict(extra="allow")
    name: str


class Tool(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["function"]
    function: Function


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """The parameters of /v1/chat/completions that this server honours; null is the same as left out."""

    model_config = ConfigDict(extra="forbid")
    model: str
    messages: list[Annotated[Message, BeforeValidator(drop_nulls)]] = Field(min_length=1)
    tools: list[Tool] = []
    chat_template_kwargs: dict[str, Any] = {}
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.7, ge=0, le=2)
    top_p: float = Field(0.8, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="-1 and 0 are off")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=2)  # the logits must not overflow
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]],
        BeforeValidator(lambda text: [text] if isinstance(text, str) else text),
    ] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()


def api_error(status: int, message: str, param: str | None = None, code: str | None = None) -> HTTPException:
    """An error that reaches the client in OpenAI's form."""
    kind = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}.get(status, "invalid_request_error")
    return HTTPException(status, {"message": message, "type": kind, "param": param, "code": code})


async def read_body(request: Request) -> bytes:
    """Raises 413 for a body that is too large."""
    limit, body, size = request.app.state.max_body_bytes, bytearray(), 0
    async for chunk in request.stream():  # too large a body is read to its end, or the client would miss the answer
        size += len(chunk)
        body += chunk if size <= limit else b""
    if size > limit:
        raise api_error(413, f"the body has {size} bytes, at most {limit} are accepted", code="body_too_large")
    return bytes(body)


async def read_request(request: Request) -> ChatRequest:
    """The checked body of a request.

    Raises:
        HTTPException: 413 too large; 408 too slow; 400 no JSON, a wrong or unknown parameter, or one that can't be
            honoured; 404 another model.
    """
    state = request.app.state
    try:
        fields = json.loads(await asyncio.wait_for(read_body(request), BODY_SECONDS))
        json.dumps(fields, ensure_ascii=False).encode()  # fails for half a surrogate pair, which is no text
    except asyncio.TimeoutError:
        raise api_error(408, f"the body did not arrive within {BODY_SECONDS} seconds", code="body_timeout") from None
    except (ValueError, RecursionError) as error:
        raise api_error(400, f"the body is no JSON: {error}", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise api_error(400, "the body is no JSON object", code="invalid_json")
    fields = {name: value for name, value in drop_nulls(fields).items() if name not in IGNORED}
    if fields.get("tool_choice") == "none":
        fields.pop("tools", None)
    for name, neutral in UNSUPPORTED.items():
        if name in fields and fields.pop(name) not in neutral:
            raise api_error(400, f"this server does not support {name}", name, "unsupported_parameter")
    try:
        chat = ChatRequest.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = ".".join(str(part) for part in first["loc"])
        raise api_error(400, f"{param}: {first['msg']}", param, "invalid_value") from None
    if chat.model != state.model_name:
        raise api_error(404, f"no model {chat.model!r} here, only {state.model_name!r}", "model", "model_not_found")
    wanted = chat.max_completion_tokens or chat.max_tokens or 1
    if wanted > state.max_new_tokens:
        message = f"max_tokens is {wanted}, at most {state.max_new_tokens} are generated"
        raise api_error(400, message, "max_tokens", "invalid_value")
    taken = chat.chat_template_kwargs.keys() & inspect.signature(state.tokenizer.apply_chat_template).parameters
    if taken:
        message = f"chat_template_kwargs can't set {', '.join(sorted(taken))}, only variables of the template"
        raise api_error(400, message, "chat_template_kwargs", "invalid_value")
    return chat


# <<< api-request


def list_pictures(chat: ChatRequest) -> list[tuple[str, ImageUrl]]:
    """The pictures of a request in their order, each with its place, as errors name it."""
    return [
        (f"messages.{i}.content.{j}.image_url", part.image_url)
        for i, message in enumerate(chat.messages)
        for j, part in enumerate(message.content)
        if isinstance(part, ImagePart)
    ]
