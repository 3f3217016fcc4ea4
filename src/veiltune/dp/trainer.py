"""`DPTrainer`: the plan inside Hugging Face's Trainer."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from veiltune.code_version import code_version
from veiltune.csprng import KEY_BYTES
from veiltune.dp import parallel
from veiltune.dp.checks import check_optimizer
from veiltune.dp.decoding import generate_texts
from veiltune.dp.engine import Collate, DPEngine
from veiltune.dp.instrument import carried_layers
from veiltune.dp.losses import LossFn, loss_for
from veiltune.dp.plan import DPPlan
from veiltune.dp.sampling import Units
from veiltune.errors import InputError, PrivacyError
from veiltune.models.dropout import has_dropout
from veiltune.models.loading import settings_digest, weights_digest
from veiltune.runs import atomic_write_bytes, private_folder

_STATE_FILE = "veiltune_dp.json"
_COMPARED = {"table": "table", "model": "frozen model or settings", "version": "version of Veiltune"}

#: What a checkpoint needs besides the weights, in the order in which it is written: the last one says that it is whole.
_NEEDED = (_STATE_FILE, OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME)

#: Changed between a checkpoint and its resumption, they would make another step with the same noise.
_UPDATE_ARGUMENTS = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "bf16",
)


class DPTrainer(Trainer):
    """Hugging Face's Trainer whose every update is private: same arguments, callbacks, reporting and evaluation.

    ::

        plan = DPPlan.for_epsilon(8.0, num_units=len(train), expected_batch_size=64, epochs=3)
        trainer = DPTrainer(model, args, plan=plan, train_dataset=train, data_collator=collate)
        trainer.train()

    Of the arguments, ``per_device_train_batch_size`` is how many examples are differentiated at once (memory; the
    result only if the model has dropout), ``max_steps``, ``num_train_epochs`` and ``max_grad_norm`` are the plan's
    (others are refused), and logs have ``epsilon``, what has been spent. Under torchrun processes share each batch.

    A checkpoint resumes exactly: draws and noise derive from one key and the step. Another plan, table, key, frozen
    weight, update argument or version of Veiltune is refused, and so is a checkpoint without the optimizer's state
    (``save_only_model=True``). The caller keeps the loss, the collator, LoRA's scale and dropout. The key is apart from
    the checkpoints, in ``<output_dir>.private`` (mode 0700): who has it can take the noise off.

    Guarantee:
        The plan's (`veiltune.dp.plan`), for the weights at any step. It does not cover what else the Trainer writes:
        the training loss, evaluation on private data, and a choice of the best checkpoint by either.

    Args:
        model: A Hugging Face model, a PeftModel, or one that `attach_peft` prepared.
        args: Without gradient accumulation, fp16, label smoothing, NEFTune, DataParallel or DeepSpeed, which are
            refused.
        plan: For as many units as the training set has.
        persons: The owner of each example, for a plan whose unit is the person.
        loss: (B,) losses; None takes the model's kind: next tokens, or one of several classes.
        max_tokens: Padded tokens differentiated at once; None is no limit.
        **options: As for Trainer.

    Raises:
        InputError: If an argument does not fit.
        PrivacyError: If the model cannot train privately, or a resumed run was another one.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        plan: DPPlan,
        persons: Sequence[str] | None = None,
        loss: LossFn | None = None,
        max_tokens: int | None = None,
        **options: Any,
    ) -> None:
        table = options.get("train_dataset")
        if isinstance(table, IterableDataset) or not (hasattr(table, "__len__") and hasattr(table, "__getitem__")):
            raise InputError("DPTrainer needs a train_dataset with a length: Poisson sampling draws from the whole")
        _check_arguments(args, options)
        _check_schedule(args, plan)
        if loss is None and type(self).compute_loss is not Trainer.compute_loss:
            raise InputError("DPTrainer does not call compute_loss in training; pass loss=, with one loss a row")
        if (persons is not None) != (plan.unit == "person"):
            raise InputError(f"the plan protects each {plan.unit}; give persons exactly for a plan with unit 'person'")
        args = copy.copy(args)
        args.max_steps, args.max_grad_norm, args.ignore_data_skip = plan.steps, 0.0, True
        super().__init__(model, args, **options)
        self.plan, self._loss, self._max_tokens = plan, loss or loss_for(model), max_tokens
        self._persons = None if persons is None else list(persons)
        self._engine: DPEngine | None = None
        self._epsilon = (0, 0.0)
        self.add_callback(_FinishStep(self))

    @property
    def engine(self) -> DPEngine:
        """What takes the steps; made when training begins."""
        if self._engine is None:
            raise InputError("the engine is made by train(); call that first")
        return self._engine

    def generate(self, prompts: Sequence[str], **options: Any) -> list[str]:
        """Continues prompts with the model as it is; see `veiltune.dp.decoding.generate_texts`."""
        return generate_texts(self.model, self.processing_class, prompts, **options)  # type: ignore[arg-type]

    def get_train_dataloader(self) -> Any:
        """Step numbers for about one pass over the table; what a step sees is the engine's draw."""
        steps: Any = [{"step": number} for number in range(max(1, round(1 / self.plan.sampling_prob)))]
        return DataLoader(steps, batch_size=1, generator=torch.Generator())  # leaves dropout's generator alone

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """The plan's expected size, from which Hugging Face computes samples per second."""
        return max(1, round(self.plan.expected_batch_size))

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: the Trainer does not see what a step computes on."""
        return 0

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One logical batch: writes the private gradient; returns its mean loss (NaN if nobody was drawn)."""
        self.model.train()  # type: ignore[union-attr]
        result = self.engine.backward(self.state.global_step)
        return torch.tensor(result.loss, device=self.args.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the epsilon spent so far to the training logs."""
        if self.plan.private and ("loss" in logs or "train_loss" in logs):
            if self._epsilon[0] != self.state.global_step:
                self._epsilon = (self.state.global_step, self.plan.epsilon_after(self.state.global_step))
            logs["epsilon"] = self._epsilon[1]
        super().log(logs, start_time)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As Trainer's; a checkpoint of another run is refused before anything is loaded; True is the newest whole.

        Raises:
            InputError: If there is no such checkpoint, or it lacks a part.
            PrivacyError: If the run would not be the plan's: resumed with a change, or a second one.
        """
        if resume_from_checkpoint:
            newest = resume_from_checkpoint is True
            found = _newest_checkpoint(Path(str(self.args.output_dir))) if newest else Path(str(resume_from_checkpoint))
            key, self._made_from = self._check_resumption(found)
            self._key, resume_from_checkpoint = parallel.same_everywhere(key), str(found)
        elif self._engine is not None:
            raise PrivacyError(
                "this trainer has trained its plan: training on would spend its epsilon again; resume from a "
                "checkpoint, or make a plan for all steps"
            )
        else:
            self._key = parallel.same_everywhere(os.urandom(KEY_BYTES))
            self._made_from = self._ingredients(self._key)
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def hyperparameter_search(self, *arguments: Any, **options: Any) -> Any:
        """Refused.

        Raises:
            PrivacyError: Always.
        """
        raise PrivacyError("each trial of a search spends the plan's epsilon anew; search on public data")

    def _init_training_state(self, max_steps: int, *arguments: Any, **options: Any) -> tuple[int, int]:
        prepare = super()._init_training_state
        epochs, skipped = prepare(max_steps, *arguments, **options)
        finished = self.state.global_step >= max_steps  # Trainer would take one more step
        return (max_steps if finished else epochs), skipped

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepare = super()._prepare_for_training
        prepared = prepare(max_steps, train_dataloader, resume_from_checkpoint)  # type: ignore[no-untyped-call]
        model: nn.Module = self.model  # type: ignore[assignment]
        optimizer: Any = self.optimizer
        check_optimizer(model, getattr(optimizer, "optimizer", optimizer))
        rows: Any = self.train_dataset
        collator = self.data_collator
        if isinstance(rows, datasets.Dataset):
            rows = self._remove_unused_columns(rows, description="training")
        else:
            collator = self._get_collator_with_removed_columns(collator, description="training")
        self._engine = DPEngine(
            model,
            [rows[index] for index in range(len(rows))],
            plan=self.plan,
            collate=cast(Collate, collator),
            loss=self._loss,
            key=self._key,
            units=None if self._persons is None else Units.persons(self._persons),
            max_rows=self.args.per_device_train_batch_size,
            max_tokens=self._max_tokens,
            bf16=self.args.bf16,
            say=lambda message: self.callback_handler.on_log(self.args, self.state, self.control, {"note": message}),
        )
        return prepared

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.args.should_save:  # before Trainer's part, which ends in dropping older checkpoints
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)  # of an earlier run: not whole now
            atomic_write_bytes(private_folder(self._private) / "dp.key", self._key, mode=0o600)
            atomic_write_bytes(folder / _STATE_FILE, (json.dumps(self._made_from, indent=2) + "\n").encode())
        super()._save_checkpoint(model, trial)

    @property
    def _private(self) -> Path:
        output = Path(os.path.abspath(str(self.args.output_dir)))
        return output.with_name(output.name + ".private")

    def _check_resumption(self, found: Path) -> tuple[bytes, dict[str, Any]]:
        """The key of the run that is taken up and its ingredients, if they are the same now."""
        try:
            state = json.loads((found / _STATE_FILE).read_bytes())
            key = (self._private / "dp.key").read_bytes()
            made = DPPlan.from_dict(state["plan"])
            arguments, key_print = state["arguments"], state["key"]
            prints = {name: state[name] for name in _COMPARED}
        except (OSError, ValueError, KeyError, TypeError, InputError) as error:
            raise InputError(
                f"{found} cannot be resumed privately: it needs {_STATE_FILE} and {self._private}/dp.key ({error})"
            ) from None
        if lacking := _lacking(found):
            raise InputError(
                f"{found} cannot be resumed: it has no whole {lacking}, by save_only_model or a kill; take another one"
            )
        now = self._ingredients(key)
        if key_print != now["key"]:
            raise PrivacyError(
                f"{self._private}/dp.key is of another run than {found}, which cannot go on without its own; "
                "start a new run"
            )
        differences = made.differences(self.plan) + [
            f"{name}: {arguments.get(name)} in the run, {value} now"
            for name, value in now["arguments"].items()
            if arguments.get(name) != value
        ]
        if differences:
            raise PrivacyError(
                f"{found} was made with other settings, and its noise would be used twice: {'; '.join(differences)}; "
                "start a new run"
            )
        for name, what in _COMPARED.items():
            if prints[name] != now[name]:
                raise PrivacyError(
                    f"{found} was made with another {what}; the same key would repeat its noise; start a new run"
                )
        return key, now

    def _ingredients(self, key: bytes) -> dict[str, Any]:
        """What a checkpoint is made from, as its state file says: keyed digests say nothing about key and table."""
        rows: Any = self.train_dataset
        digest = hashlib.blake2b(json.dumps(self._persons).encode(), key=key, digest_size=16)
        for index in range(len(rows)):
            digest.update(json.dumps(rows[index], default=parallel.plain, sort_keys=True).encode() + b"\n")
        return {
            "plan": self.plan.to_dict(),
            "arguments": self._arguments(),
            "version": code_version(),
            "model": f"{_frozen_digest(cast(nn.Module, self.model))} {settings_digest(self.model)}",
            "key": hashlib.blake2b(key=key, person=b"veiltune-dp-key", digest_size=16).hexdigest(),
            "table": digest.hexdigest(),
        }

    def _arguments(self) -> dict[str, Any]:
        """What an update depends on, besides the plan."""
        values = {name: getattr(self.args, name) for name in _UPDATE_ARGUMENTS}
        if has_dropout(cast(nn.Module, self.model)):  # other cuts of a batch have other masks
            cut = {"max_tokens": self._max_tokens, "processes": parallel.world()[1]}
            values |= cut | {"per_device_train_batch_size": self.args.per_device_train_batch_size}
        plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
        return plain


