"""The engine: what leaves a step is the plan's mechanism, whatever the micro-batches; misuse is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from dp_tables import collate, model, optimizer, table
from veiltune.csprng import SecureGenerator
from veiltune.dp.checks import probe
from veiltune.dp.clipping import ClippedSum, Clipping, clipped_grad_sum
from veiltune.dp.engine import DPEngine, make_private
from veiltune.dp.losses import causal_lm_losses
from veiltune.dp.noise import noisy_mean
from veiltune.dp.plan import DPPlan
from veiltune.dp.sampling import Units
from veiltune.errors import InputError, PrivacyError

KEY = bytes(range(32))
METHODS = ("lora", "adapter", "compacter", "bitfit", "rgp", "full")


def plan(units: int = 60, **changes: Any) -> DPPlan:
    fields: dict[str, Any] = {"num_units": units, "expected_batch_size": 12, "steps": 4, "delta": 1e-4}
    noise = changes.pop("noise_multiplier", 1.0)
    return DPPlan.for_noise(noise, **fields | changes)


def engine(made: nn.Module, **changes: Any) -> DPEngine:
    options: dict[str, Any] = {"plan": plan(), "collate": collate, "key": KEY, "max_rows": 4}
    return DPEngine(made, changes.pop("examples", table(60)), **options | changes)


def gradients(made: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


def zero_sum(size: int = 200_000, norm: float = 0.5) -> ClippedSum:
    empty = torch.zeros(0)
    return ClippedSum(
        grads={"w": torch.zeros(size)}, norms=empty, losses=empty, clipping=Clipping(norm=norm), clipped=empty.bool()
    )


# --- noise


@pytest.mark.parametrize("mode", ["flat", "per_layer", "automatic"])
def test_the_noise_drawn_has_the_claimed_scale(mode: Any) -> None:
    total = zero_sum()
    total.clipping = Clipping(norm=0.5, mode=mode)
    drawn = noisy_mean(total, noise_multiplier=1.2, expected_batch_size=8, generator=SecureGenerator(KEY))["w"]
    scale = 1.2 * total.sensitivity() / 8
    assert stats.kstest(drawn / scale, "norm").pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2, 1.02):  # planted
        assert stats.kstest(drawn / (scale * wrong), "norm").pvalue < 1e-3


def test_noise_differs_by_tensor_and_by_step_and_not_by_how_often_one_asks() -> None:
    root = SecureGenerator(KEY)

    def draw(step: int) -> dict[str, Tensor]:
        total = zero_sum(1000)
        total.grads["v"] = torch.zeros(1000)
        return noisy_mean(total, noise_multiplier=1, expected_batch_size=1, generator=root.derive("noise", step))

    first, again, later = draw(0), draw(0), draw(1)
    assert torch.equal(first["w"], again["w"])
    for one, other in ((first["w"], first["v"]), (first["w"], later["w"])):
        assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.15


def test_noise_needs_a_finite_norm_and_a_public_size() -> None:
    with pytest.raises(InputError, match="finite clip_norm"):
        noisy_mean(zero_sum(norm=math.inf), noise_multiplier=1, expected_batch_size=8, generator=SecureGenerator())
    with pytest.raises(InputError, match="expected_batch_size"):
        noisy_mean(zero_sum(), noise_multiplier=1, expected_batch_size=0, generator=SecureGenerator())


# --- a step


@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_the_clipped_sum_of_the_drawn_plus_noise_over_the_expected_size(method: str) -> None:
    """The twin draws, sums and adds noise by hand from the same key; RGP's carriers are put together by its layer."""
    made, examples = model(method), table(60)
    taken = engine(made)
    result = taken.backward(0)
    got = gradients(made)
    made.zero_grad(set_to_none=True)
    drawn = plan().sampler(SecureGenerator(KEY)).draw(0)
    assert result.size == len(drawn) and 3 < len(drawn) < 30
    total = clipped_grad_sum(
        made, [collate([examples[i]]) for i in drawn], loss=causal_lm_losses, clipping=Clipping(norm=1.0)
    )
    mean = noisy_mean(
        total, noise_multiplier=1.0, expected_batch_size=12, generator=SecureGenerator(KEY).derive("noise", 0)
    )
    if method == "rgp":
        layers = {f"{path}.projection.weight": m for path, m in made.named_modules() if hasattr(m, "refresh")}
        mean = {name: layers[name].gradient(mean[f"{name}/left"], mean[f"{name}/right"]) for name in layers}  # type: ignore[operator]
    assert got.keys() == mean.keys()
    for name in got:
        assert torch.allclose(got[name], mean[name], rtol=1e-4, atol=1e-6), name
    assert result.loss == pytest.approx(float(total.losses.mean()), rel=1e-5)
    assert result.median_norm == pytest.approx(float(total.norms.median()), rel=1e-4)


