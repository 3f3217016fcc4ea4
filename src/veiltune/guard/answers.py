"""The answers of the API: vectors as JSON or raw, and completions in OpenAI's form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson

from veiltune.guard.jobs import Text, Told
from veiltune.guard.vectors import Vector, best

_HALF_LEAST = -65504.0


def vectors_json(vectors: Vector, *, probs: bool) -> bytes:
    """``{"log_probs":[[...],...]}`` with null for probability zero, or ``{"probs":...}``; each float32's own digits.

    >>> vectors_json(np.array([[-0.6931472, -np.inf]], dtype=np.float32), probs=False)
    b'{"log_probs":[[-0.6931472,null]]}'

    Raises:
        ValueError: If a value is not a number, which JSON could not tell from probability zero.
    """
    if np.isnan(vectors).any():
        raise ValueError("a vector has a value that is not a number")
    name, values = ("probs", np.exp(vectors)) if probs else ("log_probs", vectors)
    return orjson.dumps({name: np.ascontiguousarray(values)}, option=orjson.OPT_SERIALIZE_NUMPY)


def vectors_raw(vectors: Vector) -> bytes:
    """Log-probabilities as little-endian float16, one row after the other; -inf for probability zero."""
    finite = np.maximum(vectors, _HALF_LEAST)
    return np.where(np.isneginf(vectors), -np.inf, finite).astype("<f2").tobytes()


def tops_json(tokenizer: Any, vectors: Vector, k: int) -> bytes:
    """``{"top": [[{"id", "token", "prob"}, ...], ...]}``, likeliest first; tokens of probability zero are left out."""
    rows = [[(token, float(np.exp(row[token]))) for token in best(row, k).tolist()] for row in vectors]
    named = [[{"id": i, "token": _name(tokenizer, i), "prob": p} for i, p in row if p > 0.0] for row in rows]
    return json.dumps({"top": named}).encode()


def completion(
    tokenizer: Any,
    answer: Text,
    *,
    prompt: Sequence[int],
    text: str,
    echo: bool,
    logprobs: bool,
    by_id: bool,
    meta: dict[str, Any],
) -> dict[str, Any]:
    """OpenAI's form of a text.

    Args:
        tokenizer: The model's.
        answer: Of the engine.
        prompt: Token ids.
        text: What is shown as the text.
        echo: Whether the prompt's tokens are in it.
        logprobs: Whether to tell log-probabilities.
        by_id: Whether tokens are named by their ids.
        meta: id, created and model.
    """
    told = _columns(tokenizer, answer.told, prompt[:1] if echo else (), by_id) if logprobs else None
    choice = {"index": 0, "text": text, "logprobs": told, "finish_reason": answer.finished}
    used = {"prompt_tokens": len(prompt), "completion_tokens": len(answer.ids)}
    usage = used | {"total_tokens": sum(used.values())}
    return meta | {"object": "text_completion", "choices": [choice], "usage": usage}


def _columns(tokenizer: Any, told: Sequence[Told], first: Sequence[int], by_id: bool) -> dict[str, Any]:
    """Of the prompt's first token nothing can be told: its entries are null."""

    def name(token: int) -> str:
        return f"token_id:{token}" if by_id else _name(tokenizer, token)

    tokens = [name(token) for token in first] + [name(one.token) for one in told]
    offsets = np.cumsum([0, *(len(_name(tokenizer, token)) for token in [*first, *(one.token for one in told)])])
    return {
        "tokens": tokens,
        "token_logprobs": [None] * len(first) + [_json(one.log_prob) for one in told],
        "top_logprobs": [None] * len(first) + [{name(i): _json(p) for i, p in one.top} for one in told],
        "text_offset": offsets[:-1].tolist(),
    }


def _json(value: float) -> float:
    """JSON has no infinity; a token of probability zero gets what float16 ends with."""
    return max(value, _HALF_LEAST)


def _name(tokenizer: Any, token: int) -> str:
    return str(tokenizer.decode([token], clean_up_tokenization_spaces=False)) if token < len(tokenizer) else ""
