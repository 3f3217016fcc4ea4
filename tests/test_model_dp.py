"""`[privacy.dp]`: the vendor trains its part under DP while the customer privatizes what it sends."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import nn

from parties import Vendor, running_vendor
from runs_helper import tune_config, write_tables
from tiny import model_of, tiny_config
from veiltune.config import TuneConfig
from veiltune.customer.batching import encode_texts, learning_rate_at, pad_ids, secret_order
from veiltune.customer.model_privacy import model_plan
from veiltune.customer.planning import plan as dry_run
from veiltune.customer.prediction import predict
from veiltune.customer.protection import run_secret
from veiltune.customer.session import tune
from veiltune.customer.training import PoissonBatches
from veiltune.data.tables import LabelSet, read_table
from veiltune.errors import ConfigError, InputError, PrivacyError, ProtocolError
from veiltune.models.adapters import attach_peft, trainable_parameters
from veiltune.models.loading import classifier_model
from veiltune.models.split import split_model
from veiltune.runs import RunFolder
from veiltune.vendor.engine import check_spec
from veiltune.vendor.private_sum import PrivateSum
from veiltune.vendor.slots import Slot
from veiltune.wire import veiltune_pb2 as pb

TRAIN = 40


@pytest.fixture(scope="module")
def vendor(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Iterator[Vendor]:
    folder = tmp_path_factory.mktemp("model-dp")
    config = tiny_config("bert")
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model_of(config, "base").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    with running_vendor(folder / "vendor", folder / "model", max_jobs_per_tenant=50) as running:
        yield running


@pytest.fixture
def configure(vendor: Vendor, tmp_path: Path) -> Callable[..., TuneConfig]:
    write_tables(tmp_path, train=TRAIN, eval=10)
    return lambda **sections: tune_config(tmp_path, vendor.address, **sections)


def losses(config: TuneConfig) -> list[float]:
    return [line["loss"] for line in RunFolder(config.run).metrics()]


def unsplit_losses(vendor: Vendor, config: TuneConfig) -> list[float]:
    """The slow twin: one model, one example at a time, clip and add; the run's own Poisson draws, no noise."""
    train = config.train
    table = read_table(config.data.train, text_column="text", label_column="label")
    classes = LabelSet.fit(table.labels or []).encode(table.labels or [])
    token_ids = encode_texts(vendor.engine.base.tokenizer, table.texts, max_length=config.data.max_length)
    model = classifier_model(vendor.engine.base, num_labels=2, seed=train.seed)
    bottom, top = split_model(model, cut_layer=config.split.cut_layer)
    attach_peft(top, method=train.method, seed=train.seed, rank=train.rank, alpha=train.alpha)
    parameters = list(trainable_parameters(top).values())
    optimizer = torch.optim.AdamW(parameters, weight_decay=train.weight_decay)
    plan = model_plan(config, len(token_ids))
    assert plan is not None
    secret = run_secret(RunFolder(config.run).private, config.noise_seed)
    batches, order = PoissonBatches(plan, secret), secret_order(secret, len(token_ids))
    curve = []
    for step in range(plan.steps):
        drawn = [order[place] for place in batches.draw(step)]
        sums, total = [torch.zeros_like(parameter) for parameter in parameters], 0.0
        for index in drawn:
            ids, mask = pad_ids([token_ids[index]])
            loss = nn.functional.cross_entropy(top(bottom(ids, mask), mask), torch.tensor([classes[index]]))
            gradients = torch.autograd.grad(loss, parameters)
            norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
            sums = [s + g * min(1.0, plan.clip_norm / norm) for s, g in zip(sums, gradients, strict=True)]
            total += loss.item()
        for parameter, clipped in zip(parameters, sums, strict=True):
            parameter.grad = clipped / plan.expected_batch_size
        rate = learning_rate_at(step, total=plan.steps, warmup_fraction=train.warmup_fraction, peak=train.learning_rate)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        curve.append(total / len(drawn) if drawn else 0.0)
    return curve


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_with_little_noise_the_losses_are_those_of_clip_and_add(
    vendor: Vendor, configure: Callable[..., TuneConfig], micro_batches: int
) -> None:
    config = configure(
        privacy={"dp": {"noise_multiplier": 1e-3, "clip_norm": 0.3}},
        train={"method": "bitfit", "micro_batches": micro_batches, "batch_size": 4, "learning_rate": 1e-2},
    )
    tune(config)
    twin = unsplit_losses(vendor, config)
    steps = 7  # AdamW makes steps of one size even of the smallest noise: the two drift apart in the end
    assert losses(config)[:steps] == pytest.approx(twin[:steps], abs=1e-2)
    assert max(twin[:steps]) - min(twin[:steps]) > 0.05