@pytest.mark.parametrize("options", [{"max_rows": 60}, {"max_rows": 1}, {"max_tokens": 30}, {"pad_rows": True}])
def test_how_a_batch_is_cut_does_not_matter(options: dict[str, Any]) -> None:
    made = model()
    usual = engine(made).backward(1)
    expected = gradients(made)
    made.zero_grad(set_to_none=True)
    other = engine(made, **options).backward(1)
    for name, gradient in gradients(made).items():
        assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-7), name
    assert other.size == usual.size and other.loss == pytest.approx(usual.loss, rel=1e-5)
    assert other.median_norm == pytest.approx(usual.median_norm, rel=1e-4)


def test_nobody_drawn_is_noise_alone() -> None:
    made = model()
    taken = engine(made, plan=plan(expected_batch_size=0.001, noise_multiplier=2.0))
    result = taken.backward(0)
    assert result.size == 0 and math.isnan(result.loss)
    drawn = torch.cat([gradient.flatten() for gradient in gradients(made).values()])
    assert stats.kstest(drawn / (2.0 / 0.001), "norm").pvalue > 1e-3


@pytest.mark.parametrize("mode", ["flat", "per_layer", "automatic"])
def test_the_clipped_share_is_that_of_the_units_that_were_scaled_down(
    mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {"sampling_prob": 1.0, "steps": 1, "noise_multiplier": 0.0, "delta": 1e-4, "num_units": 60}
    typical = engine(model(), plan=DPPlan(clip_norm=1e3, **whole)).backward(0).median_norm
    given, factors = [], Clipping.factors
    monkeypatch.setattr(Clipping, "factors", lambda own, squared: given.append(factors(own, squared)) or given[-1])
    claim = DPPlan(clip_norm=typical * 1.2, clipping=mode, **whole)
    share = engine(model(), plan=claim).backward(0).clipped_share
    least = torch.cat([torch.stack(list(part.values())).amin(0) for part in given[-15:]])
    assert len(least) == 60 and 0.05 < share < 1 and share == pytest.approx(float((least < 1).float().mean()))


def test_a_person_counts_once_however_many_records() -> None:
    made, examples = model(), table(60)
    persons = Units.persons([f"p{i // 20}" for i in range(60)])
    taken = engine(
        made,
        plan=plan(3, unit="person", expected_batch_size=3, noise_multiplier=1e-6, clip_norm=0.1, max_records=5),
        units=persons,
    )
    taken.backward(0)
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients(made).values()))
    assert norm <= 0.1 + 1e-4  # three persons at most 0.1 each, divided by 3
    assert len(examples) == 60


def test_without_privacy_the_same_path_gives_the_plain_gradient() -> None:
    made, examples = model(), table(60)
    free = DPPlan.without_privacy(num_units=60, expected_batch_size=12, steps=2)
    taken = engine(made, plan=free)
    result = taken.backward(0)
    got = gradients(made)
    made.zero_grad(set_to_none=True)
    drawn = free.sampler(SecureGenerator(KEY)).draw(0)
    causal_lm_losses(made, collate([examples[i] for i in drawn])).sum().div(12).backward()
    for name, gradient in gradients(made).items():
        assert torch.allclose(got[name], gradient, rtol=1e-4, atol=1e-6), name
    assert math.isnan(result.clipped_share)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(method: str) -> None:
    made = model(method)
    examples = [{"input_ids": [5, 6, 7, 8, 9, 10]}] * 60
    free = DPPlan.without_privacy(num_units=60, expected_batch_size=20, steps=25)
    rate = 5e-2 if method in ("compacter", "bitfit", "adapter") else 1e-2
    made, trained, batches = make_private(made, optimizer(made, rate), examples, plan=free, collate=collate)
    losses = []
    for batch in batches:
        losses.append(batch.backward().loss)
        trained.step()
    assert losses[-1] < 0.8 * losses[0]


# --- misuse


def test_the_optimizer_wants_a_fresh_private_gradient_for_each_step() -> None:
    made = model()
    made, trained, batches = make_private(made, optimizer(made), table(60), plan=plan(), collate=collate)
    with pytest.raises(PrivacyError, match="exactly once"):
        trained.step()
    next(iter(batches)).backward()
    trained.step()
    with pytest.raises(PrivacyError, match="exactly once"):
        trained.step()
    assert len(batches) == 4


def test_a_gradient_that_was_not_used_is_missed() -> None:
    made = model()
    made, _, batches = make_private(made, optimizer(made), table(60), plan=plan(), collate=collate)
    with pytest.raises(PrivacyError, match=r"the gradient of step 0 was not used; call the optimizer's step\(\)"):
        for batch in batches:
            batch.backward()


