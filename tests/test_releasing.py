"""From texts to the outbox: what is kept for sending carries exactly the noise that the mechanism claims."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from veiltune.customer.outbox import Outbox
from veiltune.customer.releasing import Releaser
from veiltune.models.split import split_model
from veiltune.privatize.mechanisms import make_privatizer
from veiltune.privatize.release import ReleaseLedger
from veiltune.wire import veiltune_pb2 as pb

TEXTS = [[2, *[4 + (i * 7 + j) % 90 for j in range(8)], 3] for i in range(60)]


def release(folder: Path, model: PreTrainedModel, *, name: str, secret: bytes) -> torch.Tensor:
    """Radii of the noise in the outbox, one a token."""
    folder.mkdir()
    connection = sqlite3.connect(folder / "ledger.sqlite")
    releaser = Releaser(
        bottom=split_model(model, cut_layer=1)[0],
        privatizer=make_privatizer(name, dim=32, reference_norm=1.0, eta=None if name == "none" else 8.0),
        contributing=None,
        ledger=ReleaseLedger(connection),
        outbox=Outbox(folder / "outbox", connection),
        secret=secret,
        wire_dtype=pb.DTYPE_FLOAT32,
        reference_norm=1.0,
    )
    kept = releaser.outbox.get(releaser.prepare(TEXTS, None, part="train"))
    with torch.no_grad():
        noise = kept.values - releaser.clean(TEXTS)
    connection.close()
    return noise


@pytest.mark.parametrize("secret", [b"a" * 32, b"b" * 32])
def test_kept_releases_have_the_claimed_noise_and_fresh_radii(
    tmp_path: Path, tiny_model: Callable[..., PreTrainedModel], secret: bytes
) -> None:
    noise = release(tmp_path / "run", tiny_model("bert", "base"), name="d_chi", secret=secret)
    radii = noise.norm(dim=-1)
    assert radii.mean().item() == pytest.approx(
        32 / 8.0, rel=0.05
    )  # Gamma(32, 1/8) over 600 tokens: sd of the mean 0.03
    assert radii.std().item() == pytest.approx(32**0.5 / 8.0, rel=0.2)
    assert len(radii.unique()) == len(radii)


def test_the_check_notices_missing_noise_and_the_secret_decides_the_draw(
    tmp_path: Path, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model = tiny_model("bert", "base")
    assert release(tmp_path / "none", model, name="none", secret=b"a" * 32).norm(dim=-1).max() < 1e-4
    one, same, other = (
        release(tmp_path / str(i), model, name="d_chi", secret=secret)
        for i, secret in enumerate((b"a" * 32, b"a" * 32, b"b" * 32))
    )
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)
