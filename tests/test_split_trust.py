"""What neither party takes on trust: the table's order, the vendor's norms and answers, the customer's batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from parties import Vendor, open_job, running_vendor
from runs_helper import ledger_totals, make_texts, tune_config, write_csv, write_tables
from veiltune.config import TuneConfig
from veiltune.customer.batching import epoch_batches, secret_order
from veiltune.customer.opening import encode
from veiltune.customer.prediction import predict
from veiltune.customer.protection import long_token_share
from veiltune.customer.remote import JobRewoundError, ragged
from veiltune.customer.session import tune
from veiltune.errors import ConfigError, InputError, PrivacyError, ProtocolError, RunInUseError, VendorRefusedError
from veiltune.privatize.release import release_key
from veiltune.runs import RunFolder
from veiltune.vendor.service import CLOSED_REMEMBERED, VendorService
from veiltune.wire import veiltune_pb2 as pb
from veiltune.wire.codec import encode_tensor

D_CHI = {"mechanism": "d_chi", "noise_to_norm": 0.05}


@pytest.fixture
def vendor(tmp_path: Path, tiny_folder: Path) -> Iterator[Vendor]:
    with running_vendor(tmp_path / "vendor", tiny_folder) as running:
        yield running


@pytest.fixture
def configure(vendor: Vendor, tmp_path: Path) -> Callable[..., TuneConfig]:
    write_tables(tmp_path)
    return lambda **sections: tune_config(tmp_path, vendor.address, **sections)


class TestOrder:
    """The vendor knows `train.seed` and sees which rows each batch has."""

    COUNT = 48

    @pytest.fixture
    def seen(self, monkeypatch: pytest.MonkeyPatch) -> dict[int, list[int]]:
        """Rows of each step, as they come in at the vendor."""
        steps: dict[int, list[int]] = {}
        forward = VendorService._forward

        def watched(service: VendorService, tenant: str, request: pb.ForwardRequest) -> pb.ForwardReply:
            steps.setdefault(request.step, []).extend(request.rows.index)
            return forward(service, tenant, request)

        monkeypatch.setattr(VendorService, "_forward", watched)
        return steps

    def places_told(self, config: TuneConfig, vendor: Vendor, seen: dict[int, list[int]]) -> int:
        """Examples whose place in the table follows from the first epoch's rows and the seed, texts of one length."""
        table = make_texts(self.COUNT + 16, seed=7)[0][: self.COUNT]
        private = RunFolder(config.run).private
        bundle = type("Bundle", (), {"tokenizer": vendor.engine.base.tokenizer, "bottom": vendor.engine.base.model})
        keys = [release_key((private / "secret").read_bytes(), ids) for ids in encode(config, bundle, table)]  # type: ignore[arg-type]
        order = sorted(range(self.COUNT), key=lambda i: keys[i])  # of the upload: by length, then key
        expected = epoch_batches([24] * self.COUNT, batch_size=8, seed=config.train.seed, epoch=0)
        batches = zip(expected, (seen[step] for step in range(6)), strict=True)
        return sum(order[row] == place for batch, rows in batches for place, row in zip(batch, rows, strict=True))

    def test_the_vendor_cannot_tell_an_examples_place_in_the_table(
        self, configure: Callable[..., TuneConfig], vendor: Vendor, seen: dict[int, list[int]]
    ) -> None:
        config = configure(wire={"pad_to": 24}, train={"epochs": 1})
        tune(config)
        assert self.places_told(config, vendor, seen) <= 8  # one is expected by chance, 9 in a million runs

    def test_with_a_known_order_he_tells_all(
        self,
        configure: Callable[..., TuneConfig],
        vendor: Vendor,
        seen: dict[int, list[int]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("veiltune.customer.session.secret_order", lambda secret, count: list(range(count)))
        config = configure(wire={"pad_to": 24}, train={"epochs": 1})
        tune(config)
        assert self.places_told(config, vendor, seen) == self.COUNT

    def test_the_order_is_a_permutation_that_hangs_on_the_secret(self) -> None:
        one, other = (secret_order(bytes([n]) * 32, 1000) for n in (1, 2))
        assert sorted(one) == list(range(1000)) and one == secret_order(bytes([1]) * 32, 1000)
        assert sum(a == b for a, b in zip(one, other, strict=True)) < 10
        assert secret_order(bytes(32), 0) == []


class TestNorms:
    """The vendor sends the bottom that the noise is measured with."""

    def test_the_share_counts_own_tokens_but_special_ones(self) -> None:
        def clean(token_ids: list[list[int]]) -> torch.Tensor:
            return torch.tensor([[10.0 if token >= 5 else 1.0, 0.0] for ids in token_ids for token in ids])

        texts = [[0, 5, 2, 3, 1], [0, 2, 3, 4, 6, 2, 1]] * 20
        assert long_token_share(clean, texts, special_ids=[0, 1], reference_norm=1.0) == 2 / 8  # type: ignore[arg-type]
        assert long_token_share(clean, texts, special_ids=[0, 1], reference_norm=4.0) == 0.0  # type: ignore[arg-type]

    def test_a_bottom_with_short_public_sentences_is_refused_before_anything_is_sent(
        self, configure: Callable[..., TuneConfig], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("veiltune.customer.opening.reference_norm", lambda bundle: 1e-3)
        config = configure(privacy=D_CHI)
        with pytest.raises(PrivacyError, match="100% of your tokens more than 3 times as long as the public"):
            tune(config)
        assert not Path(config.run).exists()

    def test_an_honest_bottoms_share_is_stated(self, configure: Callable[..., TuneConfig], tmp_path: Path) -> None:
        key = "share_of_tokens_with_less_than_a_third_of_the_noise"
        config = configure(privacy=D_CHI)
        tune(config)
        assert RunFolder(config.run).read_json("privacy.json")["representations"][key] == 0.0
        predict(Path(config.run), str(tmp_path / "eval.csv"), tmp_path / "out.csv")
        assert RunFolder(config.run).read_json("privacy.json")["representations"][key] == 0.0


class TestCalls:
    """What one call may be."""

    def test_a_row_named_often_is_not_multiplied(self, vendor: Vendor) -> None:
        job = open_job(vendor.client(), key="rows" * 8)
        job.client.upload([pb.UploadChunk(job=job.job, first_row=0, rows=ragged(torch.ones(32, 32), None, [32]))])
        with pytest.raises(ProtocolError, match="2049 examples padded to 32 tokens are 65568 tokens"):
            job.send_forward(step=0, micro_batch=0, rows=[0] * 2049).outputs()

    def test_one_long_example_does_not_stretch_many_short_ones(self, vendor: Vendor) -> None:
        job = open_job(vendor.client(), key="long" * 8)
        lengths = [32] + [1] * 2048
        with pytest.raises(ProtocolError, match="send it in more micro-batches"):
            job.predict(ragged(torch.ones(sum(lengths), 32), None, lengths))

    def test_batches_that_do_not_fit_are_refused_before_anything_is_sent(
        self, configure: Callable[..., TuneConfig], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("veiltune.customer.opening.MAX_PADDED_TOKENS", 300)
        config = configure(wire={"pad_to": 20}, train={"batch_size": 6000, "micro_batches": 3, "epochs": 1})
        with pytest.raises(ConfigError, match=r"up to 16 texts of 20 tokens, of which a call takes 15; set .* = 4"):
            tune(config)
        assert not Path(config.run).exists()
        tune(configure(wire={"pad_to": 20}, train={"batch_size": 6000, "micro_batches": 4, "epochs": 1}))

    def test_the_declared_length_is_that_of_padded_texts(self, configure: Callable[..., TuneConfig]) -> None:
        config = configure(data={"max_length": 512}, wire={"pad_to": 16}, train={"epochs": 1})  # vendors take 512
        assert tune(config)["eval_examples"] == 16


@pytest.mark.parametrize(
    ("labels", "head"), [("disclosed", "vendor"), ("randomized_response", "vendor"), ("disclosed", "customer")]
)
def test_outputs_of_another_width_are_refused(
    configure: Callable[..., TuneConfig], monkeypatch: pytest.MonkeyPatch, labels: str, head: str
) -> None:
    def wide(_: VendorService, __: str, request: pb.ForwardRequest) -> pb.ForwardReply:
        return pb.ForwardReply(outputs=encode_tensor(torch.zeros(len(request.rows.index), 7)))

    monkeypatch.setattr(VendorService, "_forward", wide)
    with pytest.raises(ProtocolError, match=rf"shape must be \[8, {2 if head == 'vendor' else 32}\], got \[8, 7\]"):
        tune(configure(privacy={"labels": labels}, split={"head": head}))


def test_a_diverged_run_says_so(configure: Callable[..., TuneConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    def nonsense(_: VendorService, __: str, request: pb.ForwardRequest) -> pb.ForwardReply:
        return pb.ForwardReply(outputs=encode_tensor(torch.full((len(request.rows.index), 2), torch.nan)))

    monkeypatch.setattr(VendorService, "_forward", nonsense)
    with pytest.raises(
        InputError, match=r"the outputs of step 0 .* diverged; lower train\.learning_rate, in a new run"
    ):
        tune(configure())


def test_what_a_prediction_cannot_finish_without_is_looked_at_before_it_sends(
    configure: Callable[..., TuneConfig], tmp_path: Path
) -> None:
    config = configure(train={"epochs": 1})
    tune(config)
    write_csv(tmp_path / "new.csv", *make_texts(5, seed=99))
    run = RunFolder(config.run)
    before = ledger_totals(run.path)
    with pytest.raises(InputError, match="not a folder; name an existing one"):
        predict(run.path, str(tmp_path / "new.csv"), tmp_path / "none" / "out.csv")
    for name in ("privacy.json", "private/secret"):
        (run.path / name).rename(tmp_path / "away")
        with pytest.raises(InputError, match=name):
            predict(run.path, str(tmp_path / "new.csv"), tmp_path / "out.csv")
        assert not (run.path / name).exists()
        (tmp_path / "away").rename(run.path / name)
    assert ledger_totals(run.path) == before


def test_predictions_wait_for_nobody_and_refuse_a_run_in_use(
    configure: Callable[..., TuneConfig], tmp_path: Path
) -> None:
    config = configure(train={"epochs": 1})
    tune(config)
    with RunFolder(config.run).held(), pytest.raises(RunInUseError, match="another process is at work"):
        predict(Path(config.run), str(tmp_path / "eval.csv"), tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


class TestFinishedJobs:
    """A tenant's finished jobs are neither trained on nor piled up in memory."""

    @pytest.fixture
    def small(self, tmp_path: Path, tiny_folder: Path) -> Iterator[Vendor]:
        with running_vendor(tmp_path / "small", tiny_folder, max_jobs_per_tenant=2) as running:
            yield running

    def test_one_that_is_opened_again_counts(self, small: Vendor) -> None:
        client = small.client()
        open_job(client, key="a" * 32).close()
        for key in "bc":
            open_job(client, key=key * 32)
        with pytest.raises(VendorRefusedError, match="2 unfinished jobs, the limit is 2"):
            open_job(client, key="a" * 32)

    def test_predictions_keep_no_more_in_memory_than_may_be_open(self, small: Vendor) -> None:
        client, jobs = small.client(), []
        for number in range(5):
            jobs.append(open_job(client, key=f"{number:032d}"))
            jobs[-1].close()
        for _ in range(2):
            answers = [job.predict(ragged(torch.ones(3, 32), None, [3])) for job in jobs]
        assert len(small.engine._running) == 2
        assert all(torch.equal(answer, answers[0]) for answer in answers)  # none of them was trained

    def test_training_one_needs_it_opened(self, small: Vendor) -> None:
        job = open_job(small.client())
        job.close()
        with pytest.raises(JobRewoundError, match="the job is finished; open it again"):
            job.client.upload([pb.UploadChunk(job=job.job, first_row=0, rows=ragged(torch.ones(3, 32), None, [3]))])


def test_answers_of_closed_jobs_are_let_go() -> None:
    service = VendorService(None)  # type: ignore[arg-type]
    for number in range(CLOSED_REMEMBERED + 9):
        service._sequencers[str(number)] = object.__new__(KeptLast)
        service._retire(str(number))
    assert list(service._sequencers) == [str(number) for number in range(9, CLOSED_REMEMBERED + 9)]


class KeptLast:
    """A sequencer as `_retire` sees it."""

    def keep_last(self) -> Any:
        """Nothing to forget."""
