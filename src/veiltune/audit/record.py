"""attacks.json: what an audit of a split run measured. Versioned; the report reads nothing else of the attacks.

Every rate has its count and interval. Nothing here names a text, a token or a person.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from veiltune.attacks.result import AttackResult

FORMAT = 1
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Status = Literal["done", "failed", "not_applicable"]
GroupName = Literal["all", "contributing", "personal", "rare"]


class Record(BaseModel):
    """A part of what is written down: frozen, nothing unknown in it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Rate(Record):
    """Successes out of trials with intervals at 95 %."""

    successes: Count
    trials: Annotated[int, Field(ge=1)]
    value: Share
    """successes / trials"""
    low: Share
    """Clopper-Pearson; takes trials as independent"""
    high: Share
    by_text: tuple[Share, Share] | None = None
    """where trials hang together: over whole texts (of tokens, bootstrap) or over persons (of texts); else None"""

    @classmethod
    def of(cls, result: AttackResult, by_text: tuple[float, float] | None = None) -> Self:
        """From a scored attack."""
        low, high = result.interval()
        return cls(
            successes=result.successes,
            trials=result.trials,
            value=result.success_rate,
            low=low,
            high=high,
            by_text=by_text,
        )

    def interval(self) -> tuple[float, float]:
        """Both intervals as one: at each end the wider of the two."""
        low, high = self.by_text or (self.low, self.high)
        return min(low, self.low), max(high, self.high)


class Estimate(Record):
    """A number that is no share of trials, such as an AUC, with its interval at 95 %."""

    value: float
    low: float
    high: float


class Attack(Record):
    """One attack: how it went on the half that chooses and on the half that is reported."""

    name: str
    """as in docs/attacks.md"""
    title: str
    """for people"""
    sees: str
    """what its adversary needs, in a sentence"""
    status: Status
    reason: str = ""
    """why it failed or does not apply"""
    seconds: Annotated[float, Field(ge=0)] = 0.0
    calibration: Rate | None = None
    """success on the calibration half"""
    reported: Rate | None = None
    """success on the other half"""
    reported_top5: Rate | None = None
    """the truth among five guesses"""
    rouge_l: Share | None = None
    """mean ROUGE-L F1 of the guessed against the true token sequence"""
    auc: Estimate | None = None
    """where the attack ranks: area under its ROC curve"""
    roc: tuple[tuple[Share, Share], ...] = ()
    """(false positive rate, true positive rate), for a curve"""
    settings: dict[str, float | int | str | bool] = {}
    """what it was run with"""


class Group(Record):
    """Tokens of one kind, attacked by the strongest attack for them (chosen on the calibration half)."""

    name: GroupName
    description: str
    attack: str = ""
    rate: Rate | None = None
    """None if there are too few tokens"""
    needed: Count = 0
    """tokens that would be enough, where there are too few"""


class FrequencyBin(Record):
    """Recovery of tokens by how often they occur in the public text."""

    label: str
    """such as "1 to under 10": occurrences in 100,000 of its tokens"""
    rate: Rate | None


class RepeatedRelease(Record):
    """What would be recovered if the same texts were released again with fresh noise."""

    releases: Annotated[int, Field(ge=1)]
    attack: str
    rate: Rate


class Inversion(Record):
    """Embedding inversion: tokens back from released vectors."""

    strongest: str
    """name of the attack chosen on the calibration half"""
    recovery: Rate
    """its success on the reported half"""
    empirical_privacy: Estimate
    """1 - recovery, with the wider of the two intervals"""
    attacks: tuple[Attack, ...]
    groups: tuple[Group, ...]
    by_frequency: tuple[FrequencyBin, ...]
    repeated: tuple[RepeatedRelease, ...]


class Control(Record):
    """A check of the audit itself."""

    name: Literal["positive", "shuffled"]
    description: str
    attack: str
    rate: Rate
    expected: Share
    """at least this for the positive control, this by chance for the shuffled one"""
    passed: bool


class Labels(Record):
    """What the vendor learns of the labels from gradients and activations."""

    mode: Literal["disclosed", "randomized_response"]
    num_classes: Annotated[int, Field(ge=2)]
    majority: Share
    """share of the largest class: what a guess without any attack gets"""
    bound: Share | None
    """largest success rate that randomised response leaves to an attack that sees only what derives from the
    randomised labels, at these class shares; None if labels are disclosed"""
    claimed_epsilon: float | None
    attacks: tuple[Attack, ...]


class Attribute(Record):
    """Inference of a sensitive attribute of texts, trained on some persons, tested on others."""

    name: str
    classes: Annotated[int, Field(ge=2)]
    split: Literal["person", "text"]
    majority: Rate
    """always guessing the training half's largest class"""
    ceiling: Attack
    """bag of words on the clean text: what the text itself tells"""
    attacks: tuple[Attack, ...]


class ExtractionPoint(Record):
    """How well a customer's copy of the vendor's top agrees with it after so many queries."""

    queries: Annotated[int, Field(ge=1)]
    fidelity: Rate


class Bound(Record):
    """One proven limit."""

    name: str
    title: str
    value: float | None
    unit: str
    """such as "epsilon", "nats", "share of tokens" """
    statement: str
    """what holds, against whom, and what it does not cover"""


class Sizes(Record):
    """How much was attacked and trained on."""

    texts: Count
    tokens: Count
    """without special tokens, over both halves"""
    calibration_texts: Count
    reported_texts: Count
    public_texts: Count
    public_tokens: Count
    unseen_token_share: Share
    """share of the attacked tokens that never occur in the public text"""


class AttackRecord(Record):
    """The whole of attacks.json."""

    format: Literal[1] = 1
    veiltune: str
    """version that wrote it"""
    created: str
    """UTC, ISO 8601"""
    preset: str
    """quick, standard or full"""
    seconds: Annotated[float, Field(ge=0)]
    seed: int
    """of the audit's own draws: halves, training of attackers and their noise; the run's noise is another"""
    public_source: str
    """in the user's words or the file's name"""
    sizes: Sizes
    inversion: Inversion
    controls: tuple[Control, ...]
    side_channels: tuple[Attack, ...]
    labels: Labels
    attributes: tuple[Attribute, ...]
    extraction: tuple[ExtractionPoint, ...]
    bounds: tuple[Bound, ...]
    notes: tuple[str, ...] = ()
    """what a reader must know besides"""


def strongest(attacks: Sequence[Attack]) -> Attack:
    """The finished attack with the highest success on the calibration half; ties go to the first."""
    done = [attack for attack in attacks if attack.calibration is not None]
    return max(done, key=lambda attack: attack.calibration.value if attack.calibration else 0.0)
