"""Killed and resumed: real processes, SIGKILL, and a result that is bit for bit that of an uninterrupted run."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from parties import open_job, running_vendor
from runs_helper import Stage, adapter_of, free_port, ledger_totals, steps_logged, tune_config, wait_until, write_tables
from veiltune.config import TuneConfig
from veiltune.customer.remote import JobRewoundError, RemoteJob, ragged
from veiltune.customer.session import tune
from veiltune.runs import RunFolder
from veiltune.vendor.sequencer import Sequencer
from veiltune.wire import veiltune_pb2 as pb

TRAIN, EVAL, EPOCHS = 80, 8, 3
STEPS = TRAIN // 4 * EPOCHS
KILLED_AT = 27  # or a little later, in the middle of the second epoch; checkpoints are at multiples of 8
SPLITS: dict[str, dict[str, Any]] = {
    "frozen": {"cut_layer": 1},
    "unfrozen": {"cut_layer": 1, "bottom": "lora", "head": "customer"},
}
pytestmark = pytest.mark.timeout(300)  # processes start slowly on a busy machine
Configure = Callable[..., TuneConfig]


@pytest.fixture
def stage(tmp_path: Path, tiny_folder: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path, tiny_folder)
    yield stage
    stage.clear()


@pytest.fixture
def configure(stage: Stage, tmp_path: Path) -> Configure:
    """`configure(name, split, address)`: 60 steps with noise, randomised labels, and dropout on both sides."""
    write_tables(tmp_path, train=TRAIN, eval=EVAL)

    def config(name: str, split: dict[str, Any], address: str = stage.address) -> TuneConfig:
        return tune_config(
            tmp_path,
            address,
            run=str(tmp_path / name),
            vendor={"timeout_seconds": 90.0},
            split=split,
            privacy={"mechanism": "d_chi", "noise_to_norm": 0.3, "labels": "randomized_response"},
            train={"batch_size": 4, "micro_batches": 2, "dropout": 0.1, "checkpoint_every": 8},
            wire={"dtype": "bf16"},
        )

    return config


def losses(config: TuneConfig) -> dict[int, float]:
    """The loss of each step; a step that was done again must have had the same one."""
    curve: dict[int, float] = {}
    for line in RunFolder(config.run).metrics():
        assert curve.setdefault(line["step"], line["loss"]) == line["loss"]
    return curve


def assert_same_result(config: TuneConfig, undisturbed: TuneConfig, stage: Stage) -> None:
    assert losses(config) == losses(undisturbed) and len(losses(config)) == STEPS
    assert adapter_of(config, stage.state) == adapter_of(undisturbed, stage.state)  # by digest: bit for bit
    summaries = [RunFolder(c.run).read_json("summary.json") for c in (config, undisturbed)]
    assert summaries[0]["utility"] == summaries[1]["utility"]


def assert_released_once(config: TuneConfig) -> None:
    """Frozen: every text once. Unfrozen: every text once an epoch, although steps were done again."""
    totals, each = ledger_totals(Path(config.run)), 1 if config.split.bottom == "frozen" else EPOCHS
    assert totals.max_releases_per_example == each
    assert totals.releases == TRAIN * each + EVAL


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS.keys())
def test_both_parties_killed_in_mid_epoch(stage: Stage, configure: Configure, split: dict[str, Any]) -> None:
    vendor = stage.vendor()
    undisturbed, config = configure("undisturbed", split), configure("run", split)
    tune(undisturbed)
    customer = stage.customer(config)
    wait_until(lambda: steps_logged(config) >= KILLED_AT, "steps")
    customer.kill()
    vendor.kill()
    assert KILLED_AT <= steps_logged(config) < STEPS
    stage.vendor()
    customer = stage.customer(config)
    assert customer.ended() == 0, customer.stderr.read_text()
    assert_same_result(config, undisturbed, stage)
    assert_released_once(config)


def test_the_customer_follows_a_vendor_that_comes_back(stage: Stage, configure: Configure) -> None:
    vendor = stage.vendor()
    undisturbed, config = configure("undisturbed", SPLITS["unfrozen"]), configure("run", SPLITS["unfrozen"])
    tune(undisturbed)
    customer = threading.Thread(target=tune, args=(config,))
    customer.start()
    wait_until(lambda: steps_logged(config) >= KILLED_AT, "steps")
    vendor.kill()
    stage.vendor()
    customer.join(90)
    assert not customer.is_alive()
    assert_same_result(config, undisturbed, stage)
    assert_released_once(config)


def test_a_numbered_call_to_a_vendor_that_came_back_says_to_open_the_job_again(
    tmp_path: Path, tiny_folder: Path
) -> None:
    """Also right after a checkpoint, where the step fits but the graph of the forward pass is lost."""
    frame = ragged(torch.full((8, 32), 0.1), None, [5, 3])
    with running_vendor(tmp_path / "vendor", tiny_folder) as vendor:
        before = open_job(vendor.client())
        before.save(0)
        before.send_forward(step=0, micro_batch=0, released=frame).outputs()
    with running_vendor(tmp_path / "vendor", tiny_folder) as vendor:
        gradients_lost = RemoteJob(vendor.client(), before.job, next_seq=2, output_size=2)
        answer_lost = RemoteJob(vendor.client(), before.job, next_seq=1, output_size=2)
        with pytest.raises(JobRewoundError, match="open the job again"):
            gradients_lost.send_backward(torch.ones(2, 2), step=0, micro_batch=0).result()
        with pytest.raises(JobRewoundError, match="open the job again"):
            answer_lost.send_forward(step=0, micro_batch=0, released=frame).outputs()


def test_a_vendor_that_comes_back_during_the_evaluation_is_followed_too(
    tmp_path: Path, tiny_folder: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, honest = f"127.0.0.1:{free_port()}", RemoteJob.predict
    with contextlib.ExitStack() as vendors:

        def restart() -> None:
            vendors.close()
            vendors.enter_context(running_vendor(tmp_path / "vendor", tiny_folder, address=address))

        def predict(job: RemoteJob, released: pb.Ragged) -> torch.Tensor:
            monkeypatch.setattr(RemoteJob, "predict", honest)
            restart()
            return honest(job, released)

        restart()
        config = configure("run", SPLITS["frozen"], address)
        monkeypatch.setattr(RemoteJob, "predict", predict)
        summary = tune(config)
        (Path(config.run) / "summary.json").unlink()  # as if the customer had been killed just before its last line
        again = tune(config)
    assert len(RunFolder(config.run).metrics()) == STEPS
    assert (again["utility"], again["releases"]) == (summary["utility"], summary["releases"])
    assert_released_once(config)
    assert adapter_of(config, tmp_path / "vendor")


def test_a_call_whose_caller_gave_up_is_finished_and_its_repeat_answered_from_memory() -> None:
    done = []

    async def work() -> str:
        await asyncio.sleep(0.05)
        done.append("once")
        return "the answer"

    async def scenario() -> str:
        sequencer: Sequencer[str] = Sequencer(0)
        first = asyncio.create_task(sequencer.run(0, b"frame", work))
        await asyncio.sleep(0.01)
        first.cancel()
        return await sequencer.run(0, b"frame", work)

    assert asyncio.run(scenario()) == "the answer"
    assert done == ["once"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_is_one_line_and_the_run_goes_on(
    tmp_path: Path, tiny_folder: Path, stage: Stage, configure: Configure, number: signal.Signals
) -> None:
    with running_vendor(tmp_path / "vendor", tiny_folder) as vendor:
        config = configure("run", SPLITS["frozen"], vendor.address)
        customer = stage.customer(config)
        wait_until(lambda: steps_logged(config) >= 11, "steps")
        customer.popen.send_signal(number)
        assert customer.ended() == 130
        stderr = customer.stderr.read_text()
        *_, last = stderr.splitlines()
        assert last == f"veiltune: stopped at step {steps_logged(config)}; the same command goes on from here"
        assert stderr.count("veiltune:") == 1 and "Traceback" not in stderr
        tune(config)
    assert len(RunFolder(config.run).metrics()) == len(losses(config)) == STEPS  # no step was done twice
    assert_released_once(config)
