"""How much an audit attacks and how long its attackers train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Sizes of an audit.

    Attributes:
        name: As on the command line.
        texts: Released texts that are attacked, half to choose the strongest attack, half to report it.
        public_tokens: Tokens of the public text that the attackers train on, at most.
        passes: Over the public text, each with fresh noise, by the attackers that train.
        optimized_texts: Texts that the optimising attack is run on; 0 leaves it out.
        optimize_steps: Of the optimiser, for each restart.
        repeats: Numbers of fresh releases in the curve over repeated releases.
        beam: Hypotheses that the language prior keeps.
    """

    name: str
    texts: int
    public_tokens: int
    passes: int
    optimized_texts: int
    optimize_steps: int
    repeats: tuple[int, ...]
    beam: int


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        preset.name: preset
        for preset in (
            Preset(
                name="quick",
                texts=200,
                public_tokens=30_000,
                passes=2,
                optimized_texts=0,
                optimize_steps=0,
                repeats=(1, 3, 10),
                beam=4,
            ),
            Preset(
                name="standard",
                texts=1_000,
                public_tokens=150_000,
                passes=8,
                optimized_texts=40,
                optimize_steps=500,
                repeats=(1, 2, 3, 5, 10),
                beam=8,
            ),
            Preset(
                name="full",
                texts=4_000,
                public_tokens=1_000_000,
                passes=12,
                optimized_texts=200,
                optimize_steps=2_000,
                repeats=(1, 2, 3, 5, 10, 20),
                beam=16,
            ),
        )
    }
)
