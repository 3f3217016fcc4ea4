"""What `[defences]` of train.toml may say: what happens to the text before and while it is learnt."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from veiltune.config.base import Count, Section

_LIGHT: dict[str, Any] = {"dedupe": 0.8, "max_records": 8, "scrub": "pseudonym", "stop_on_memorisation": 0.02}

#: What each preset sets where the file says nothing else.
PRESETS: dict[str, dict[str, Any]] = {
    "none": {"dedupe": 0.0, "max_records": 0, "scrub": "off", "mask_personal": False, "stop_on_memorisation": 0.0},
    "light": _LIGHT | {"mask_personal": False},
    "standard": _LIGHT | {"mask_personal": True},
    "dp": {"dedupe": 1.0, "max_records": 8, "scrub": "mask", "mask_personal": False, "stop_on_memorisation": 0.0},
}


class DefencesSection(Section):
    """What happens to the text before and while it is learnt. A preset is one line; each key of it may be set apart."""

    preset: Literal["none", "light", "standard", "dp"] = "none"
    """light: no duplicates, few records a person, pseudonyms, an early stop; standard: and no loss on personal data;
    dp: what goes with DP-SGD, each person's records by themselves"""
    dedupe: Annotated[float, Field(ge=0, le=1)] | None = None
    """drop texts that share this much of their five-word shingles with an earlier one: 1 the same words only, 0 off;
    with privacy, the same words of the same person only"""
    max_records: Annotated[int, Field(ge=0)] | None = None
    """rows that stay of a person, the first ones (needs data.person_column); 0: all"""
    scrub: Literal["off", "pseudonym", "mask"] | None = None
    """replace the personal data that is found, by surrogates or by [EMAIL] and the like"""
    known: str = ""
    """table with the columns type and value: personal data to look for besides"""
    mask_personal: bool | None = None
    """generation: no loss on the tokens of personal data, or of what stands in their place"""
    goldfish: Annotated[int, Field(ge=0)] = 0
    """generation: no loss on one in so many tokens, the same ones wherever a passage occurs; 0: off"""
    goldfish_context: Count = 13
    """tokens of a passage that decide which"""
    stop_on_memorisation: Annotated[float, Field(ge=0, le=1)] | None = None
    """generation without privacy: end when the share of four-token passages that the model recites is so much larger
    on training rows than on evaluation rows; looked at every train.checkpoint_every steps; 0: off"""

    def settled(self, *, persons: bool, generation: bool) -> Defences:
        """The preset with what the file says besides, for a table with or without persons and a task."""
        chosen = PRESETS[self.preset] | {
            name: value for name in PRESETS["none"] if (value := getattr(self, name)) is not None
        }
        if not persons:
            chosen["max_records"] = 0
        if not generation:
            chosen |= {"mask_personal": False, "stop_on_memorisation": 0.0}
        return Defences(**chosen, known=self.known, goldfish=self.goldfish, goldfish_context=self.goldfish_context)


class Defences(Section):
    """What a run does, no more questions open: `DefencesSection` has the meanings."""

    dedupe: float
    max_records: int
    scrub: Literal["off", "pseudonym", "mask"]
    mask_personal: bool
    stop_on_memorisation: float
    known: str
    goldfish: int
    goldfish_context: int

    def words(self) -> str:
        """What is done, in the order in which it happens.

        >>> DefencesSection(preset="light").settled(persons=True, generation=True).words()
        'near-duplicates (0.8) dropped, at most 8 rows a person, scrub pseudonym, stop at 2 % excess recitation'
        """
        duplicates = "duplicates" if self.dedupe == 1 else f"near-duplicates ({self.dedupe:g})"
        parts = (
            (f"{duplicates} dropped", bool(self.dedupe)),
            (f"at most {self.max_records} rows a person", bool(self.max_records)),
            (f"scrub {self.scrub}", self.scrub != "off"),
            ("no loss on personal data", self.mask_personal),
            (f"no loss on one token in {self.goldfish}", bool(self.goldfish)),
            (f"stop at {100 * self.stop_on_memorisation:g} % excess recitation", bool(self.stop_on_memorisation)),
        )
        return ", ".join(words for words, done in parts if done) or "none"

    @property
    def of_data(self) -> bool:
        """Whether rows change before they are encoded."""
        return bool(self.dedupe or self.max_records or self.scrub != "off")
