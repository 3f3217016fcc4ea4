"""What context adds to a linear inverter's query: a window over neighbours, or a transformer over the text."""

from __future__ import annotations

import math
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

_MIN_WIDTH, _MAX_WIDTH = 64, 512
_RADIUS = 3  # neighbours on either side
_LAYERS = 2
_DROPOUT = 0.1
FREQUENT = 2048  # tokens that the soft guess mixes


class Correction(nn.Module):
    """Released vectors and linear queries of whole texts -> what to add to the queries.

    A token's features are its vector, and the word embedding expected from it alone under the linear inverter over
    the most frequent tokens (a soft guess). The last layer begins at zero, so training starts from the linear
    inverter.

    Attributes:
        deviation: (H,) standard deviation of the released coordinates.
        frequent: (F, E) embeddings of the frequent tokens.
        frequent_bias: (F,) their bias.
    """

    deviation: Tensor
    frequent: Tensor
    frequent_bias: Tensor

    def __init__(self, hidden: int, out: int, context: nn.Module, width: int, num_frequent: int) -> None:
        """Callers want `correction_for`."""
        super().__init__()
        self.register_buffer("deviation", torch.ones(hidden))
        self.register_buffer("frequent", torch.zeros(num_frequent, out))
        self.register_buffer("frequent_bias", torch.zeros(num_frequent))
        self.inward = nn.Linear(hidden + out, width)
        self.context = context
        self.outward = nn.Linear(width, out)
        nn.init.zeros_(self.outward.weight)
        nn.init.zeros_(self.outward.bias)

    def prepare(
        self, deviation: Float[Tensor, " H"], frequent: Float[Tensor, "F E"], frequent_bias: Float[Tensor, " F"]
    ) -> None:
        """Sets the scales of the features."""
        self.deviation.copy_(deviation.clamp(min=1e-6))
        self.frequent.copy_(frequent)
        self.frequent_bias.copy_(frequent_bias)

    def forward(
        self, values: Float[Tensor, "B T H"], queries: Float[Tensor, "B T E"], mask: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B T E"]:
        """`values` centred, `queries` linear, `mask` true on real tokens."""
        with torch.no_grad():
            weights = torch.softmax(queries @ self.frequent.T + self.frequent_bias, dim=-1)
            expected = (weights @ self.frequent) * self.frequent.shape[1] ** 0.5
            features = torch.cat([values / self.deviation, expected], dim=-1)
        hidden = self.inward(features).masked_fill(~mask.unsqueeze(-1), 0.0)
        return cast(Tensor, self.outward(self.context(hidden, mask))).float()


class _Window(nn.Module):
    """An MLP over a token and its neighbours."""

    def __init__(self, width: int) -> None:
        super().__init__()
        size = 2 * _RADIUS + 1
        self.mix = nn.Conv1d(width, 2 * width, size, padding=_RADIUS)
        self.narrow = nn.Linear(2 * width, width)
        self.drop = nn.Dropout(_DROPOUT)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        mixed = self.mix(hidden.transpose(1, 2)).transpose(1, 2)
        return cast(Tensor, self.narrow(self.drop(nn.functional.gelu(mixed))))


class _Transformer(nn.Module):
    """A convolution for the neighbours, then a pre-norm encoder with sinusoidal positions for the rest."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.near = nn.Conv1d(width, width, 2 * _RADIUS + 1, padding=_RADIUS)
        heads = next(count for count in (8, 6, 4, 2, 1) if width % count == 0)
        layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, _DROPOUT, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, _LAYERS, norm=nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        positions = _sinusoids(hidden.shape[1], hidden.shape[2]).to(hidden)
        near = nn.functional.gelu(self.near(hidden.transpose(1, 2)).transpose(1, 2))
        return cast(Tensor, self.layers(hidden + near + positions, src_key_padding_mask=~mask))


def correction_for(kind: str, hidden: int, out: int, *, num_frequent: int, seed: int) -> Correction:
    """A fresh correction of a kind ("window" or "sequence"); global randomness is kept."""
    width = min(_MAX_WIDTH, max(_MIN_WIDTH, hidden))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        context = _Window(width) if kind == "window" else _Transformer(width)
        return Correction(hidden, out, context, width, num_frequent)


def _sinusoids(length: int, width: int) -> Tensor:
    half = (width + 1) // 2
    rates = torch.exp(-math.log(10_000.0) * torch.arange(half) / half)
    angles = torch.arange(length).unsqueeze(1) * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]
