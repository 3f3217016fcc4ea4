"""From texts to releases: bottom model, mechanism, ledger and outbox, joined here and nowhere else.

Guarantee:
    With a frozen bottom a text is privatized once in a run. Its noise comes from a generator derived from the run's
    secret key and the keyed hash of its tokens, and the result is in the outbox before it is sent, so epochs, retries,
    resumptions, repeated predictions and duplicate texts all show the vendor the same bytes. With a bottom that trains
    each example has noise of its own in each epoch; retries and resumptions show the same bytes. What one release
    protects is the mechanism's claim. Lengths are shown; with `pad_to` the number of vectors is rounded, but padding
    is a known token, which is recognised as surely as words are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from veiltune.customer.batching import pad_ids
from veiltune.customer.outbox import Outbox, Released
from veiltune.models.precision import bf16_products
from veiltune.models.split import BottomModel
from veiltune.privatize.importance import ContributingTokens
from veiltune.privatize.mechanisms import Privatizer
from veiltune.privatize.release import ReleaseLedger, release_key
from veiltune.randomness import SecureGenerator
from veiltune.wire import veiltune_pb2 as pb
from veiltune.wire.codec import MAX_FRAME_BYTES, to_wire, token_bytes, unpad

SHARD_BYTES = 4 * 2**20
TOKENS_PER_PASS = 4096
Item = TypeVar("Item")


class Releaser:
    """Privatizes token sequences, each at most once."""

    def __init__(
        self,
        *,
        bottom: BottomModel,
        privatizer: Privatizer,
        contributing: ContributingTokens | None,
        ledger: ReleaseLedger,
        outbox: Outbox,
        secret: bytes,
        wire_dtype: pb.DType,
        reference_norm: float,
        autocast: bool = False,
    ) -> None:
        self.bottom, self.privatizer, self.contributing = bottom, privatizer, contributing
        self.ledger, self.outbox = ledger, outbox
        self.reference_norm = reference_norm
        self._secret, self._wire_dtype, self._autocast = secret, wire_dtype, autocast
        self._generator = SecureGenerator(secret)
        self.num_releases = ledger.totals().releases

    @property
    def tokens_per_frame(self) -> int:
        """Tokens whose vectors fill half of the largest frame."""
        return max(1, MAX_FRAME_BYTES // 2 // token_bytes(self.bottom.hidden_size, self._wire_dtype))

    def close(self) -> None:
        """Closes ledger and outbox."""
        self.ledger.close()

    def key(self, token_ids: Sequence[int]) -> bytes:
        """The name of a text's release: a keyed hash, meaningless without the run's secret."""
        return release_key(self._secret, token_ids)

    def prepare(
        self,
        token_ids: Sequence[Sequence[int]],
        labels: Sequence[int] | None,
        *,
        part: str,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[bytes]:
        """Makes the releases that are missing and returns the key of every sequence.

        Args:
            token_ids: One sequence an example.
            labels: The (protected) label of each, for contributing tokens in training; None at inference.
            part: Under which name the outbox lists them; "train" is what gets uploaded.
            progress: Told the number of releases made so far.
        """
        keys = [self.key(ids) for ids in token_ids]
        missing = {key: i for i, key in reversed(list(enumerate(keys))) if key not in self.outbox}
        order = sorted(missing, key=lambda key: (len(token_ids[missing[key]]), key))  # the order tells only lengths
        done = 0
        for batch in pieces(order, [len(token_ids[missing[key]]) for key in order], self._tokens_per_shard()):
            examples = [missing[key] for key in batch]
            batch_labels = None if labels is None else [labels[i] for i in examples]
            released = self._release(batch, [token_ids[i] for i in examples], batch_labels)
            self.outbox.add(batch, released, part=part)
            done += len(batch)
            progress(done)
        return keys

    def noisy(
        self, values: Tensor, token_ids: Sequence[Sequence[int]], labels: Sequence[int] | None, *draw: bytes | int
    ) -> Tensor:
        """(N, H) clean -> (N, H) privatized, with the generator of that draw; gradients pass through."""
        noised = self.privatizer.privatize(
            values.detach().float(),
            generator=self._generator.derive("noise", *draw),
            multipliers=self._multipliers(token_ids, labels),
        )
        return values + (noised - values.detach().float())

    def to_wire(self, values: Tensor, lengths: list[int]) -> Released:
        """Rounds privatized vectors to the wire's dtype."""
        return Released(*to_wire(values, self._wire_dtype), lengths)

    def sent(self, keys: Sequence[bytes], tokens: Sequence[int], *, release: int = 0) -> None:
        """Counts releases as sent; the same (key, release) again is not counted twice."""
        self.num_releases += self.ledger.record_many(keys, num_tokens=tokens, release=release)

    def clean(self, token_ids: Sequence[Sequence[int]]) -> Tensor:
        """(N, H) representations at the cut, before any noise; never leaves this process."""
        ids, mask = pad_ids(token_ids)
        with bf16_products("cpu", enabled=self._autocast):
            return unpad(self.bottom(ids, mask), mask).float()

    @torch.no_grad()
    def _release(self, keys: list[bytes], token_ids: list[Sequence[int]], labels: list[int] | None) -> Released:
        self.bottom.eval()
        rows = []
        for part in pieces(list(range(len(keys))), [len(ids) for ids in token_ids], TOKENS_PER_PASS):
            lengths = [len(token_ids[i]) for i in part]
            for i, values in zip(part, self.clean([token_ids[i] for i in part]).split(lengths), strict=True):
                rows.append(self.noisy(values, [token_ids[i]], None if labels is None else [labels[i]], keys[i]))
        return self.to_wire(torch.cat(rows), [len(ids) for ids in token_ids])

    def _multipliers(self, token_ids: Sequence[Sequence[int]], labels: Sequence[int] | None) -> Tensor | None:
        if self.contributing is None:
            return None
        chosen = labels if labels is not None else [None] * len(token_ids)
        pairs = zip(token_ids, chosen, strict=True)
        return torch.cat([self.contributing.multipliers(torch.tensor(list(ids)), label) for ids, label in pairs])

    def _tokens_per_shard(self) -> int:
        return max(1, SHARD_BYTES // (2 * self.bottom.hidden_size))


def pieces(items: Sequence[Item], sizes: Sequence[int], limit: int) -> Iterator[list[Item]]:
    """Cuts a list where a piece, padded to its largest item, would pass the limit; a single item may.

    >>> list(pieces(["a", "b", "c"], [2, 2, 9], 4))
    [['a', 'b'], ['c']]
    """
    piece: list[Item] = []
    largest = 0
    for item, size in zip(items, sizes, strict=True):
        if piece and (len(piece) + 1) * max(largest, size) > limit:
            yield piece
            piece, largest = [], 0
        piece.append(item)
        largest = max(largest, size)
    if piece:
        yield piece
