"""Which token an OpenAI-compatible server means by a name."""

from __future__ import annotations

import re
from typing import Any

_BY_ID = re.compile(r"token_id:(\d{1,9})")
_AMBIGUOUS = -1


class TokenNames:
    """Maps a server's names of tokens to the ids of the local tokenizer.

    Servers name tokens by id ("id" in llama.cpp, "token_id:17" in vLLM when asked), by their decoded text, or by the
    tokenizer's own piece. A text that several tokens share (bytes that are no character alone) is no name, unless it is
    that of the token that was expected there.

    Attributes:
        vocabulary: Number of ids.
        request: What to add to a question so that the server names tokens by id, where it can.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Decodes every token once."""
        self.vocabulary = len(tokenizer)
        self.request: dict[str, Any] = {"return_tokens_as_token_ids": True}
        self._pieces: list[Any] = tokenizer.convert_ids_to_tokens(list(range(self.vocabulary)))
        self._texts: list[str] = [
            tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in range(self.vocabulary)
        ]
        self._by_text = _unique(self._texts)
        self._by_piece = _unique(self._pieces)

    def find(self, name: dict[str, Any], *, expected: int | None = None) -> int | None:
        """The id, or None if the name fits no token or several.

        Args:
            name: "token" with the server's name of it, and "id" where the server gives one.
            expected: The token of the prompt there, which an ambiguous text is taken for.
        """
        text, number = name.get("token"), name.get("id")
        if isinstance(number, int) and not isinstance(number, bool):
            return number if 0 <= number < self.vocabulary else None
        if not isinstance(text, str):
            return None
        if by_id := _BY_ID.fullmatch(text):
            return int(by_id[1]) if int(by_id[1]) < self.vocabulary else None
        if expected is not None and text in (self._texts[expected], self._pieces[expected]):
            return expected
        for table in (self._by_text, self._by_piece):
            if text in table:
                return table[text] if table[text] != _AMBIGUOUS else None
        return None


def _unique(names: list[Any]) -> dict[str, int]:
    """Name to id, `_AMBIGUOUS` for a name that stands twice."""
    found: dict[str, int] = {}
    for token, name in enumerate(names):
        if isinstance(name, str):
            found[name] = token if name not in found else _AMBIGUOUS
    return found