def _frozen_digest(model: nn.Module) -> str:
    """Of parameters and buffers that stay as they are, and of the names and shapes of what trains.

    RGP's carriers, which follow from the weights, do not count.
    """
    carriers = {id(carrier) for layer in carried_layers(model).values() for carrier in (layer.left, layer.right)}
    state = {name: values for name, values in model.named_buffers() if id(values) not in carriers}
    for name, values in model.named_parameters():
        state[name] = values.new_zeros(()).expand(values.shape) if values.requires_grad else values
    return weights_digest(state)


def _lacking(checkpoint: Path) -> str:
    """The first file that a checkpoint needs and has not, or not to its end; "" if it is whole."""
    for name in _NEEDED:
        try:
            if name.endswith(".json"):
                json.loads((checkpoint / name).read_bytes())
            elif not (checkpoint / name).is_file():
                return name
        except (OSError, ValueError):
            return name
    return ""


def _newest_checkpoint(folder: Path) -> Path:
    """The last whole one: a kill may have left a part of a later one."""
    numbers = [path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")]
    steps = sorted((int(number) for number in numbers if number.isdecimal()), reverse=True)
    whole = (path for step in steps if not _lacking(path := folder / f"checkpoint-{step}"))
    if (newest := next(whole, None)) is None:
        raise InputError(
            f"{folder} has no checkpoint that can be resumed: each needs {', '.join(_NEEDED)} (with save_only_model "
            "there are none); start a new run"
        )
    return newest


class _FinishStep(TrainerCallback):
    """Tells the engine that the optimizer has stepped, and the state how many passes the plan's steps come to."""

    def __init__(self, trainer: DPTrainer) -> None:
        self._trainer = trainer

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        self._trainer.engine.finish_step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        state.epoch = state.global_step * self._trainer.plan.sampling_prob


def _check_arguments(args: TrainingArguments, options: dict[str, Any]) -> None:
    refused = (
        (
            args.gradient_accumulation_steps != 1,
            "gradient_accumulation_steps",
            "the engine cuts logical batches itself",
        ),
        (args.fp16, "fp16", "use bf16"),
        (
            args.neftune_noise_alpha is not None,
            "neftune_noise_alpha",
            "leave it out: a batch's longest row would scale the others' noise, and so change their gradients",
        ),
        (args.label_smoothing_factor != 0, "label_smoothing_factor", "pass a loss of your own"),
        (args.n_gpu > 1, "several GPUs in one process", "start one process a GPU with torchrun"),
        (bool(args.deepspeed), "deepspeed", "use torchrun"),
        (bool(args.fsdp), "fsdp", "use torchrun without it"),
        (args.push_to_hub, "push_to_hub", "push the finished model yourself"),
        (args.auto_find_batch_size, "auto_find_batch_size", "the engine halves its micro-batches itself"),
        (args.torch_compile, "torch_compile", "leave it out: steps do not go through the compiled model"),
        (args.use_liger_kernel, "use_liger_kernel", "the losses here need no logits either"),
        (options.get("compute_loss_func") is not None, "compute_loss_func", "pass loss=, with one loss a row"),
    )
    for wrong, name, remedy in refused:
        if wrong:
            raise InputError(f"DPTrainer does not take {name}; {remedy}")


def _check_schedule(args: TrainingArguments, plan: DPPlan) -> None:
    """What the plan has fixed may be left at Hugging Face's default or repeated, but not contradicted."""
    for name, default, planned in (
        ("max_steps", -1, plan.steps),
        ("num_train_epochs", 3.0, plan.epochs),
        ("max_grad_norm", 1.0, plan.clip_norm),
    ):
        value = getattr(args, name)
        if value not in (default, planned, 0.0 if name == "max_grad_norm" else planned):
            raise InputError(f"DPTrainer does not take {name} = {value:g}: the plan says {planned:g}; leave it out")