def test_dropout_under_dp_has_a_seed_that_nobody_knows(vendor: Vendor) -> None:
    """With the job's own, an example that comes or goes would shift the masks of all others."""
    fields: dict[str, Any] = {
        "num_labels": 3, "cut_layer": 1, "cut_embeddings": "word", "head": "vendor", "frozen_bottom": True,
        "method": "lora", "rank": 4, "alpha": 8.0, "adapter_size": 8, "precision": "fp32", "dropout": 0.5,
    }  # fmt: skip
    values = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))

    def outputs(job: pb.JobSpec) -> list[torch.Tensor]:
        slots = [Slot(vendor.engine.base, job) for _ in range(2)]
        for slot in slots:  # LoRA's B is zero at the start, and nothing would show
            for name, parameter in trainable_parameters(slot.top).items():
                if "lora_B" in name:
                    nn.init.ones_(parameter)
        return [slot.forward(0, 0, values, [6]) for slot in slots]

    one, other = outputs(pb.JobSpec(**fields))
    assert torch.equal(one, other)
    one, other = outputs(spec(clip_norm=1.0, **fields))
    assert not torch.equal(one, other)


def test_a_bottom_is_not_asked_for_with_a_head_of_any_size(vendor: Vendor, tmp_path: Path) -> None:
    request = pb.GetBottomRequest(cut_layer=1, num_labels=2_000_000, with_head=True)
    with pytest.raises(ProtocolError, match=r"num_labels must be in \[2, 10000\], got 2000000"):
        vendor.engine.write_bottom(request, tmp_path / "head")
    request.with_head = False
    vendor.engine.write_bottom(request, tmp_path / "bottom")
    request.cut_embeddings = "blocks"
    with pytest.raises(ProtocolError, match="cut_embeddings must be one of word, block"):
        vendor.engine.write_bottom(request, tmp_path / "other")


@pytest.mark.parametrize("method", ["lora", "bitfit", "adapter"])
def test_a_slots_sum_is_that_of_clip_and_add(vendor: Vendor, method: str) -> None:
    job = spec(
        clip_norm=0.2, num_labels=3, cut_layer=1, cut_embeddings="word", head="vendor", frozen_bottom=True,
        method=method, rank=4, alpha=8.0, adapter_size=8, precision="fp32",
    )  # fmt: skip
    slot = Slot(vendor.engine.base, job)
    lengths, generator = [5, 2, 7], torch.Generator().manual_seed(1)
    values, wanted = torch.randn(14, 32, generator=generator), torch.randn(3, 3, generator=generator)
    slot.top.train()
    parameters = {name: p for name, p in trainable_parameters(slot.top).items()}
    twin = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for rows, gradient in zip(values.split(lengths), wanted, strict=True):
        output = slot.top(rows[None], torch.ones(1, len(rows), dtype=torch.long))
        gradients = torch.autograd.grad(output, list(parameters.values()), gradient[None], allow_unused=True)
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients if g is not None))
        assert norm > 0.2  # so that clipping shows
        for total, g in zip(twin.values(), gradients, strict=True):
            total += 0 if g is None else g * 0.2 / norm
    slot.forward(0, 0, values[:7], lengths[:2])
    slot.forward(0, 1, values[7:], lengths[2:])
    slot.backward(0, 0, wanted[:2])
    slot.backward(0, 1, wanted[2:])
    assert slot._private is not None
    sums = slot._private._sum.result().grads
    for name, total in twin.items():
        assert torch.allclose(sums[name], total, rtol=1e-4, atol=1e-6), name
    assert slot.optim_step(0, 1e-3) == 1


def test_the_claim_is_in_the_run_folder_and_in_the_dry_run(
    configure: Callable[..., TuneConfig], tmp_path: Path
) -> None:
    config = configure(
        noise_seed=None,
        privacy={"mechanism": "d_chi", "noise_to_norm": 0.5, "dp": {"epsilon": 6.0}},
        train={"batch_size": 4, "epochs": 2},
    )
    summary = tune(config)
    assert 0 <= summary["utility"] <= 1
    said = RunFolder(config.run).read_json("privacy.json")
    assert said["representations"]["mechanism"] == "d_chi"
    assert said["finished_model"]["claimed_epsilon"] == pytest.approx(6.0, abs=0.01)
    assert "not the vendor" in said["finished_model"]["adversary"]
    assert any("6.00" in line for line in dry_run(config).values())
    predict(Path(config.run), config.data.eval, tmp_path / "out.csv", text_column="text")
    assert RunFolder(config.run).read_json("privacy.json")["finished_model"] == said["finished_model"]
    assert RunFolder(config.run).metrics()[-1]["step"] == 20  # ten steps an epoch on average


