"""One split step through real sockets equals the unsplit step: same outputs, same loss, same parameters after AdamW."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parties import Vendor, open_job, running_vendor
from veiltune.customer.batching import pad_ids
from veiltune.customer.remote import RemoteJob, ragged
from veiltune.models.adapters import attach_peft, trainable_parameters
from veiltune.models.dropout import FastDropout
from veiltune.models.loading import classifier_model
from veiltune.models.optim import ResumableAdamW
from veiltune.models.split import BottomModel, HeadModel, split_head, split_model
from veiltune.wire import veiltune_pb2 as pb
from veiltune.wire.codec import encode_tensor, unpad

LENGTHS = [5, 3, 7]
LABELS = torch.tensor([0, 1, 1])
LEARNING_RATE = 1e-2


@pytest.fixture
def vendor(tmp_path: Path, tiny_folder: Path) -> Iterator[Vendor]:
    with running_vendor(tmp_path / "vendor", tiny_folder) as running:
        yield running


def token_ids() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [[2, *torch.randint(4, 99, (n - 2,), generator=generator).tolist(), 3] for n in LENGTHS]


def no_dropout(module: torch.nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout | FastDropout):
            part.p = 0.0


def unsplit_step(vendor: Vendor, method: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The obviously correct twin: the whole model, PEFT on the blocks above the cut, one AdamW step."""
    model = classifier_model(vendor.engine.base, num_labels=2, seed=3)
    bottom, top = split_model(model, cut_layer=1)
    attach_peft(top, method=method, seed=3, rank=4, alpha=8.0, adapter_size=8)  # type: ignore[arg-type]
    no_dropout(top)
    ids, mask = pad_ids(token_ids())
    optimizer = torch.optim.AdamW(trainable_parameters(top).values(), lr=LEARNING_RATE, weight_decay=0.01)
    logits = top(bottom.eval()(ids, mask), mask)
    torch.nn.functional.cross_entropy(logits, LABELS).backward()
    optimizer.step()
    return logits.detach(), {name: p.detach() for name, p in trainable_parameters(top).items()}


def released(bottom: BottomModel) -> tuple[Tensor, pb.Ragged]:
    ids, mask = pad_ids(token_ids())
    values = unpad(bottom(ids, mask), mask)
    return values, ragged(values.detach(), None, LENGTHS)


