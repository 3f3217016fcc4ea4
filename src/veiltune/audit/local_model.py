"""A Hugging Face causal language model on this machine as a black box: batched, one pass a record, cached decoding."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from veiltune._validate import positive_int
from veiltune.audit.blackbox import BlackBox, Decoder, Float64, Tokens, Vectors, one_each, spans, start_ids, told
from veiltune.dp.decoding import causal_lm
from veiltune.errors import InputError
from veiltune.models.families import longest_sequence
from veiltune.models.loading import weights_digest
from veiltune.models.precision import bf16_products
from veiltune.models.surgery import backbone_of

_WINDOW = 8  # batches whose hidden states are held at once: lengths are sorted within so many
_CACHED = 2  # times batch_tokens positions may stand in the cache of endings of one prefix


class LocalModel(BlackBox):
    """A causal model of `FAMILIES`, bare or wrapped by peft, asked as an API would be.

    Texts of similar length share a batch; results come in the order given. The blocks run on whole batches, the head
    (whose output is vocabulary-sized) on a bounded number of positions at a time. A result depends on its batch only
    through rounding.

    Attributes:
        tokenizer: Of the model.
        batch_tokens: Positions in one pass, padding included (a longer text goes alone).
    """

    texts_a_part = 400

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        name: str = "",
        batch_tokens: int = 2048,
        device: str | torch.device = "cpu",
        bf16: bool = False,
    ) -> None:
        """Moves the model to the device and puts it in eval mode.

        Args:
            model: Its weights are not changed.
            tokenizer: Its tokenizer; its ids must be of the model's vocabulary.
            name: For people; by default the model's own.
            batch_tokens: As the attribute.
            device: Where to compute.
            bf16: The blocks' matrix products in bfloat16; the head stays in the weights' precision.

        Raises:
            UnsupportedModelError: If it is no causal language model of a known family, or has learnt prompts.
            InputError: If the tokenizer has ids that the model does not know, or no token to begin a text with.
        """
        causal = causal_lm(model)
        model.to(device).eval()
        self.tokenizer, self.batch_tokens = tokenizer, positive_int(batch_tokens=batch_tokens)
        self._backbone: Any = backbone_of(causal)
        self._head: Any = causal.get_output_embeddings()  # type: ignore[no-untyped-call]
        self._config, self._device, self._bf16 = causal.config, torch.device(device), bf16
        self.name = name or str(getattr(causal.config, "name_or_path", "") or causal.config.model_type)
        self.vocabulary = int(self._head.weight.shape[0])
        self.context = longest_sequence(causal.config)
        self.digest = weights_digest(model.state_dict())
        if len(tokenizer) > self.vocabulary:
            raise InputError(
                f"the tokenizer has {len(tokenizer)} ids and the model {self.name} knows {self.vocabulary};"
                " use the tokenizer that it was trained with"
            )
        start_ids(tokenizer)

    @torch.inference_mode()
    def next_token_log_probs(self, prefixes: Sequence[Tokens]) -> Vectors:
        """As `BlackBox.next_token_log_probs`, in batches."""
        texts = self._accepted(prefixes, least=1, most=self.context)
        answers = np.empty((len(texts), self.vocabulary), dtype=np.float32)
        for rows in _batches(texts, self.batch_tokens):
            hidden = self._hidden([texts[row] for row in rows])
            for first, stop in spans(0, len(rows), self._rows_at_once):
                last = torch.stack([hidden[i, len(texts[rows[i]]) - 1] for i in range(first, stop)])
                answers[rows[first:stop]] = self._log_probs(last)
        return answers

    @torch.inference_mode()
    def parts(self, sequences: Sequence[Tokens], *, start: int = 0) -> Iterator[tuple[int, int, Vectors]]:
        """As `BlackBox.parts`: one teacher-forced pass a sequence."""
        texts = [tokens[:-1] for tokens in self._accepted(sequences, least=start + 2, most=self.context + 1)]
        for begin, end in _windows(texts, _WINDOW * self.batch_tokens):
            held = self._window(texts[begin:end])
            for number in range(begin, end):
                states = held[number - begin]
                for first, stop in spans(start, len(states), self._rows_at_once):
                    yield number, first, self._log_probs(states[first:stop])

    @torch.inference_mode()
    def suffix_log_probs(self, prefix: Tokens, suffixes: Sequence[Tokens]) -> Float64:
        """As `BlackBox.suffix_log_probs`: the prefix is computed once and its cache shared by all suffixes."""
        head, tails = self._suffixed(prefix, suffixes)
        common = DynamicCache(config=self._config)
        last = self._forward(torch.tensor([head], device=self._device), cache=common)[:, -1:]
        first = self._log_probs(last[0])
        totals, _ = told(np.broadcast_to(first, (len(tails), self.vocabulary)), [tail[0] for tail in tails])
        longer = [row for row, tail in enumerate(tails) if len(tail) > 1]
        inner = [tails[row][:-1] for row in longer]
        for batch in _batches(inner, _CACHED * self.batch_tokens, extra=len(head)):
            rows = [longer[index] for index in batch]
            cache = copy.deepcopy(common)
            cache.batch_repeat_interleave(len(rows))
            ids = _padded([inner[index] for index in batch], self._device)
            hidden = self._forward(ids, cache=cache, offset=len(head))
            totals[rows] += self._chosen(hidden, [tails[row][1:] for row in rows])
        return totals

    def decoder(self, prefixes: Sequence[Tokens]) -> Decoder:
        """As `BlackBox.decoder`, with a cache: a step computes one position a text."""
        return _CachedDecoder(self, self._accepted(prefixes, least=1, most=self.context))

    def _forward(self, ids: Tensor, *, cache: DynamicCache | None = None, offset: int = 0, **inputs: Any) -> Tensor:
        """(B, T, H) hidden states before the head."""
        if "position_ids" not in inputs:
            inputs["position_ids"] = torch.arange(offset, offset + ids.shape[1], device=ids.device).expand_as(ids)
        with bf16_products(self._device.type, enabled=self._bf16):
            outputs = self._backbone(input_ids=ids, past_key_values=cache, use_cache=cache is not None, **inputs)
        states: Tensor = outputs.last_hidden_state
        return states

    def _hidden(self, texts: Sequence[list[int]]) -> Tensor:
        # Padded at the end and without a mask: no position of a causal model sees what follows it.
        return self._forward(_padded(texts, self._device))

    def _window(self, texts: Sequence[list[int]]) -> list[Tensor]:
        held: dict[int, Tensor] = {}
        for rows in _batches(texts, self.batch_tokens):
            hidden = self._hidden([texts[row] for row in rows])
            held.update({row: hidden[i, : len(texts[row])] for i, row in enumerate(rows)})
        return [held[row] for row in range(len(texts))]

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._head(hidden.to(self._head.weight.dtype))
        return logits.float()

    def _log_probs(self, hidden: Tensor) -> Vectors:
        """(n, H) to (n, V)."""
        return self._checked(self._logits(hidden).log_softmax(-1).cpu().numpy(), len(hidden))

    def _chosen(self, hidden: Tensor, tokens: Sequence[list[int]]) -> Float64:
        """Sums of the log-probabilities of each row's tokens; position t of the hidden states predicts token t."""
        rows = torch.tensor([row for row, ids in enumerate(tokens) for _ in ids])
        places = torch.tensor([place for ids in tokens for place in range(len(ids))])
        wanted = torch.tensor([token for ids in tokens for token in ids])
        totals = np.zeros(len(tokens))
        for first, stop in spans(0, len(rows), self._rows_at_once):
            vectors = self._log_probs(hidden[rows[first:stop], places[first:stop]])
            values, _ = told(vectors, wanted[first:stop])
            np.add.at(totals, rows[first:stop].numpy(), values)
        return totals