def test_a_second_pass_over_the_batches_is_refused() -> None:
    """It would add steps that the plan does not count, with noise that was used before."""
    made = model()
    made, trained, batches = make_private(made, optimizer(made), table(60), plan=plan(), collate=collate)
    for batch in batches:
        batch.backward()
        trained.step()
    with pytest.raises(PrivacyError, match="taken already"):
        for batch in batches:
            batch.backward()


def test_an_optimizer_that_asks_twice_for_a_step_is_refused() -> None:
    """LBFGS and SAM: two gradients at different weights under one draw of noise, whose difference has none."""
    made = model()
    batches = make_private(made, optimizer(made), table(60), plan=plan(), collate=collate)[2]
    batch = next(iter(batches))
    batch.backward()
    made.zero_grad(set_to_none=True)
    with pytest.raises(PrivacyError, match="handed out already"):
        batch.backward()


def test_dropout_is_drawn_from_the_key_and_from_nothing_else() -> None:
    """With a seed that others know, removing a unit would shift the masks of all others."""

    def step(seed: int, rate: float = 0.3) -> tuple[dict[str, Tensor], Tensor]:
        made = model()
        for module in made.modules():
            if isinstance(module, nn.Dropout):
                module.p = rate
        torch.manual_seed(seed)
        engine(made).backward(1)
        return gradients(made), torch.get_rng_state()

    (one, state), (other, _), (without, _) = step(1), step(2), step(1, 0.0)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not all(torch.allclose(one[name], without[name], rtol=1e-3) for name in one)
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())  # the caller's own draws go on as they would have


def test_a_micro_batch_that_is_half_added_is_not_added_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from veiltune.dp import record

    taken, calls = engine(model()), []

    def scarce(*arguments: Any) -> None:
        calls.append(1)
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(record.Record, "add_weighted_sums", scarce)
    with pytest.raises(PrivacyError, match="smaller micro-batches"):
        taken.backward(0)
    assert len(calls) == 1


def test_steps_beyond_the_plan_are_refused() -> None:
    with pytest.raises(PrivacyError, match="not in the plan"):
        engine(model()).backward(4)


def test_a_plan_for_another_table_is_refused() -> None:
    with pytest.raises(InputError, match="the table has 59"):
        engine(model(), examples=table(59))
    with pytest.raises(InputError, match="persons"):
        made = model()
        make_private(made, optimizer(made), table(60), plan=plan(), collate=collate, persons=["a"] * 60)


def test_owners_and_lengths_of_another_table_are_refused() -> None:
    """Nine owners of twelve examples would leave three out without a word."""
    for owners in (9, 14):
        persons = [f"p{number}" for number in range(owners)]
        claim = plan(owners, unit="person", expected_batch_size=3)
        made = model()
        with pytest.raises(InputError, match=f"12 examples, {owners} owners and 12 lengths"):
            make_private(made, optimizer(made), table(12), plan=claim, collate=collate, persons=persons)
    with pytest.raises(InputError, match="60 examples, 60 owners and 5 lengths"):
        engine(model(), lengths=[3] * 5)
    with pytest.raises(InputError, match="example 59 must have at least 1 token, got 0"):
        engine(model(), examples=[*table(59), {"input_ids": []}])


def test_the_first_step_is_one_of_the_plans() -> None:
    made = model()
    for first, message in ((5, r"in \[0, 4\], got 5"), (-1, "at least 0, got -1")):
        with pytest.raises(InputError, match=f"first_step must be .*{message}"):
            make_private(made, optimizer(made), table(60), plan=plan(), collate=collate, first_step=first)
    assert not len(make_private(made, optimizer(made), table(60), plan=plan(), collate=collate, first_step=4)[2])


def test_an_optimizer_of_replaced_parameters_is_refused() -> None:
    """The peers' bug: models trained for hours with zero change, epsilon reported."""
    made = model()
    trained = optimizer(made)
    for module in made.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad:
                setattr(module, name, nn.Parameter(parameter.detach().clone()))
    with pytest.raises(PrivacyError, match="does not hold"):
        make_private(made, trained, table(60), plan=plan(), collate=collate)
    more = torch.optim.AdamW([*[p for p in made.parameters() if p.requires_grad], nn.Parameter(torch.ones(1))])
    with pytest.raises(PrivacyError, match="not the model's"):
        make_private(made, more, table(60), plan=plan(), collate=collate)


def test_parameters_exchanged_later_are_noticed() -> None:
    made = model()
    taken = engine(made)
    taken.backward(0)
    taken.finish_step()
    layer = next(m for m in made.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad)
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    with pytest.raises(PrivacyError, match="exchanged"):
        taken.backward(1)


