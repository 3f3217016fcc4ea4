"""The plan: what it says, what it refuses, and that its parts agree with each other."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veiltune.csprng import SecureGenerator
from veiltune.dp.accounting import claimed_epsilon, rdp_epsilon
from veiltune.dp.plan import CLIPPINGS, DPPlan, default_delta
from veiltune.errors import InputError, PrivacyError

few = settings(max_examples=20, deadline=None)
SMALL: dict[str, Any] = {"num_units": 2000, "expected_batch_size": 32, "steps": 187, "delta": 1e-5}


@pytest.fixture
def plan() -> DPPlan:
    return DPPlan.for_noise(1.0, **SMALL)


def test_the_parts_are_coupled(plan: DPPlan) -> None:
    assert plan.expected_batch_size == 32 and plan.sampling_prob == 32 / 2000
    assert plan.epochs == pytest.approx(187 * 32 / 2000)
    assert plan.private and plan.noise_std == plan.sensitivity == plan.clip_norm == 1.0
    same: dict[str, Any] = {"noise_multiplier": 1.0, "sampling_prob": 32 / 2000, "delta": 1e-5}
    assert plan.claimed_epsilon == claimed_epsilon(steps=187, **same)
    assert plan.rdp_epsilon == rdp_epsilon(steps=187, **same)
    assert plan.epsilon_after(50) == claimed_epsilon(steps=50, **same)
    assert plan.epsilon_after(0) == 0 < plan.epsilon_after(50) < plan.epsilon_after(187) == plan.claimed_epsilon
    with pytest.raises(InputError, match="steps must be at most the plan's 187, got 188"):
        plan.epsilon_after(188)


def test_noise_scales_with_the_clip_norm_and_epsilon_does_not(plan: DPPlan) -> None:
    for clipping in CLIPPINGS:
        wider = replace(plan, clip_norm=10.0, clipping=clipping)
        assert wider.noise_std == 10.0 * plan.noise_std
        assert wider.sensitivity == 10.0
        assert wider.claimed_epsilon == plan.claimed_epsilon


def test_the_sampler_follows_the_plan(plan: DPPlan) -> None:
    sampler = plan.sampler(SecureGenerator(bytes(32)))
    sizes = [len(sampler.draw(step)) for step in range(plan.steps)]
    deviation = math.sqrt(32 * (1 - plan.sampling_prob) / plan.steps)
    assert abs(sum(sizes) / plan.steps - plan.expected_batch_size) < 4 * deviation
    assert abs(sum(sizes) / plan.steps - 1.2 * plan.expected_batch_size) > 4 * deviation  # planted


def test_for_epsilon_meets_its_target_with_the_least_noise() -> None:
    plan = DPPlan.for_epsilon(1.0, **SMALL)
    assert 0.999 < plan.claimed_epsilon <= 1.0
    assert replace(plan, noise_multiplier=plan.noise_multiplier - 2e-4).claimed_epsilon > 1.0


def test_an_impossible_target_says_what_would_fit() -> None:
    with pytest.raises(PrivacyError, match=r"^epsilon must be at least .*, got 1e-05; allow more epsilon, or"):
        DPPlan.for_epsilon(1e-5, **SMALL)


def test_epochs_are_rounded_up_to_steps() -> None:
    def steps(num_units: int, batch: float, epochs: float) -> int:
        return DPPlan.for_noise(1.0, num_units=num_units, expected_batch_size=batch, epochs=epochs).steps

    assert steps(2000, 32, 3) == 188
    assert steps(300, 3, 0.7) == 70, "what is whole but for rounding is not rounded up"
    assert steps(10, 10, 0.01) == 1


@few
@given(num_units=st.integers(1, 10**6), share=st.floats(1e-6, 1.0), epochs=st.floats(0.01, 50))
def test_schedules_are_consistent(num_units: int, share: float, epochs: float) -> None:
    batch = max(share * num_units, 1e-3)
    plan = DPPlan.without_privacy(num_units=num_units, expected_batch_size=batch, epochs=epochs)
    assert plan.expected_batch_size == pytest.approx(batch, abs=1e-8)
    assert epochs * (1 - 1e-9) <= plan.epochs <= epochs + plan.sampling_prob
    assert DPPlan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize(("num_units", "delta"), [(100, 1e-5), (10**5, 1e-6), (10**6, 1e-7), (1, 1e-5)])
def test_the_default_delta_is_well_below_one_in_n(num_units: int, delta: float) -> None:
    assert default_delta(num_units) == pytest.approx(delta)
    plan = DPPlan.for_noise(5.0, num_units=num_units, expected_batch_size=1, steps=1)
    assert plan.delta == default_delta(num_units)
    assert not any("delta" in line for line in plan.warnings())


# --- what it says -----------------------------------------------------------------------------------------------------


def test_the_whole_claim_is_described() -> None:
    plan = DPPlan.for_noise(1.0, clip_norm=0.5, unit="person", max_records=4, **SMALL)
    lines = plan.describe()
    assert next(iter(lines)) == "claim"
    assert lines["claim"] == "claimed epsilon 1.44 at delta 1e-05, add/remove one person, PLD (RDP cross-check 1.82)"
    assert lines["unit"] == "one person of 2000, at most 4 records of each in a step"
    assert lines["sampling"] == "Poisson sampling, sampling_prob 0.016, empty batches allowed"
    assert lines["steps"] == "187, 2.992 expected visits of each unit"
    assert lines["expected batch size"].startswith("32;")
    assert lines["clipping"] == "flat, clip_norm 0.5"
    assert lines["noise"] == "Gaussian, noise_multiplier 1, standard deviation 0.5 on sums of sensitivity 0.5"
    assert "checkpoint" in lines["covers"] and "training losses" in lines["does not cover"]
    assert "which classes" in lines["does not cover"]
    assert "which classes" not in plan.describe(classes_fixed=True)["does not cover"]


def test_the_figures_in_the_claim_are_never_rounded_down() -> None:
    for noise in (0.9, 3.0, 40.0, 900.0):
        plan = DPPlan.for_noise(noise, **SMALL)
        words = plan.describe()["claim"].split()
        assert plan.claimed_epsilon <= float(words[2]) <= plan.claimed_epsilon * 1.01 + 1e-9
        assert plan.rdp_epsilon <= float(words[-1].rstrip(")")) <= plan.rdp_epsilon * 1.01 + 1e-9


def test_without_privacy_nothing_is_claimed() -> None:
    plan = DPPlan.without_privacy(num_units=100, expected_batch_size=10, steps=5)
    assert not plan.private and plan.noise_std == 0.0 and plan.clip_norm == math.inf
    assert plan.claimed_epsilon == plan.rdp_epsilon == plan.epsilon_after(1) == math.inf
    lines = plan.describe()
    assert lines["claim"].startswith("no privacy") and lines["noise"] == lines["clipping"] == "none"
    assert "covers" not in lines and not plan.warnings()
    clipped = replace(plan, clip_norm=1.0)
    assert clipped.claimed_epsilon == math.inf and clipped.describe()["clipping"] == "flat, clip_norm 1"


def test_weak_claims_are_called_weak(plan: DPPlan) -> None:
    assert not plan.warnings()
    (delta,) = replace(plan, delta=1 / 2000).warnings()
    assert "a mechanism that publishes one example at random has such a delta" in delta
    assert not replace(plan, delta=0.99 / 2000).warnings()
    (epsilon,) = replace(plan, sampling_prob=0.9).warnings()
    assert epsilon.startswith("claimed epsilon ") and "is above 10" in epsilon
    (noise,) = replace(plan, noise_multiplier=0.49, steps=1).warnings()
    assert noise.startswith("noise_multiplier 0.49 is below 0.5")
    (drowned,) = replace(plan, noise_multiplier=3.3).warnings()
    assert "drowns an expected batch of 32" in drowned and not replace(plan, noise_multiplier=3.1).warnings()
    (noise, empty) = replace(plan, sampling_prob=0.5 / 2000).warnings()
    assert "drowns" in noise and empty == "the expected batch of 0.5 is below one example: most are empty"
    assert len(replace(plan, noise_multiplier=0.4, sampling_prob=0.9, delta=0.01).warnings()) == 3


# --- keeping and comparing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("private", [True, False])
def test_a_plan_survives_strict_json(plan: DPPlan, private: bool) -> None:
    plan = plan if private else DPPlan.without_privacy(num_units=100, expected_batch_size=10, steps=5)
    text = json.dumps(plan.to_dict(), allow_nan=False)
    assert DPPlan.from_dict(json.loads(text)) == plan
    without_cap = {name: value for name, value in plan.to_dict().items() if value is not None}  # as TOML keeps it
    assert DPPlan.from_dict(without_cap) == plan


def test_a_kept_plan_with_other_fields_is_refused(plan: DPPlan) -> None:
    values = plan.to_dict()
    with pytest.raises(InputError, match="missing: delta, unknown: none"):
        DPPlan.from_dict({name: values[name] for name in values if name != "delta"})
    with pytest.raises(InputError, match="missing: none, unknown: sigma"):
        DPPlan.from_dict(values | {"sigma": 1.0})
    with pytest.raises(InputError, match="steps must be"):
        DPPlan.from_dict(values | {"steps": 0})


def test_differences_name_each_field(plan: DPPlan) -> None:
    assert plan.differences(DPPlan.from_dict(plan.to_dict())) == []
    other = replace(plan, noise_multiplier=0.7, steps=9, unit="person", max_records=2)
    assert plan.differences(other) == [
        "unit: example in the run, person now",
        "max_records: None in the run, 2 now",
        "steps: 187 in the run, 9 now",
        "noise_multiplier: 1.0 in the run, 0.7 now",
    ]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_units": 0}, "num_units must be a whole number of at least 1, got 0"),
        ({"unit": "persn"}, "unit 'persn' is unknown; did you mean 'person'"),
        ({"clipping": "ghost"}, "clipping 'ghost' is unknown; known: flat, per_layer, automatic"),
        ({"sampling_prob": 0.0}, r"sampling_prob must be in \(0, 1\], got 0.0"),
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"steps": 10**20}, r"steps must be in \[1, 1000000000\], got 100000000000000000000$"),
        ({"sampling_prob": 1e-12}, r"the expected batch size must be at least 1e-06, got 2e-09; raise batch_size"),
        ({"clip_norm": 0.0}, "clip_norm must be positive and finite, got 0.0"),
        ({"clip_norm": math.inf}, "clip_norm must be positive and finite, got inf; noise needs a finite sensitivity"),
        ({"noise_multiplier": -1.0}, "noise_multiplier must be positive and finite, got -1.0"),
        ({"noise_multiplier": math.nan}, "noise_multiplier must be positive and finite, got nan"),
        ({"noise_multiplier": False}, "noise_multiplier must be positive and finite, got False"),
        ({"noise_multiplier": 0.0, "clip_norm": -1.0}, "clip_norm must be positive and finite, got -1.0"),
        ({"delta": 0.0}, "delta must be in"),
        ({"delta": 1.0}, "delta must be in"),
        ({"max_records": 0, "unit": "person"}, "max_records must be a whole number of at least 1, got 0"),
        ({"max_records": 2}, "max_records must be None where the unit is an example, got 2; protect persons"),
    ],
)
def test_an_unusable_plan_is_refused(plan: DPPlan, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(plan, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expected_batch_size": 2001}, "at most the number of units, 2000, got 2001: the table is smaller than a"),
        ({"expected_batch_size": 0}, "expected_batch_size must be positive"),
        ({"epochs": 3}, "give exactly one of steps and epochs, got steps=187, epochs=3"),
        ({"steps": None}, "give exactly one of steps and epochs, got steps=None, epochs=None"),
        ({"steps": None, "epochs": 0.0}, "epochs must be positive"),
        (
            {"steps": None, "epochs": 1e308},
            r"steps must be in \[0, 1000000000\], got inf; lower epochs or raise batch_s",
        ),
        ({"expected_batch_size": 1e-12}, "the expected batch size must be at least 1e-06, got 1e-12; raise batch_size"),
        ({"expected_batch_size": 5e-324}, "sampling_prob must be in"),
    ],
)
def test_an_unusable_schedule_is_refused(change: dict[str, Any], message: str) -> None:
    for make in (DPPlan.for_noise, DPPlan.for_epsilon):
        with pytest.raises(InputError, match=message):
            make(1.0, **(SMALL | change))
    with pytest.raises(InputError, match=r"noise_multiplier must be positive and finite, got 0\.0; see DPPlan"):
        DPPlan.for_noise(0.0, **SMALL)


def test_the_plan_loads_no_framework() -> None:
    code = "import sys, veiltune.dp.plan; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
