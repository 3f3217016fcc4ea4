"""What may be asked of the API: one model a request body; a refusal never repeats what was sent."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
Name = Annotated[str, StringConstraints(max_length=256)]
Question = TypeVar("Question", bound="_Question")


class Refusal(Exception):
    """An answer other than 200.

    Attributes:
        status: HTTP status.
        kind: For programs.
        message: For people; one line, without anything that was sent.
        retry_after: Seconds after which it may work, or None.
    """

    def __init__(self, status: int, kind: str, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.message, self.retry_after = status, kind, message, retry_after


class _Question(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class NextTokenQuestion(_Question):
    """What token comes next? Give either `prompt_ids` or `prompt`."""

    prompt_ids: Annotated[list[Tokens], Field(min_length=1)] | None = None
    """token ids of each prompt; answered with log_probs (null: probability zero)"""
    prompt: str | Annotated[list[str], Field(min_length=1)] | None = None
    """a text or several; answered with probs"""
    top_k: Annotated[int, Field(ge=1, le=1000)] | None = None
    """answer with so many of the likeliest tokens of each prompt instead of whole vectors"""
    model: Name = ""
    """the name that /v1/models tells, or nothing"""


class CompletionQuestion(_Question):
    """Continue a prompt, as OpenAI's /v1/completions."""

    prompt: str | list[str] | Tokens | list[Tokens]
    """a text or its token ids; several are refused"""
    max_tokens: Annotated[int, Field(ge=0)] = 16
    """new tokens; 0 with echo only"""
    temperature: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = 1.0
    """0: always the likeliest"""
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    """mass of the nucleus that is drawn from"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """the same seed gives the same text"""
    logprobs: Annotated[int, Field(ge=0, le=1000)] | None = None
    """tell so many of the likeliest tokens of each position"""
    echo: bool = False
    """tell the prompt too"""
    stop: str | list[str] | None = None
    """up to four texts that end the continuation"""
    stream: bool = False
    """send the text as it is written"""
    return_tokens_as_token_ids: bool = False
    """name tokens as token_id:N in logprobs, as vLLM does"""
    n: Annotated[int, Field(ge=1, le=1)] = 1
    """one"""
    best_of: Annotated[int, Field(ge=1, le=1)] = 1
    """one"""
    presence_penalty: Annotated[float, Field(ge=0, le=0)] = 0.0
    """none"""
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] = 0.0
    """none"""
    suffix: None = None
    """none"""
    model: Name = ""
    """the name that /v1/models tells, or nothing"""
    user: Name = ""
    """taken and not looked at"""


def parse(kind: type[Question], body: bytes) -> Question:
    """Reads a request body.

    Raises:
        Refusal: 400, if it is no UTF-8, no JSON (NaN and Infinity are none), or not such a question.
    """
    try:
        content = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise Refusal(400, "not_utf8", "the body must be UTF-8") from None
    except (ValueError, RecursionError):
        raise Refusal(400, "not_json", "the body must be JSON, without NaN and Infinity") from None
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise Refusal(400, "invalid", _described(kind, error)) from None


def _described(kind: type[BaseModel], error: ValidationError) -> str:
    """The first fault: a field that we know and what it takes, never what came."""
    errors = error.errors(include_input=False, include_url=False, include_context=False)
    first = errors[0]
    field = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        return f"unknown field; known: {', '.join(kind.model_fields)}"
    if field not in kind.model_fields:
        return "the body must be a JSON object"
    if first["type"] == "missing":
        return f"{field} is missing"
    if len(errors) > 1:  # of several types that may come, none did
        return f"{field} has a wrong type or is out of range; it takes: {kind.model_fields[field].description}"
    expected = first["msg"].replace(" after validation", "")
    return f"{field} {re.sub('^(Input|String|List) should', 'must', expected)}"


def _no_constant(_: str) -> NoReturn:
    raise ValueError


def schema_of(kind: type[BaseModel]) -> dict[str, Any]:
    """For the OpenAPI description of an endpoint."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": kind.model_json_schema()}}}}