def test_a_seeded_run_claims_nothing_of_its_model(configure: Callable[..., TuneConfig]) -> None:
    config = configure(privacy={"dp": {"epsilon": 6.0}}, train={"batch_size": 4, "epochs": 1})
    tune(config)
    assert RunFolder(config.run).read_json("privacy.json")["finished_model"]["claimed_epsilon"] == "inf"


def test_empty_draws_are_steps_too(configure: Callable[..., TuneConfig]) -> None:
    config = configure(privacy={"dp": {"noise_multiplier": 1.0}}, train={"batch_size": 1, "epochs": 1})
    tune(config)
    lines = RunFolder(config.run).metrics()
    assert len(lines) == TRAIN
    assert any(line["examples"] == 0 for line in lines)  # P[none of 40 steps is empty] = (1 - 0.36)^40 = 2e-8


def spec(**changes: Any) -> pb.JobSpec:
    fields: dict[str, Any] = {"clip_norm": 0.5, "noise_multiplier": 2.0, "expected_batch_size": 8.0}
    return pb.JobSpec(**fields | changes)


def test_the_vendors_noise_has_the_scale_that_the_job_states() -> None:
    part = nn.Linear(100, 60)
    private = PrivateSum(part, spec())
    draws = []
    for _ in range(2):
        private.write_gradients()
        draws.append(torch.cat([part.weight.grad.flatten(), part.bias.grad]))  # type: ignore[union-attr]
    scale = 2.0 * 0.5 / 8.0
    for drawn in draws:
        assert stats.kstest(drawn / scale, "norm").pvalue > 1e-3
        assert stats.kstest(drawn / (scale * 2 / 3), "norm").pvalue < 1e-6  # planted
        assert stats.kstest(drawn / (scale * 3 / 2), "norm").pvalue < 1e-6  # planted
    assert abs(torch.corrcoef(torch.stack(draws))[0, 1]) < 0.06  # fresh in each step


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"split": {"head": "customer"}}, "vendor's part only"),
        ({"split": {"bottom": "lora"}}, "vendor's part only"),
        ({"privacy": {"dp": {"epsilon": 1.0, "noise_multiplier": 1.0}}}, "exactly one of epsilon"),
        ({"privacy": {"dp": {}}}, "exactly one of epsilon"),
    ],
)
def test_what_it_cannot_cover_is_refused(
    configure: Callable[..., TuneConfig], sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        configure(**{"privacy": {"dp": {"epsilon": 3.0}}} | sections)


def test_contributing_tokens_are_refused_under_dp(configure: Callable[..., TuneConfig]) -> None:
    privacy = {"mechanism": "d_chi", "eta": 9.0, "cti": "budget", "dp": {"epsilon": 3.0}}
    with pytest.raises(ConfigError, match="depend on other texts"):
        configure(privacy=privacy)


def test_an_impossible_plan_is_refused_before_anything_is_sent(configure: Callable[..., TuneConfig]) -> None:
    config = configure(privacy={"dp": {"epsilon": 1e-9}})
    with pytest.raises(PrivacyError):
        tune(config)
    with pytest.raises(InputError, match="batch"):
        tune(configure(privacy={"dp": {"epsilon": 3.0}}, train={"batch_size": 500}))


def test_a_vendor_refuses_a_job_whose_dp_it_cannot_give(vendor: Vendor) -> None:
    fields: dict[str, Any] = {"head": "customer", "frozen_bottom": True, "method": "lora"}
    complete = spec(
        protocol=1,
        num_labels=2,
        rank=1,
        adapter_size=1,
        max_tokens=9,
        cut_embeddings="word",
        precision="fp32",
        **fields,
    )
    with pytest.raises(ProtocolError, match="vendor's part only"):
        check_spec(complete, vendor.engine.base, vendor.engine.limits)
    complete.noise_multiplier = 0.0
    with pytest.raises(ProtocolError, match="noise_multiplier"):
        check_spec(complete, vendor.engine.base, vendor.engine.limits)