def test_weights_that_do_not_move_are_noticed() -> None:
    made = model()
    made, trained, batches = make_private(
        made, optimizer(made, rate=0.0), table(60), plan=plan(steps=6), collate=collate
    )
    trained.param_groups[0]["weight_decay"] = 0.0
    with pytest.raises(PrivacyError, match="no trainable weight has changed"):
        for batch in batches:
            batch.backward()
            trained.step()


# --- the probe


def mixing_loss(model: nn.Module, batch: Any) -> Tensor:
    """Hugging Face's normaliser: each row's tokens over the number of tokens in the batch."""
    losses = causal_lm_losses(model, batch)
    counts = (batch["labels"][:, 1:] != -100).sum(1)
    return losses * counts / counts.sum() * len(counts)


def test_the_probe_finds_a_loss_that_mixes_examples() -> None:
    examples = table(3, seed=3)
    probe(model(), examples, loss=causal_lm_losses, collate=collate)
    with pytest.raises(PrivacyError, match="mixes examples"):
        probe(model(), examples, loss=mixing_loss, collate=collate)
    with pytest.raises(PrivacyError, match="mixes examples"):
        engine(model(), loss=mixing_loss)


class Mixing(nn.Module):
    """Takes the mean over the batch away, in training only."""

    def forward(self, values: Tensor) -> Tensor:
        return values - values.mean(0, keepdim=True) if self.training else values


class Counting(nn.Module):
    """Keeps a running mean of what it sees, in training only, beside weights that get noise."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, values: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * values.detach().mean()
        return values


def test_the_probe_looks_in_training_mode_too_and_at_buffers() -> None:
    for layer, message in ((Mixing(), "mixes examples"), (Counting(), "ln_f.1.mean changes with the examples")):
        made = model()
        made.transformer.ln_f = nn.Sequential(made.transformer.ln_f, layer)
        modes = [module.training for module in made.modules()]
        with pytest.raises(PrivacyError, match=message):
            probe(made, table(3, seed=3), loss=causal_lm_losses, collate=collate)
        assert [module.training for module in made.modules()] == modes
    made = model()
    dropout = nn.Dropout(0.5)
    made.transformer.ln_f = nn.Sequential(made.transformer.ln_f, dropout)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    probe(made, table(3, seed=3), loss=causal_lm_losses, collate=collate)
    assert dropout.p == 0.5 and torch.equal(before, torch.get_rng_state())


def test_the_probe_finds_positions_that_depend_on_other_rows() -> None:
    """Padding on the left without position ids: a longer neighbour shifts a short row."""

    def left(examples: Any) -> dict[str, Tensor]:
        batch = collate(examples)
        lengths = batch["attention_mask"].sum(1).tolist()
        width = batch["input_ids"].shape[1]
        return {
            name: torch.stack([row.roll(width - length) for row, length in zip(value, lengths, strict=True)])
            for name, value in batch.items()
        }

    examples = [{"input_ids": [5, 6, 7]}, {"input_ids": list(range(10, 22))}]
    with pytest.raises(PrivacyError, match="mixes examples"):
        probe(model(), examples, loss=causal_lm_losses, collate=left)

    def placed(examples: Any) -> dict[str, Tensor]:
        batch = left(examples)
        return batch | {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)}

    probe(model(), examples, loss=causal_lm_losses, collate=placed)


# --- memory


def test_out_of_memory_halves_the_micro_batch_once_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from veiltune.dp.clipping import SumInProgress

    made, said = model(), []
    expected_engine = engine(made, max_rows=8)
    expected_engine.backward(0)
    expected = gradients(made)
    made.zero_grad(set_to_none=True)
    taken = engine(made, max_rows=8, say=said.append)
    add = SumInProgress.add

    def scarce(self: SumInProgress, model: nn.Module, batch: Any, **options: Any) -> None:
        if len(batch["input_ids"]) > 4:
            raise torch.OutOfMemoryError("out of memory")
        add(self, model, batch, **options)

    monkeypatch.setattr(SumInProgress, "add", scarce)
    taken.backward(0)
    assert said == ["out of memory: micro-batches are halved to 4 rows from here on"]
    for name, gradient in gradients(made).items():
        assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-7), name
    made.zero_grad(set_to_none=True)
    taken.backward(1)  # no word more
    assert len(said) == 1
    made.zero_grad(set_to_none=True)
    monkeypatch.setattr(SumInProgress, "add", lambda *a, **o: (_ for _ in ()).throw(torch.OutOfMemoryError("again")))
    with pytest.raises(torch.OutOfMemoryError):
        taken.backward(2)
