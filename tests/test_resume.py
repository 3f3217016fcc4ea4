"""Killed and resumed: real processes, SIGKILL, and a result that is bit for bit that of an uninterrupted run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parties import running_vendor
from runs_helper import (
    adapters,
    free_port,
    ledger_totals,
    start_customer,
    start_vendor,
    steps_logged,
    tune_config,
    wait_until,
    write_tables,
)
from veiltune.config import TuneConfig
from veiltune.customer.session import tune
from veiltune.runs import RunFolder

TRAIN, EVAL, EPOCHS = 160, 16, 3
STEPS = TRAIN // 4 * EPOCHS
SPLITS: dict[str, dict[str, Any]] = {
    "frozen": {"cut_layer": 1},
    "unfrozen": {"cut_layer": 1, "bottom": "lora", "head": "customer"},
}


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., TuneConfig]:
    """`configure(address, name, split)`: a noisy run of 120 steps, a checkpoint every 16, with dropout on both sides."""
    write_tables(tmp_path, train=TRAIN, eval=EVAL)

    def config(address: str, name: str, split: dict[str, Any]) -> TuneConfig:
        return tune_config(
            tmp_path,
            address,
            run=str(tmp_path / name),
            vendor={"timeout_seconds": 90.0},
            split=split,
            privacy={"mechanism": "d_chi", "noise_to_norm": 0.3, "labels": "randomized_response"},
            train={"batch_size": 4, "micro_batches": 2, "dropout": 0.1, "checkpoint_every": 16, "epochs": EPOCHS},
            wire={"dtype": "bf16"},
        )

    return config


def uninterrupted(model: Path, folder: Path, configure: Callable[..., TuneConfig], split: dict[str, Any]) -> Any:
    """The same run without a fault, in this process: the vendor's adapter and the losses."""
    with running_vendor(folder / "undisturbed", model, threads=1) as vendor:
        config = configure(vendor.address, "undisturbed-run", split)
        tune(config)
    return adapters(folder / "undisturbed"), losses(config)


def losses(config: TuneConfig) -> dict[int, float]:
    """The loss of each step; a step that was done again must have had the same one."""
    curve: dict[int, float] = {}
    for line in RunFolder(config.run).metrics():
        assert curve.setdefault(line["step"], line["loss"]) == line["loss"]
    return curve


def assert_same_result(config: TuneConfig, folder: Path, expected: Any) -> None:
    assert (adapters(folder / "vendor"), losses(config)) == expected
    totals, frozen = ledger_totals(Path(config.run)), config.split.bottom == "frozen"
    assert totals.max_releases_per_example == (1 if frozen else EPOCHS)
    assert totals.releases == (TRAIN if frozen else TRAIN * EPOCHS) + EVAL


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS.keys())
def test_both_parties_killed_in_mid_epoch(
    tmp_path: Path, tiny_folder: Path, configure: Callable[..., TuneConfig], split: dict[str, Any]
) -> None:
    expected = uninterrupted(tiny_folder, tmp_path, configure, split)
    port = free_port()
    config = configure(f"127.0.0.1:{port}", "run", split)
    vendor = start_vendor(tmp_path, tiny_folder, port)
    customer = start_customer(config, tmp_path)
    wait_until(lambda: steps_logged(config) >= 50, "50 steps")
    customer.kill()
    vendor.kill()
    assert 50 <= steps_logged(config) < STEPS
    vendor = start_vendor(tmp_path, tiny_folder, port)
    try:
        customer = start_customer(config, tmp_path)
        assert customer.ended() == 0, customer.stderr.read_text()
    finally:
        vendor.kill()
    assert_same_result(config, tmp_path, expected)


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS.keys())
def test_the_customer_follows_a_vendor_that_was_killed_and_came_back(
    tmp_path: Path, tiny_folder: Path, configure: Callable[..., TuneConfig], split: dict[str, Any]
) -> None:
    expected = uninterrupted(tiny_folder, tmp_path, configure, split)
    port = free_port()
    config = configure(f"127.0.0.1:{port}", "run", split)
    vendor = start_vendor(tmp_path, tiny_folder, port)
    customer = threading.Thread(target=tune, args=(config,))
    customer.start()
    wait_until(lambda: steps_logged(config) >= 50, "50 steps")
    vendor.kill()
    vendor = start_vendor(tmp_path, tiny_folder, port)
    try:
        customer.join(90)
        assert not customer.is_alive()
    finally:
        vendor.kill()
    assert_same_result(config, tmp_path, expected)


def test_ctrl_c_is_one_line_and_the_run_goes_on(
    tmp_path: Path, tiny_folder: Path, configure: Callable[..., TuneConfig]
) -> None:
    expected = uninterrupted(tiny_folder, tmp_path, configure, SPLITS["frozen"])
    with running_vendor(tmp_path / "vendor", tiny_folder, threads=1) as vendor:
        config = configure(vendor.address, "run", SPLITS["frozen"])
        customer = start_customer(config, tmp_path)
        wait_until(lambda: steps_logged(config) >= 20, "20 steps")
        customer.popen.send_signal(signal.SIGINT)
        assert customer.ended() == 130
        stderr = customer.stderr.read_text()
        *_, last = stderr.strip().splitlines()
        assert last == f"veiltune: stopped at step {steps_logged(config)}; the same command goes on from here"
        assert "Traceback" not in stderr and stderr.count("veiltune:") == 1
        assert start_customer(config, tmp_path).ended() == 0
        assert len(RunFolder(config.run).metrics()) == STEPS  # nothing was done twice
    assert_same_result(config, tmp_path, expected)
