"""Two processes (gloo) give the single-process step: the same gradients and weights, and noise once.

One launch of two processes runs every case and leaves what it got; the tests compare. Run as a program, this file is
one of the two.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from scipy import stats
from torch import Tensor, nn

from dp_tables import collate, model, optimizer, table
from veiltune.dp import parallel
from veiltune.dp.clipping import SumInProgress
from veiltune.dp.engine import DPEngine, make_private
from veiltune.dp.plan import DPPlan
from veiltune.dp.sampling import Units
from veiltune.errors import InputError

KEY = bytes(range(32))
NOISE, EXPECTED = 1.0, 12

#: Method, changes of the plan, options of the engine.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "lora": ("lora", {}, {}),
    "whole matrices, tied": ("full", {}, {}),
    "rgp": ("rgp", {}, {}),
    "per layer": ("lora", {"clipping": "per_layer"}, {}),
    "filled up": ("lora", {}, {"pad_rows": True}),
    "one batch: nothing for the second": ("lora", {}, {"max_rows": 60}),
    "nobody drawn": ("lora", {"expected_batch_size": 0.001}, {}),
    "persons": ("lora", {"num_units": 20, "unit": "person", "max_records": 2, "expected_batch_size": 6}, {}),
}


def plan(noise: float = NOISE, **changes: Any) -> DPPlan:
    fields: dict[str, Any] = {"num_units": 60, "expected_batch_size": EXPECTED, "steps": 4, "delta": 1e-4}
    return DPPlan.for_noise(noise, **fields | changes)


def gradients(case: str, *, noise: float = NOISE, step: int = 0, say: Any = None) -> dict[str, Tensor]:
    method, changes, options = CASES[case]
    made = model(method)
    people = Units.persons([f"p{row % 20}" for row in range(60)]) if case == "persons" else None
    chosen: dict[str, Any] = {"max_rows": 4, "key": KEY, "collate": collate, "units": people} | options
    DPEngine(made, table(60), plan=plan(noise, **changes), say=say, **chosen).backward(step)
    return {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


def trained(steps: int = 4, *, key: bytes = KEY, rate: float = 1e-2, decay: float = 0.01) -> dict[str, Tensor]:
    """The weights after a few steps of AdamW."""
    made = model()
    options: dict[str, Any] = {"plan": plan(steps=steps), "collate": collate, "key": key, "max_rows": 4}
    weights = optimizer(made, rate)
    weights.param_groups[0]["weight_decay"] = decay
    made, weights, batches = make_private(made, weights, table(60), **options)
    for batch in batches:
        batch.backward()
        weights.step()
    return parameters(made)


def parameters(made: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in made.named_parameters() if p.requires_grad}


def flat(named: dict[str, Tensor]) -> Tensor:
    return torch.cat([named[name].flatten().double() for name in sorted(named)])


def relative_distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return float((flat(one) - flat(other)).norm() / flat(other).norm())


def noise_of_one_draw(noisy: dict[str, Tensor], clean: dict[str, Tensor]) -> bool:
    """Whether what was added has the claimed scale: noise_multiplier * clip_norm / expected_batch_size."""
    return bool(stats.kstest((flat(noisy) - flat(clean)) * EXPECTED / NOISE, "norm").pvalue > 1e-3)


# --- one of the two processes


def doubled() -> dict[str, Tensor]:
    """Planted: each process adds noise to its own share, and then gradients are added up, as plain DDP would."""
    summed, parallel.summed = parallel.summed, lambda total: total
    try:
        got = gradients("lora")
    finally:
        parallel.summed = summed
    for gradient in got.values():
        dist.all_reduce(gradient)
    return got


def scarce(said: list[str]) -> list[dict[str, Tensor]]:
    """Two steps in which the second process alone has memory for two rows only."""
    add = SumInProgress.add

    def with_little(self: SumInProgress, model: nn.Module, batch: Any, **options: Any) -> None:
        if dist.get_rank() == 1 and len(batch["input_ids"]) > 2:
            raise torch.OutOfMemoryError("out of memory")
        add(self, model, batch, **options)

    made = model()
    taken = DPEngine(made, table(60), plan=plan(), collate=collate, key=KEY, max_rows=4, say=said.append)
    SumInProgress.add = with_little  # type: ignore[method-assign]
    steps = []
    try:
        for step in range(2):
            taken.backward(step)
            steps.append({name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None})
            made.zero_grad(set_to_none=True)
    finally:
        SumInProgress.add = add  # type: ignore[method-assign]
    return steps


def refusals(rank: int) -> list[str]:
    """What engines say to processes with different weights, tables in another order, and other persons.

    All examples have one length, as packed ones do.
    """
    said = []
    other, mirrored = model(), model()
    rows = [{"input_ids": (row["input_ids"] * 4)[:12]} for row in table(60)]
    if rank == 1:
        with torch.no_grad():
            next(p for p in other.parameters() if p.requires_grad).add_(1e-3)
            next(mirrored.parameters()).neg_()
    persons = [f"p{(row + (rank == 1) * (row < 2)) % 20}" for row in range(60)]
    people = plan(num_units=20, unit="person", expected_batch_size=6)
    for made, examples, options in (
        (other, rows, {"plan": plan()}),
        (mirrored, rows, {"plan": plan()}),
        (model(), rows if rank == 0 else rows[::-1], {"plan": plan()}),
        (model(), rows, {"plan": people, "units": Units.persons(persons)}),
    ):
        with pytest.raises(InputError) as caught:
            DPEngine(made, examples, collate=collate, **options)
        said.append(str(caught.value))
    return said


def with_trainer(folder: Path) -> dict[str, Any]:
    """`DPTrainer`, in one go and resumed after two of four steps."""
    from transformers import TrainingArguments

    from veiltune.dp.trainer import DPTrainer

    def make() -> DPTrainer:
        arguments = TrainingArguments(
            output_dir=str(folder / "run"),
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            save_steps=2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        return DPTrainer(model(), arguments, plan=plan(), train_dataset=table(60), data_collator=collate)

    whole = make()
    whole.train()
    resumed = make()
    resumed.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
    return {
        "key": whole.engine.key,
        "weights": parameters(whole.model),
        "resumed": parameters(resumed.model),
        "epsilon": [entry["epsilon"] for entry in whole.state.log_history if "loss" in entry],
    }


def one_process(rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # asked for, never opened
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    said: list[str] = []
    got = {
        "gradients": {case: gradients(case) for case in CASES},
        "clean": gradients("lora", noise=1e-6),
        "doubled": doubled(),
        "weights": trained(),
        "key": DPEngine(model(), table(60), plan=plan(), collate=collate).key,
        "scarce": scarce(said),
        "said": said,
        "refusals": refusals(rank),
        "trainer": with_trainer(folder),
    }
    torch.save(got, folder / f"{rank}.pt")
    dist.destroy_process_group()


# --- the comparison


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    started = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    try:
        errors = [process.communicate(timeout=100)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], errors[0][-2000:] + errors[1][-2000:]
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process(case: str, both: list[dict[str, Any]]) -> None:
    alone = gradients(case)
    for process in both:
        assert relative_distance(process["gradients"][case], alone) < 1e-6
    first, second = (flat(process["gradients"][case]) for process in both)
    assert torch.equal(first, second)


def test_noise_is_added_once(both: list[dict[str, Any]]) -> None:
    for process in both:
        assert noise_of_one_draw(process["gradients"]["lora"], process["clean"])
        assert not noise_of_one_draw(process["doubled"], process["clean"])  # planted
        assert relative_distance(process["doubled"], gradients("lora")) > 0.1


def test_final_weights_are_those_of_one_process(both: list[dict[str, Any]]) -> None:
    alone = trained()
    assert relative_distance(both[0]["weights"], alone) < 1e-6
    assert torch.equal(flat(both[0]["weights"]), flat(both[1]["weights"]))
    assert relative_distance(trained(key=bytes(32)), alone) > 1e-3


def test_processes_agree_on_a_key_that_nobody_gave(both: list[dict[str, Any]]) -> None:
    first, second = (process["key"] for process in both)
    assert first == second and first not in (KEY, bytes(32)) and len(first) == 32


def test_one_process_short_of_memory_changes_nothing(both: list[dict[str, Any]]) -> None:
    """Each still takes the share it would have taken: a split by other sizes would count examples twice or never."""
    assert both[0]["said"] == [] and len(both[1]["said"]) == 1
    for step in range(2):
        alone = gradients("lora", step=step)
        for process in both:
            assert relative_distance(process["scarce"][step], alone) < 1e-6


def test_different_weights_or_tables_are_refused_in_every_process(both: list[dict[str, Any]]) -> None:
    for process in both:
        weights, mirrored, examples, persons = process["refusals"]
        assert "hold different weights" in weights and "hold different weights" in mirrored
        assert "hold different examples" in examples and "hold different examples" in persons


def test_the_trainer_is_the_loop_also_in_two_processes_and_resumed(both: list[dict[str, Any]]) -> None:
    first, second = (process["trainer"] for process in both)
    assert first["key"] == second["key"]
    alone = trained(key=first["key"], decay=0.0)
    for got in (first, second):
        assert relative_distance(got["weights"], alone) < 1e-6
        assert torch.equal(flat(got["weights"]), flat(got["resumed"]))
    assert torch.equal(flat(first["weights"]), flat(second["weights"]))
    assert first["epsilon"] == sorted(first["epsilon"]) and len(first["epsilon"]) == 4
    assert math.isclose(first["epsilon"][-1], plan().claimed_epsilon)


if __name__ == "__main__":
    one_process(int(sys.argv[1]), Path(sys.argv[2]))
