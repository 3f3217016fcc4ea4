"""leakage.json: what a leakage audit of a language model found. Numbers with their intervals; never a text."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from veiltune.attacks.result import AttackResult
from veiltune.audit.record import Count, Estimate, Rate, Record, Share, Status

FORMAT = 1
Level = Literal["record", "person"]
Cue = Literal["all", "cue_free", "derivable"]


class TprAtFpr(Record):
    """Members found at the threshold that so many non-members pass."""

    fpr: Share
    """the nominal one: share of non-members above the threshold"""
    tpr: Estimate
    """with its 95 % interval; over persons at record level"""
    false_positives: Count
    """non-members above the threshold"""
    fpr_low: Share
    """95 % interval of the threshold's true false positive rate"""
    fpr_high: Share


class MembershipAttack(Record):
    """One membership inference attack at one level."""

    name: str
    """as in docs/method.md"""
    level: Level
    """a record, or a person by the mean over its records"""
    status: Status
    reason: str = ""
    """why it does not apply, or failed"""
    calibration_auc: Share | None = None
    """on the persons that choose the strongest attack"""
    auc: Estimate | None = None
    """on the others"""
    tpr_at_fpr: tuple[TprAtFpr, ...] = ()
    roc: tuple[tuple[Share, Share], ...] = ()
    """(false positive rate, true positive rate)"""
    by_repetition: tuple[tuple[int, Estimate], ...] = ()
    """AUC of persons with so many records"""


class Membership(Record):
    """Can someone who queries the model tell who was in the training text?"""

    strongest: str
    """attack at person level, chosen on the calibration persons"""
    auc: Estimate
    """of the strongest, on the others"""
    strongest_record: str
    """the same at record level"""
    blind: Estimate
    """AUC of words alone, without any model, at 99 %: above .5 the comparison would measure the texts"""
    persons_in: Count
    """reported, without the calibration persons"""
    persons_out: Count
    attacks: tuple[MembershipAttack, ...]


class ExtractionRate(Record):
    """What one attack recovers of one type of personal data."""

    attack: str
    type: str
    """name, email, phone, home, work, or "all" """
    cue: Cue
    """whether the value follows from the name"""
    recall: Rate
    """of the values in the training text"""
    chance: Rate | None
    """of the values of twins who are not in it, by the same attack; None where nobody is known not to be in it"""
    excess: Estimate | None
    """recall - chance; 95 %, a person being one trial"""
    base_recall: Share | None = None
    """of the same values by the same attack on the base model"""
    precision: Rate | None = None
    """of the well-formed values that it emitted, those in the training text; None if it emitted none"""


class Discoverable(Record):
    """Share of secrets that come out of so many samples with such a chance, given the true text before them."""

    queries: Annotated[int, Field(ge=1)]
    probability: Share
    recall: Rate
    chance: Rate | None


class Reconstruction(Record):
    """The rank of the true value among others of its type, given the true text before it."""

    type: str
    candidates: Annotated[int, Field(ge=2)]
    top_1: Rate
    top_10: Rate | None
    """None with fewer than 20 candidates"""
    chance_top_1: Rate | None
    """of the twins' values"""
    median_rank: float


class Extraction(Record):
    """Can someone who queries the model obtain personal data of the training text?"""

    strongest: str
    """attack chosen on the calibration persons by excess recall (recall, without twins) of cue-free data"""
    excess_recall: Estimate | None
    """its excess recall of cue-free data on the others: the headline"""
    recall: Rate
    chance: Rate | None
    rates: tuple[ExtractionRate, ...]
    discoverable: tuple[Discoverable, ...]
    recall_at_100_errors: Rate | None
    """of true-prefix guesses in order of confidence; None if there were fewer errors"""
    errors_curve: tuple[tuple[int, Share], ...]
    """(wrong guesses, recall)"""
    reconstruction: tuple[Reconstruction, ...]
    generated_tokens: Count
    """in the untargeted attack"""

    @property
    def overall_precision(self) -> Rate | None:
        """Of the strongest attack: true values among the well-formed ones that it wrote, of all types; None if none."""
        rows = [row.precision for row in self.rates if (row.attack, row.cue) == (self.strongest, "all")]
        told = [row for row in rows if row is not None]
        if not told:
            return None
        true, written = sum(row.successes for row in told), sum(row.trials for row in told)
        return Rate.of(AttackResult(name="precision", successes=true, trials=written))


class Exposure(Record):
    """How far inserted secrets stand out, in bits: log2 of references + 1 over the rank."""

    family: Literal["pii", "random"]
    repetitions: Annotated[int, Field(ge=1)]
    canaries: Annotated[int, Field(ge=1)]
    median_bits: float
    low: float
    """distribution-free interval of the median, at least 95 %; the range of the values if they are too few"""
    high: float
    at_cap: Count
    """canaries above every reference, whose exposure is at least the cap"""
    cap_bits: float


class OneRunBound(Record):
    """What the guesses about the coin-flipped canaries certify."""

    epsilon: Annotated[float, Field(ge=0)]
    """lower bound at the stated confidence; 0: nothing was certified"""
    confidence: Share
    delta: Annotated[float, Field(ge=0, lt=1)]
    canaries: Annotated[int, Field(ge=1)]
    included: Count
    guesses: Count
    correct: Count
    ceiling: float
    """what a perfect attack would certify with so many canaries"""
    claimed_epsilon: float | None
    """of the run, for the same delta; None: nothing is claimed"""
    claimed_unit: str | None = None
    exceeds_claim: bool
    """the implementation or the claim is wrong"""


class Perplexity(Record):
    """Of the validation text: persons and documents that are in no training text."""

    carrier: float
    """of documents without personal data"""
    personal: float
    """of the tokens of personal data"""
    all: float
    base_carrier: float | None = None
    """of the base model"""


class LeakageSizes(Record):
    """How much was asked."""

    persons_in: Count
    persons_out: Count
    records: Count
    tokens: Count
    calibration_pairs: Count
    context_cut: Count = 0
    """records that were longer than the model's context"""


class LeakageRecord(Record):
    """The whole of leakage.json."""

    format: Literal[1] = 1
    kind: Literal["leakage"] = "leakage"
    veiltune: str
    """version that wrote it"""
    created: str
    """UTC, ISO 8601"""
    preset: str
    """ci, std or full"""
    seconds: Annotated[float, Field(ge=0)]
    seed: int
    model: str
    """in the user's words"""
    model_digest: str
    base: str | None
    """the public model that the adversary compares with"""
    manifest_digest: str
    """SHA-256 of the manifest: which corpus, which coin flips"""
    full_vectors: bool
    """whether the model's answers are whole vectors"""
    guarded_by: str = ""
    """the guard that was audited with the model; empty for none, or for one that an API does not tell of"""
    sizes: LeakageSizes
    perplexity: Perplexity | None
    membership: Membership | None
    """None without people who are known not to be in the training text"""
    extraction: Extraction
    exposure: tuple[Exposure, ...]
    audited_epsilon: OneRunBound | None
    """None without coin-flipped canaries"""
    notes: tuple[str, ...] = ()
    """what a reader must know besides"""