class _CachedDecoder(Decoder):
    """Keys and values of all earlier positions are kept; texts are padded on the left."""

    def __init__(self, box: LocalModel, prefixes: Sequence[list[int]]) -> None:
        self._box, self._cache = box, DynamicCache(config=box._config)
        longest = max(map(len, prefixes), default=0)
        self._lengths = torch.tensor([len(prefix) for prefix in prefixes], device=box._device)
        if not longest:
            self.log_probs = np.empty((0, box.vocabulary), dtype=np.float32)
            return
        ids = torch.tensor([[0] * (longest - len(prefix)) + prefix for prefix in prefixes], device=box._device)
        self._mask = (torch.arange(longest, device=box._device) >= (longest - self._lengths)[:, None]).long()
        self._step(ids, (self._mask.cumsum(1) - 1).clamp(min=0))

    def append(self, tokens: Tokens) -> None:
        ids = one_each(tokens, self.log_probs)
        if not ids:
            return
        if int(self._lengths.max()) >= self._box.context:
            raise InputError(
                f"a text fills the context of {self._box.context} tokens of {self._box.name}; ask for fewer"
            )
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(ids), 1)], dim=1)
        self._step(torch.tensor(ids, device=self._box._device)[:, None], self._lengths[:, None])
        self._lengths = self._lengths + 1

    def select(self, rows: Sequence[int]) -> None:
        kept = torch.tensor(list(rows), dtype=torch.long, device=self._box._device)
        if not len(self.log_probs):
            return
        self._cache.batch_select_indices(kept)
        self._mask, self._lengths = self._mask[kept], self._lengths[kept]
        self.log_probs = self.log_probs[kept.cpu().numpy()]

    @torch.inference_mode()
    def _step(self, ids: Tensor, positions: Tensor) -> None:
        hidden = self._box._forward(ids, cache=self._cache, attention_mask=self._mask, position_ids=positions)
        self.log_probs = self._box._log_probs(hidden[:, -1])


def _batches(texts: Sequence[Sequence[int]], most: int, *, extra: int = 0) -> Iterator[list[int]]:
    """Numbers of texts alike in length, the longest first; a batch has at most `most` positions, or one text."""
    rows: list[int] = []
    for row in sorted(range(len(texts)), key=lambda row: -len(texts[row])):
        if rows and (len(rows) + 1) * (len(texts[rows[0]]) + extra) > most:
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows


def _windows(texts: Sequence[Sequence[int]], most: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of consecutive texts of at most `most` positions together, or one text."""
    begin = total = 0
    for number, text in enumerate(texts):
        if number > begin and total + len(text) > most:
            yield begin, number
            begin, total = number, 0
        total += len(text)
    if texts:
        yield begin, len(texts)


def _padded(texts: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    longest = max(map(len, texts))
    return torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts], device=device)