def assert_same_parameters(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert torch.allclose(parameter, theirs[name], rtol=1e-6, atol=1e-7), name


@pytest.mark.parametrize("method", ["lora", "bitfit", "adapter"])
@pytest.mark.parametrize("upload", [True, False], ids=["uploaded", "sent"])
def test_head_at_the_vendor(vendor: Vendor, method: str, upload: bool) -> None:
    logits, expected = unsplit_step(vendor, method)
    model = classifier_model(vendor.engine.base, num_labels=2, seed=3)
    bottom, _ = split_model(model, cut_layer=1)
    client = vendor.client()
    job = open_job(client, method=method)
    slot = vendor.engine.running("loopback", job.job).slot
    no_dropout(slot.top)
    _, frame = released(bottom.eval())
    if upload:
        client.upload([pb.UploadChunk(job=job.job, first_row=0, rows=frame)])
        pending = job.send_forward(step=0, micro_batch=0, rows=[0, 1, 2])
    else:
        pending = job.send_forward(step=0, micro_batch=0, released=frame)
    outputs = pending.outputs()
    torch.nn.functional.cross_entropy(outputs, LABELS).backward()
    job.send_optim_step(step=0, learning_rate=LEARNING_RATE)
    job.settle()
    assert torch.equal(outputs.detach(), logits)
    assert_same_parameters(dict(trainable_parameters(slot.top)), expected)


@pytest.mark.parametrize("method", ["lora", "bitfit", "adapter"])
def test_head_at_the_customer(vendor: Vendor, method: str) -> None:
    logits, expected = unsplit_step(vendor, method)
    model = classifier_model(vendor.engine.base, num_labels=2, seed=3)
    bottom, top = split_model(model, cut_layer=1)
    head: HeadModel = split_head(top)[1]
    attach_peft(head, method="none", seed=0)
    no_dropout(head)
    local = ResumableAdamW(trainable_parameters(head), weight_decay=0.01)
    client = vendor.client()
    job = open_job(client, method=method, head="customer")
    slot = vendor.engine.running("loopback", job.job).slot
    no_dropout(slot.top)
    _, frame = released(bottom.eval())
    hidden = job.send_forward(step=0, micro_batch=0, released=frame).outputs()
    outputs = head(hidden)
    torch.nn.functional.cross_entropy(outputs, LABELS).backward()
    job.send_optim_step(step=0, learning_rate=LEARNING_RATE)
    local.apply(learning_rate=LEARNING_RATE)
    job.settle()
    assert torch.allclose(outputs, logits, rtol=1e-6, atol=1e-6)
    ours = {n.rpartition("layer.")[2]: p for n, p in trainable_parameters(slot.top).items()}
    ours |= {n.rpartition("model.")[2]: p for n, p in trainable_parameters(head).items()}
    theirs = {
        (n.rpartition("layer.")[2] if "layer." in n else n.rpartition("model.")[2]): p for n, p in expected.items()
    }
    assert_same_parameters(ours, theirs)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_unfrozen_bottom_gets_the_gradient_of_the_unsplit_model(vendor: Vendor, micro_batches: int) -> None:
    model = classifier_model(vendor.engine.base, num_labels=2, seed=3)
    whole_bottom, whole_top = split_model(model, cut_layer=1)
    attach_peft(whole_top, method="lora", seed=3, rank=4, alpha=8.0)
    no_dropout(whole_bottom), no_dropout(whole_top)
    ids, mask = pad_ids(token_ids())
    torch.nn.functional.cross_entropy(whole_top(whole_bottom(ids, mask), mask), LABELS).backward()

    bottom, _ = split_model(model, cut_layer=1)
    no_dropout(bottom)
    job: RemoteJob = open_job(vendor.client(), frozen_bottom=False)
    no_dropout(vendor.engine.running("loopback", job.job).slot.top)
    groups = [[0, 1, 2]] if micro_batches == 1 else [[0], [1], [2]]
    for number, group in enumerate(groups):
        ids, mask = pad_ids([token_ids()[i] for i in group])
        values = unpad(bottom(ids, mask), mask)
        frame = pb.Ragged(values=encode_tensor(values), lengths=[LENGTHS[i] for i in group])
        outputs = job.send_forward(step=0, micro_batch=number, released=frame).outputs(values)
        loss = torch.nn.functional.cross_entropy(outputs, LABELS[group], reduction="sum") / 3
        loss.backward()
    for (name, ours), theirs in zip(bottom.named_parameters(), whole_bottom.parameters(), strict=True):
        if theirs.grad is not None:
            assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7), name


def test_a_frozen_bottom_never_gets_a_cut_gradient(vendor: Vendor) -> None:
    client = vendor.client()
    job = open_job(client)
    frame = ragged(torch.randn(8, 32), None, [5, 3])
    job.send_forward(step=0, micro_batch=0, released=frame).outputs()
    reply = job.send_backward(torch.ones(2, 2), step=0, micro_batch=0).result()
    assert not reply.HasField("cut_gradients")


def test_two_jobs_do_not_touch_each_other(vendor: Vendor) -> None:
    """A step of one job leaves the other's outputs, and the shared base, bit for bit as they were."""
    client = vendor.client()
    frame = ragged(torch.randn(8, 32, generator=torch.Generator().manual_seed(0)), None, [5, 3])
    before = {name: p.clone() for name, p in vendor.engine.base.model.named_parameters()}
    mine, other = open_job(client, key="a" * 32), open_job(client, key="b" * 32, method="bitfit")
    untouched = other.predict(frame)
    for step in range(2):
        mine.send_forward(step=step, micro_batch=0, released=frame).outputs().sum().backward()
        mine.send_optim_step(step=step, learning_rate=0.1)
    mine.settle()
    assert torch.equal(other.predict(frame), untouched)
    assert not torch.equal(mine.predict(frame), untouched)
    assert all(torch.equal(p, before[name]) for name, p in vendor.engine.base.model.named_parameters())
