"""`DPTrainer` behaves as Trainer does, takes the steps of the plan, and refuses what would break the claim."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from dp_tables import collate, model, table
from dp_trainers import Watch, arguments, logged, moved, peft_model, plan, trainer, weights
from tiny import tiny_model
from veiltune.dp.engine import DPEngine
from veiltune.dp.losses import classification_losses
from veiltune.dp.plan import DPPlan
from veiltune.dp.sampling import Units
from veiltune.dp.trainer import DPTrainer
from veiltune.errors import InputError, PrivacyError
from veiltune.models.adapters import attach_peft

# peft 0.21 asks transformers for a name that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


# --- as Trainer does


@pytest.mark.parametrize("kind", ["attached", "peft", "rgp", "full"])
def test_a_causal_model_trains_the_plan_and_logs_its_epsilon(kind: str, tmp_path: Path) -> None:
    made = peft_model() if kind == "peft" else model({"attached": "lora"}.get(kind, kind))
    before, watch = weights(made), Watch()
    run = trainer(tmp_path, made, callbacks=[watch], eval_dataset=table(9, seed=1))
    result = run.train()
    assert moved(before, made)
    assert result.global_step == plan().steps and watch.events == ["begin"] + ["step"] * 6
    spent = logged(run, "epsilon")
    assert spent == sorted(set(spent)) and len(spent) == 6
    assert spent[-1] == plan().claimed_epsilon == result.metrics["epsilon"]
    assert spent[2] == plan().epsilon_after(3)
    assert 0 < run.evaluate()["eval_loss"] < 10 and watch.events[-1] == "evaluate"


def classify(examples: Any) -> dict[str, Tensor]:
    batch = collate(examples)
    return batch | {"labels": torch.tensor([example["label"] for example in examples])}


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_classifier_learns(family: str, tmp_path: Path) -> None:
    """Two classes that differ in their tokens; plenty of budget."""
    rows = [{"input_ids": [5 + label, 7 + label, 9 + label], "label": label} for label in (0, 1)] * 30
    made = tiny_model(family)
    attach_peft(made, method="lora", seed=0, rank=4)
    run = trainer(
        tmp_path,
        made,
        plan=plan(expected_batch_size=40, steps=20),
        train_dataset=rows,
        eval_dataset=rows,  # says that it learnt them, no more
        data_collator=classify,
        compute_metrics=lambda out: {"accuracy": float((out.predictions.argmax(-1) == out.label_ids).mean())},
        args={
            "lr_scheduler_type": "constant",
            "remove_unused_columns": False,
            "logging_steps": 50,
            "per_device_train_batch_size": 64,
        },
    )
    assert run.evaluate()["eval_accuracy"] < 0.8
    run.train()
    assert run.evaluate()["eval_accuracy"] == 1.0


def test_tensorboard_gets_epsilon(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer(tmp_path, args={"report_to": ["tensorboard"]}).train()
    (events,) = (tmp_path / "run").rglob("events.out.tfevents*")
    read = EventAccumulator(str(events))
    read.Reload()
    assert [round(entry.value, 4) for entry in read.Scalars("train/epsilon")][:6] == [
        round(plan().epsilon_after(step), 4) for step in range(1, 7)
    ]


def test_stopped_early_it_says_what_the_steps_taken_spent(tmp_path: Path) -> None:
    run = trainer(tmp_path, callbacks=[Watch(stop_after=2)], args={"logging_steps": 5})
    result = run.train()
    assert result.global_step == 2
    assert result.metrics["epsilon"] == plan().epsilon_after(2) < plan().claimed_epsilon


def test_samples_per_second_count_logical_batches(tmp_path: Path) -> None:
    """Not the four rows that are differentiated at once."""
    metrics = trainer(tmp_path).train().metrics
    rows = metrics["train_samples_per_second"] / metrics["train_steps_per_second"]
    assert rows == pytest.approx(12, rel=0.1)


def test_a_plan_without_privacy_logs_no_epsilon(tmp_path: Path) -> None:
    free = DPPlan.without_privacy(num_units=60, expected_batch_size=12, steps=2)
    run = trainer(tmp_path, plan=free)
    assert "epsilon" not in run.train().metrics and not logged(run, "epsilon") and len(logged(run, "loss")) == 2


def test_columns_that_the_model_does_not_take_are_left_out(tmp_path: Path) -> None:
    """As a Dataset and as a list: both get the gradient of the bare table."""

    def bare_only(examples: Any) -> dict[str, Tensor]:
        assert all(set(example) == {"input_ids"} for example in examples)
        return collate(examples)

    rows = [row | {"text": "secret", "number": place} for place, row in enumerate(table(60))]
    for dataset in (Dataset.from_list(rows), rows):
        watch = Watch()
        run = trainer(tmp_path, train_dataset=dataset, data_collator=bare_only, callbacks=[watch])
        run.train()
        assert matches(watch.gradient, twin(run.engine.key))


def twin(key: bytes, made: nn.Module | None = None, **options: Any) -> dict[str, Tensor]:
    """Step 0 of the bare engine."""
    made = model() if made is None else made
    DPEngine(made, table(60), **{"plan": plan(), "collate": collate, "key": key, "max_rows": 4} | options).backward(0)
    return {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


def matches(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> bool:
    assert got.keys() == expected.keys() and got
    gap = sum(float((got[name] - expected[name]).square().sum()) for name in got) ** 0.5
    return gap <= tolerance * sum(float(values.square().sum()) for values in expected.values()) ** 0.5


@pytest.mark.parametrize("clip_norm", [0.05, 10.0])
def test_bf16_clips_as_float32_does(clip_norm: float, tmp_path: Path) -> None:
    """Accelerate puts an autocasting forward on the model; everybody is clipped, and nobody."""
    almost_bare = plan(1e-6, clip_norm=clip_norm)
    watch = Watch()
    run = trainer(tmp_path, plan=almost_bare, callbacks=[watch, Watch(stop_after=1)], args={"bf16": True})
    run.train()
    expected = twin(run.engine.key, plan=almost_bare)
    assert matches(watch.gradient, expected, 2e-2)
    assert not matches(watch.gradient, expected, 1e-5)  # it was bf16
    assert run.model.dtype == torch.float32


def test_bf16_clips_a_classifier_as_float32_does(tmp_path: Path) -> None:
    """Its loss goes through the forward pass that accelerate has put on the model."""

    def made() -> Any:
        classifier = tiny_model("bert")
        attach_peft(classifier, method="lora", seed=0, rank=4)
        for module in classifier.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return classifier

    rows = [row | {"label": number % 3} for number, row in enumerate(table(60))]
    almost_bare, watch = plan(1e-6, clip_norm=0.05), Watch()
    options: dict[str, Any] = {"args": {"bf16": True, "remove_unused_columns": False}, "data_collator": classify}
    run = trainer(tmp_path, made(), plan=almost_bare, train_dataset=rows, callbacks=[watch], **options)
    run.train()
    key, expected = run.engine.key, made().train()
    DPEngine(expected, rows, plan=almost_bare, collate=classify, loss=classification_losses, key=key).backward(0)
    gradients = {name: p.grad for name, p in expected.named_parameters() if p.grad is not None}
    assert matches(watch.gradient, gradients, 2e-2) and not matches(watch.gradient, gradients, 1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant: bool, tmp_path: Path) -> None:
    watch = Watch()
    args = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    run = trainer(tmp_path, args=args, callbacks=[watch])
    run.train()
    assert matches(watch.gradient, twin(run.engine.key))


def test_a_person_is_one_unit(tmp_path: Path) -> None:
    persons = [f"p{row % 20}" for row in range(60)]
    claim = plan(1e-6, num_units=20, expected_batch_size=6, unit="person", max_records=2)
    watch = Watch()
    run = trainer(tmp_path, plan=claim, persons=persons, callbacks=[watch])
    run.train()
    assert matches(watch.gradient, twin(run.engine.key, plan=claim, units=Units.persons(persons)))
    with pytest.raises(InputError, match="persons"):
        trainer(tmp_path, persons=persons)
    with pytest.raises(InputError, match="persons"):
        trainer(tmp_path, plan=claim)


def test_it_continues_prompts(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    ended = copy.deepcopy(tokenizer)
    ended.eos_token = "~"
    run = trainer(tmp_path, processing_class=ended)
    run.train()
    texts = run.generate(["one", "two"], max_new_tokens=3)
    assert len(texts) == 2 and all(isinstance(text, str) for text in texts)


def test_what_it_saves_loads_back(tmp_path: Path) -> None:
    made = peft_model()
    run = trainer(tmp_path, made)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(tiny_model("gpt2", "causal"), tmp_path / "saved")
    batch = collate(table(4))
    with torch.no_grad():
        assert torch.allclose(loaded(**batch).logits, made.eval()(**batch).logits, atol=1e-5)
        fresh = tiny_model("gpt2", "causal")
        assert not torch.allclose(fresh(**batch).logits, made(**batch).logits, atol=1e-3)
    assert not list((tmp_path / "saved").rglob("*key*"))


# --- refusals


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 2},
        {"label_smoothing_factor": 0.1},
        {"push_to_hub": True},
        {"auto_find_batch_size": True},
        {"torch_compile": True},
        {"use_liger_kernel": True},
        {"fsdp": True},
        {"neftune_noise_alpha": 5.0},
    ],
)
def test_arguments_that_would_break_a_step_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    (name,) = changes
    args = arguments(tmp_path)
    for field, value in changes.items():  # some ask for hardware or packages when they are set as one should
        setattr(args, field, value)
    with pytest.raises(InputError, match=f"does not take {name}; "):
        DPTrainer(model(), args, plan=plan(), train_dataset=table(60), data_collator=collate)


def test_the_plan_is_not_contradicted(tmp_path: Path) -> None:
    chosen = plan()
    for changes in ({"max_steps": chosen.steps}, {"num_train_epochs": chosen.epochs}, {"max_grad_norm": 0.0}, {}):
        DPTrainer(model(), arguments(tmp_path, **changes), plan=chosen, train_dataset=table(60), data_collator=collate)
    for name, value in (("max_steps", chosen.steps + 1), ("num_train_epochs", 77.0), ("max_grad_norm", 0.25)):
        with pytest.raises(InputError, match=f"does not take {name} = {value:g}: the plan says"):
            DPTrainer(
                model(),
                arguments(tmp_path, **{name: value}),
                plan=chosen,
                train_dataset=table(60),
                data_collator=collate,
            )


@pytest.mark.parametrize("name", ["fp16", "deepspeed"])
def test_arguments_of_other_machines_are_refused(name: str, tmp_path: Path) -> None:
    args = arguments(tmp_path)
    setattr(args, name, True)
    with pytest.raises(InputError, match=f"does not take {name}; "):
        DPTrainer(model(), args, plan=plan(), train_dataset=table(60), data_collator=collate)


class Stream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(table(60))

    def __len__(self) -> int:
        return 60


@pytest.mark.parametrize(
    "dataset", [None, Stream(), Dataset.from_list(table(60)).to_iterable_dataset(), (row for row in table(60))]
)
def test_a_table_without_rows_to_draw_from_is_refused(dataset: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="train_dataset with a length"):
        trainer(tmp_path, train_dataset=dataset)


def test_a_loss_of_ones_own_comes_by_the_row(tmp_path: Path) -> None:
    class Own(DPTrainer):
        def compute_loss(self, *arguments: Any, **options: Any) -> Any:
            return super().compute_loss(*arguments, **options)

    args = arguments(tmp_path)
    with pytest.raises(InputError, match="pass loss="):
        Own(model(), args, plan=plan(), train_dataset=table(60), data_collator=collate)
    with pytest.raises(InputError, match="does not take compute_loss_func"):
        trainer(tmp_path, compute_loss_func=lambda *values: None)
    with pytest.raises(InputError, match="no loss is known"):
        trainer(tmp_path, tiny_model("bert", "base"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"problem_type": "multi_label_classification"}, "problem_type 'multi_label_classification' with num_labels 3"),
        ({"problem_type": "regression"}, "problem_type 'regression' with num_labels 3"),
        ({"num_labels": 1}, "problem_type None with num_labels 1"),
    ],
)
def test_what_is_no_choice_of_one_class_needs_a_loss(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    made = tiny_model("bert")
    attach_peft(made, method="lora", seed=0, rank=4)
    trainer(tmp_path, made)
    made.config.problem_type = "single_label_classification"  # as Hugging Face's forward pass writes
    trainer(tmp_path, made)
    made.config.problem_type = None
    for name, value in change.items():
        setattr(made.config, name, value)
    with pytest.raises(InputError, match=f"{said}; pass loss="):
        trainer(tmp_path, made)
    trainer(tmp_path, made, loss=classification_losses)


def test_a_plan_for_another_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the table has 59"):
        trainer(tmp_path, train_dataset=table(59)).train()


def test_epsilon_is_spent_once(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    with pytest.raises(InputError, match="made by train"):
        _ = run.engine
    run.train()
    with pytest.raises(PrivacyError, match="spend its epsilon again"):
        run.train()
    with pytest.raises(PrivacyError, match="each trial"):
        run.hyperparameter_search()


# --- the peers' bug: zero weight change after a device move


def replace_parameters(made: nn.Module) -> None:
    """What moving a model to another device may do."""
    for module in made.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad))


def test_a_model_whose_parameters_are_replaced_before_training_trains(tmp_path: Path) -> None:
    made = model("bitfit")
    run = trainer(tmp_path, made)
    replace_parameters(made)
    before = weights(made)
    run.train()
    assert moved(before, made)


def test_an_optimizer_of_replaced_parameters_is_refused(tmp_path: Path) -> None:
    made = model("bitfit")
    stale = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=1e-2)
    replace_parameters(made)
    before = weights(made)
    run = trainer(tmp_path, made, optimizers=(stale, None))
    with pytest.raises(PrivacyError, match="the optimizer does not hold"):
        run.train()
    assert not moved(before, made)


def test_an_optimizer_of_ones_own_works(tmp_path: Path) -> None:
    made = model()
    before = weights(made)
    own = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], 1.0)
    trainer(tmp_path, made, optimizers=(own, None)).train()
    assert moved(before, made)
