"""What the user of an audit chooses."""

from __future__ import annotations

from dataclasses import dataclass

from veiltune._validate import in_range

LARGEST_SEED = 2**62  # some is added to it; torch and numpy take 64 bits and nothing negative


@dataclass(frozen=True, kw_only=True)
class AuditOptions:
    """What to attack with.

    Attributes:
        public: Public text: a `.txt` file with a text a line, or a table.
        preset: A key of `PRESETS`.
        public_column: Column of a table's texts.
        attribute: Column of the training table with a sensitive attribute of each text's author; "" for none.
        person: Column that tells authors apart; "" to split by text.
        personal_terms: File of names and other personal terms, one a line; "" for patterns only.
        seed: Of the sample, its halves and the attackers' training.

    Raises:
        InputError: If the seed is out of range.
    """

    public: str
    preset: str = "standard"
    public_column: str = "text"
    attribute: str = ""
    person: str = ""
    personal_terms: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        in_range(0, LARGEST_SEED, seed=self.seed)
