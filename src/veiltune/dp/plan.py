"""The plan of a private run: the one place where sampling, clipping, noise and accounting meet.

The mechanism. A table has `num_units` units: its examples, or its persons with all their records. A plan, fixed before
the data are touched, sets q = `sampling_prob`, T = `steps`, C = `clip_norm`, s = `noise_multiplier`. At each step t:

1. Each unit is in the batch with probability q, independently of all else (`sampling.PoissonSampler`). The batch may be
   empty. Of a person at most `max_records` records stand in, drawn from its own (`sampling.Units.records`).
2. The unit's gradient g_u, at the parameters that the earlier outputs led to, is a function of these records alone
   (and of dropout's masks, drawn from the run's key: secret, and the same whoever else is in the batch, in law). It
   is scaled so that its L2 norm over all trainable parameters together is at most C (`clipping`). With "flat" it is
   g_u min(1, C / ||g_u||); with "per_layer" each of L parts is so scaled to C / sqrt(L); with "automatic" it is
   C g_u / (||g_u|| + c), c > 0. A unit whose gradient is not finite contributes zero.
3. The output is the sum of these, plus N(0, s^2 C^2 I), drawn once per step whatever the number of micro-batches or
   processes.
4. The output is divided by q * `num_units`, a number of the plan, and given to the optimizer.

Guarantee:
    Neighbouring tables differ by one unit added or removed; the plan is the same for both. In each way of sampling, the
    sums of step 3 then differ by at most C, and only if that unit was drawn: each step is a Gaussian mechanism of
    sensitivity C and noise multiplier s on a Poisson sample. T of these, each chosen in the light of the earlier
    outputs, are together (epsilon, delta)-indistinguishable for the epsilon of `accounting.claimed_epsilon`, in both
    directions (adding and removing). Whatever is computed from the outputs and public things alone is covered as well:
    the optimizer's state, every checkpoint, the final model, everything that it writes.
    Replacing a unit is one removal and one addition: at most 2 epsilon, with delta (1 + e^epsilon).

    Holds against anyone who knows all other units, the plan, the code and every output, but not the key of sampling and
    noise: with it, the noise can be subtracted. Whoever gets a checkpoint must not get the key. One key serves one
    table: run again on a changed table, it repeats the noise, and the difference of the two runs is bare. A run that
    is resumed repeats what it released, and adds nothing, only with the same key, plan, table and code.
    The noise is that of ChaCha20, so indistinguishability is for adversaries who cannot break it; it is stated for real
    arithmetic, and floating-point noise is not hardened (arXiv:2107.10138).

Taken as public: the plan, `num_units` among it; the starting model and tokenizer; the longest length that texts are cut
to; the set of labels; the hyper-parameters. If any of these was chosen by looking at the table, that look is extra.

Does not cover:
    * The trainer itself, who sees all texts; and what is computed from the table without noise: training loss, gradient
      norms, the share clipped, the sizes of the drawn batches, the count of gradients that were not finite, figures on
      an evaluation set taken from private data, and any choice made by them (early stopping, best checkpoint,
      hyper-parameter search).
    * Time per step and memory in use, which follow the number and length of the drawn texts.
    * What other units say about a person; a person under several ids; with unit "example", a person with several
      examples: k units are k-fold group privacy, k epsilon and more than k delta.
    * Models in which one example's gradient depends on another (batch normalisation, losses divided by the batch's
      tokens): the engine refuses these.

=====================================  ==============================================================
case                                   what holds
=====================================  ==============================================================
noise_multiplier 0 (`private` false)   nothing: claimed_epsilon is infinite
sampling_prob 1                        no amplification; T plain Gaussian mechanisms
stopped before the last step           the plan's epsilon; if the stop did not depend on private
                                       figures, `epsilon_after` the steps taken
delta at least 1 / num_units           little: publishing one unit at random has such a delta
=====================================  ==============================================================

Source: DP-SGD, Abadi et al. 2016, arXiv:1607.00133; automatic clipping, Bu et al. 2022, arXiv:2206.07136; per-layer
clipping, McMahan et al. 2018, arXiv:1710.06963.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from veiltune._validate import in_range, one_of, positive, positive_int, refusal
from veiltune.csprng import SecureGenerator
from veiltune.dp import accounting
from veiltune.dp.sampling import PoissonSampler, probability, whole
from veiltune.dp.weaknesses import weaknesses
from veiltune.errors import InputError

CLIPPINGS = ("flat", "per_layer", "automatic")
UNITS = ("example", "person")

MAX_STEPS = 10**9  # accountants compute with such numbers in floating point
MIN_BATCH = 1e-6  # `DPPlan.expected_batch_size` has nine decimals


@dataclass(frozen=True, kw_only=True)
class DPPlan:
    """What is done and what it costs; the module's docstring states the guarantee.

    >>> plan = DPPlan.for_noise(1.0, num_units=2000, expected_batch_size=32, steps=187, delta=1e-5)
    >>> round(plan.claimed_epsilon, 3), plan.sensitivity, plan.expected_batch_size
    (1.438, 1.0, 32.0)

    Attributes:
        num_units: Units in the table, at least 1; public.
        unit: "example" or "person".
        max_records: Records of a person in one step, at least 1; None takes all. None for examples.
        sampling_prob: Of each unit at each step, in (0, 1], and at least 1e-6 over num_units.
        steps: From 1 to 1e9.
        clip_norm: L2 norm that a unit's gradient is clipped to, > 0; infinite only without noise.
        clipping: One of `CLIPPINGS`.
        noise_multiplier: Standard deviation of the noise over the sensitivity; 0 is a run without privacy.
        delta: In [1e-12, 1).

    Raises:
        InputError: If a value is out of range or two do not fit each other.
    """

    num_units: int
    unit: str = "example"
    max_records: int | None = None
    sampling_prob: float
    steps: int
    clip_norm: float = 1.0
    clipping: str = "flat"
    noise_multiplier: float
    delta: float

    def __post_init__(self) -> None:
        positive_int(num_units=self.num_units)
        one_of(UNITS, unit=self.unit)
        one_of(CLIPPINGS, clipping=self.clipping)
        if (size := probability(sampling_prob=self.sampling_prob) * self.num_units) < MIN_BATCH:
            raise refusal("the expected batch size", f"at least {MIN_BATCH:g}", size, "raise batch_size")
        in_range(1, MAX_STEPS, steps=positive_int(steps=self.steps))
        if self.max_records is not None:
            positive_int(max_records=self.max_records)
            if self.unit == "example":
                raise refusal("max_records", "None where the unit is an example", self.max_records, "protect persons")
        if self.noise_multiplier != 0 or isinstance(self.noise_multiplier, bool):
            positive(noise_multiplier=self.noise_multiplier)
            positive(clip_norm=self.clip_norm, hint="noise needs a finite sensitivity")
        elif self.clip_norm != math.inf:
            positive(clip_norm=self.clip_norm)
        if in_range(accounting.MIN_DELTA, 1.0, delta=self.delta) == 1.0:
            raise refusal("delta", f"in [{accounting.MIN_DELTA:g}, 1)", self.delta)

    @classmethod
    def for_epsilon(
        cls,
        target_epsilon: float,
        *,
        num_units: int,
        expected_batch_size: float,
        steps: int | None = None,
        epochs: float | None = None,
        delta: float | None = None,
        clip_norm: float = 1.0,
        clipping: str = "flat",
        unit: str = "example",
        max_records: int | None = None,
    ) -> DPPlan:
        """The plan with the least noise whose claimed epsilon is at most the target.

        Args:
            target_epsilon: Above 0.
            num_units: See the class.
            expected_batch_size: Units per step on average, in [1e-6, num_units].
            steps: Exactly one of steps and epochs.
            epochs: Expected visits of each unit; rounded up to whole steps.
            delta: None is the smaller of 1e-5 and 1 / (10 num_units).
            clip_norm: See the class.
            clipping: See the class.
            unit: See the class.
            max_records: See the class.

        Raises:
            InputError: If a value is out of range, or the table is smaller than a batch.
            PrivacyError: If no noise up to 1000 meets the target; says what would fit.
        """
        draft = cls.for_noise(
            accounting.MAX_NOISE,
            num_units=num_units,
            expected_batch_size=expected_batch_size,
            steps=steps,
            epochs=epochs,
            delta=delta,
            clip_norm=clip_norm,
            clipping=clipping,
            unit=unit,
            max_records=max_records,
        )
        noise = accounting.calibrated_noise(
            target_epsilon=target_epsilon, sampling_prob=draft.sampling_prob, steps=draft.steps, delta=draft.delta
        )
        return replace(draft, noise_multiplier=noise)

    @classmethod
    def for_noise(
        cls,
        noise_multiplier: float,
        *,
        num_units: int,
        expected_batch_size: float,
        steps: int | None = None,
        epochs: float | None = None,
        delta: float | None = None,
        clip_norm: float = 1.0,
        clipping: str = "flat",
        unit: str = "example",
        max_records: int | None = None,
    ) -> DPPlan:
        """The plan with a given noise; its claimed epsilon is what it is. Arguments as in `for_epsilon`.

        Raises:
            InputError: If a value is out of range, or the table is smaller than a batch.
        """
        sampling_prob, steps = _schedule(num_units, expected_batch_size, steps, epochs)
        return cls(
            num_units=num_units,
            unit=unit,
            max_records=max_records,
            sampling_prob=sampling_prob,
            steps=steps,
            clip_norm=clip_norm,
            clipping=clipping,
            noise_multiplier=positive(noise_multiplier=noise_multiplier, hint="see DPPlan.without_privacy"),
            delta=default_delta(num_units) if delta is None else delta,
        )

    @classmethod
    def without_privacy(
        cls,
        *,
        num_units: int,
        expected_batch_size: float,
        steps: int | None = None,
        epochs: float | None = None,
        unit: str = "example",
        max_records: int | None = None,
    ) -> DPPlan:
        """The same sampling and division without clipping or noise: the yardstick. Arguments as in `for_epsilon`."""
        plan = cls.for_noise(
            1.0,
            num_units=num_units,
            expected_batch_size=expected_batch_size,
            steps=steps,
            epochs=epochs,
            unit=unit,
            max_records=max_records,
        )
        return replace(plan, clip_norm=math.inf, noise_multiplier=0.0)

    @property
    def private(self) -> bool:
        """Whether noise is added."""
        return self.noise_multiplier > 0

    @property
    def expected_batch_size(self) -> float:
        """Units per step on average: the public number that sums are divided by."""
        return round(self.sampling_prob * self.num_units, 9)

    @property
    def epochs(self) -> float:
        """Expected visits of each unit."""
        return self.sampling_prob * self.steps

    @property
    def sensitivity(self) -> float:
        """Most that one unit added or removed moves the clipped sum, in L2: clip_norm, for each way of clipping."""
        return self.clip_norm

    @property
    def noise_std(self) -> float:
        """Standard deviation of each coordinate of the noise on the sum."""
        return self.noise_multiplier * self.sensitivity if self.private else 0.0

    @property
    def claimed_epsilon(self) -> float:
        """Of the whole run at `delta`, by privacy loss distributions."""
        return self.epsilon_after(self.steps)

    @property
    def rdp_epsilon(self) -> float:
        """The cross-check on `claimed_epsilon` by Renyi differential privacy: an upper bound as well."""
        return accounting.rdp_epsilon(
            noise_multiplier=self.noise_multiplier, sampling_prob=self.sampling_prob, steps=self.steps, delta=self.delta
        )

    def epsilon_after(self, steps: int) -> float:
        """Spent after so many steps, for a stop that does not depend on private figures.

        Args:
            steps: At least 0, and at most those of the plan.
        """
        if whole(steps=steps) > self.steps:
            raise refusal("steps", f"at most the plan's {self.steps}", steps)
        return accounting.claimed_epsilon(
            noise_multiplier=self.noise_multiplier, sampling_prob=self.sampling_prob, steps=steps, delta=self.delta
        )

    def sampler(self, generator: SecureGenerator) -> PoissonSampler:
        """The plan's sampling under a key."""
        return PoissonSampler(self.num_units, sampling_prob=self.sampling_prob, generator=generator)

    def warnings(self) -> list[str]:
        """What makes this a weak claim, one line each; empty for a run without privacy, which claims nothing."""
        return weaknesses(self)

    def describe(self, *, classes_fixed: bool = False) -> dict[str, str]:
        """The whole claim, an ordered line for each of its parts.

        Args:
            classes_fixed: Whether a classifier's classes were settled before anyone read the table (or there are none):
                those that are taken from it are outside the claim.
        """
        cap = "" if self.max_records is None else f", at most {self.max_records} records of each in a step"
        return {
            "claim": self._claim(),
            "unit": f"one {self.unit} of {self.num_units}{cap}",
            "sampling": f"Poisson sampling, sampling_prob {self.sampling_prob:.6g}, empty batches allowed",
            "steps": f"{self.steps}, {self.epochs:.4g} expected visits of each unit",
            "expected batch size": f"{self.expected_batch_size:g}; sums are divided by it, never by the drawn size",
            "clipping": f"{self.clipping}, clip_norm {self.clip_norm:g}" if self.clip_norm < math.inf else "none",
            "noise": f"Gaussian, noise_multiplier {self.noise_multiplier:g}, standard deviation {self.noise_std:g} on "
            f"sums of sensitivity {self.sensitivity:g}"
            if self.private
            else "none",
            **(_scope(self.unit, classes_fixed=classes_fixed) if self.private else {}),
        }

    def _claim(self) -> str:
        if not self.private:
            return "no privacy: claimed epsilon is infinite, and the model may repeat what it was trained on"
        return (
            f"claimed epsilon {_rounded_up(self.claimed_epsilon)} at delta {self.delta:g}, add/remove one {self.unit}, "
            f"PLD (RDP cross-check {_rounded_up(self.rdp_epsilon)})"
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON and TOML can hold them; an infinite clip_norm becomes "inf"."""
        values = asdict(self)
        return values | {"clip_norm": "inf"} if self.clip_norm == math.inf else values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DPPlan:
        """The plan that `to_dict` wrote; a missing max_records is None.

        Raises:
            InputError: If a field is missing, unknown or out of range.
        """
        names = [field.name for field in fields(cls)]
        unknown = [name for name in values if name not in names]
        missing = [name for name in names if name not in values and name != "max_records"]
        if unknown or missing:
            raise InputError(
                f"a plan must have the fields {', '.join(names)}; missing: {', '.join(missing) or 'none'}, "
                f"unknown: {', '.join(unknown) or 'none'}; use the plan that the run wrote"
            )
        return cls(**{**values, "clip_norm": math.inf if values["clip_norm"] == "inf" else values["clip_norm"]})

    def differences(self, other: DPPlan) -> list[str]:
        """One line per field in which the run's plan (this one) and another differ.

        >>> DPPlan.for_noise(0.8, num_units=100, expected_batch_size=10, steps=5).differences(
        ...     DPPlan.for_noise(0.7, num_units=100, expected_batch_size=10, steps=5)
        ... )
        ['noise_multiplier: 0.8 in the run, 0.7 now']
        """
        mine, theirs = asdict(self), asdict(other)
        return [f"{name}: {mine[name]} in the run, {theirs[name]} now" for name in mine if mine[name] != theirs[name]]


def _scope(unit: str, *, classes_fixed: bool) -> dict[str, str]:
    several = "several examples of one person" if unit == "example" else "a person under several names"
    classes = "" if classes_fixed else "which classes a classifier has, if the table says; "
    return {
        "covers": "every checkpoint, the final model and whatever it writes, against anyone without the run's key",
        "does not cover": "the trainer, who sees the texts; training losses, gradient norms and evaluation figures; "
        f"choices made by them; time and memory of a step; {classes}{several}",
    }


def default_delta(num_units: int) -> float:
    """The smaller of 1e-5 and 1 / (10 num_units), and at least 1e-12."""
    return max(accounting.MIN_DELTA, min(1e-5, 0.1 / positive_int(num_units=num_units)))


def _schedule(num_units: int, expected_batch_size: float, steps: int | None, epochs: float | None) -> tuple[float, int]:
    """The sampling probability and the number of steps."""
    positive_int(num_units=num_units)
    if positive(expected_batch_size=expected_batch_size) > num_units:
        raise InputError(
            f"the expected batch size must be at most the number of units, {num_units}, got {expected_batch_size:g}: "
            "the table is smaller than a batch; lower batch_size or take more data"
        )
    if (steps is None) == (epochs is None):
        raise InputError(f"give exactly one of steps and epochs, got steps={steps!r}, epochs={epochs!r}")
    if epochs is not None:
        visits = positive(epochs=epochs) * num_units / expected_batch_size * (1 - 1e-12)
        steps = max(1, math.ceil(in_range(0, MAX_STEPS, steps=visits, hint="lower epochs or raise batch_size")))
    assert steps is not None
    return expected_batch_size / num_units, positive_int(steps=steps)


def _rounded_up(epsilon: float) -> str:
    """Two decimals, or three digits where it is small; never less than the value."""
    digits = max(2, 2 - math.floor(math.log10(epsilon))) if 0 < epsilon < math.inf else 2
    return f"{math.ceil(epsilon * 10**digits) / 10**digits:.{digits}f}" if epsilon < math.inf else "infinity"
