"""Who takes part in `dp_step`: each makes one training step on a fixed batch, in a process of its own.

``python bench/dp_contenders.py SUITE NAME DEVICE [--quick]`` answers commands on its standard input, one line of JSON
each: ``build``, ``step``, ``memory``, ``error``; anything else ends it.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from veiltune.dp.engine import DPEngine, make_private
from veiltune.dp.plan import DPPlan

CLIP_NORM, NOISE, LEARNING_RATE = 1.0, 1.0, 1e-4
ERROR_ROWS = 4
OPACUS = "opacus==1.6.0"


@dataclass(frozen=True)
class Size:
    """Of the model and the batch."""

    layers: int = 6
    hidden: int = 384
    heads: int = 6
    vocab: int = 50257
    tokens: int = 128
    rows: int = 32


QUICK = {"layers": 2, "hidden": 64, "heads": 2, "vocab": 2000, "tokens": 32}


def size_of(suite: str, quick: bool) -> Size:
    """LoRA at 32 rows, full fine-tuning at 16."""
    return Size(rows=32 if suite == "lora" else 16, **(QUICK if quick else {}))


def build_model(suite: str, size: Size, device: str) -> nn.Module:
    """GPT-2's shape with random weights; all contenders of a suite train this one."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=size.layers,
        n_embd=size.hidden,
        n_head=size.heads,
        vocab_size=size.vocab,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        loss_type="ForCausalLM",
    )
    model: nn.Module = GPT2LMHeadModel(config)
    if suite == "lora":
        lora = LoraConfig(r=4, lora_alpha=32, lora_dropout=0.0, target_modules=["c_attn"], fan_in_fan_out=True)
        model = get_peft_model(model, lora)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, which would leave the other factor without a gradient
                torch.nn.init.normal_(parameter, std=0.02)
    return model.to(device).train()


def random_batch(size: Size, rows: int, device: str) -> dict[str, Tensor]:
    """Random ids without padding."""
    ids = torch.randint(0, size.vocab, (rows, size.tokens), generator=torch.Generator().manual_seed(rows)).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """In the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def checkpointed(model: Any) -> nn.Module:
    """Computes each block's activations twice instead of keeping them."""
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return model


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """The same for everybody: torch's defaults."""
    return torch.optim.AdamW(trainable(model), lr=LEARNING_RATE)


class Contender(ABC):
    """A way to train.

    Attributes:
        is_private: Whether its gradients are clipped.
    """

    is_private = True

    def __init__(self, model: nn.Module, batch: dict[str, Tensor]) -> None:
        self.model, self.batch = model, batch

    @abstractmethod
    def step(self) -> None:
        """One step of training, noise and optimizer included."""

    def clipped_mean(self, batch: dict[str, Tensor], clip_norm: float) -> list[Tensor]:
        """The gradient without noise; only asked of the private ones."""
        raise TypeError(f"{type(self).__name__} clips nothing")


class Plain(Contender):
    """What people run without privacy: the model's own loss, the ordinary backward pass."""

    is_private = False

    def __init__(self, model: nn.Module, batch: dict[str, Tensor]) -> None:
        super().__init__(model, batch)
        self.optimizer = adamw(model)

    def step(self) -> None:
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Loop(Contender):
    """One example at a time: clip, add. Ten lines, and obviously right."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(model, batch)
        self.optimizer, self.dtype = adamw(model), dtype

    def step(self) -> None:
        rows = len(self.batch["input_ids"])
        for parameter, mean in zip(trainable(self.model), self.clipped_mean(self.batch, CLIP_NORM), strict=True):
            parameter.grad = mean.add_(torch.randn_like(mean), alpha=NOISE * CLIP_NORM / rows)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def clipped_mean(self, batch: dict[str, Tensor], clip_norm: float) -> list[Tensor]:
        parameters = trainable(self.model)
        sums = [torch.zeros_like(parameter) for parameter in parameters]
        for gradients in example_gradients(self.model, batch):
            factor = min(1.0, clip_norm / norm_of(gradients, self.dtype))
            for total, gradient in zip(sums, gradients, strict=True):
                total.add_(gradient, alpha=factor)
        return [total.div_(len(batch["input_ids"])) for total in sums]


def example_gradients(model: nn.Module, batch: Mapping[str, Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of each row by itself."""
    for row in range(len(batch["input_ids"])):
        loss = model(**{name: values[row : row + 1] for name, values in batch.items()}).loss
        yield list(torch.autograd.grad(loss, trainable(model)))


def norm_of(gradients: list[Tensor], dtype: torch.dtype = torch.float32) -> float:
    """L2 norm of all together, accumulated in a dtype: over 20 million scalars float32 is off by 1e-5."""
    norms = [torch.linalg.vector_norm(gradient.flatten(), dtype=dtype) for gradient in gradients]
    return float(torch.stack(norms).norm())


class Ours(Contender):
    """`make_private`: the plan draws every row at each step, so that all contenders see the same batch."""

    def __init__(
        self, model: nn.Module, batch: dict[str, Tensor], *, max_rows: int, is_private: bool = True, bf16: bool = False
    ) -> None:
        super().__init__(model, batch)
        self.is_private, self.options = is_private, {"max_rows": max_rows, "bf16": bf16}
        rows = len(batch["input_ids"])
        counts: Any = {"num_units": rows, "expected_batch_size": rows, "steps": 10_000}
        plan = (
            DPPlan.for_noise(NOISE, clip_norm=CLIP_NORM, **counts) if is_private else DPPlan.without_privacy(**counts)
        )
        _, self.optimizer, batches = make_private(
            model, adamw(model), rows_of(batch), plan=plan, collate=collated, **self.options
        )
        self.steps = iter(batches)

    def step(self) -> None:
        next(self.steps).backward()
        self.optimizer.step()

    def clipped_mean(self, batch: dict[str, Tensor], clip_norm: float) -> list[Tensor]:
        rows = len(batch["input_ids"])
        plan = DPPlan(num_units=rows, sampling_prob=1.0, steps=1, clip_norm=clip_norm, noise_multiplier=0.0, delta=1e-5)
        DPEngine(self.model, rows_of(batch), plan=plan, collate=collated, **self.options).backward(0)
        return gradients_of(self.model)


def rows_of(batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """A batch as a table."""
    return [{name: values[row] for name, values in batch.items()} for row in range(len(batch["input_ids"]))]


def collated(rows: Any) -> dict[str, Tensor]:
    """A table as a batch."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def gradients_of(model: nn.Module) -> list[Tensor]:
    """Takes the gradients away."""
    found = []
    for parameter in trainable(model):
        assert parameter.grad is not None
        found.append(parameter.grad)
        parameter.grad = None
    return found


class Opacus(Contender):
    """Its `PrivacyEngine` on the same batch, with the loss that costs it least: shifted labels, no slice of logits."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], *, mode: str) -> None:
        super().__init__(model, batch)
        from opacus import PrivacyEngine

        loader = torch.utils.data.DataLoader(rows_of(batch), batch_size=len(batch["input_ids"]))
        optimizer, criterion = adamw(model), nn.CrossEntropyLoss()
        made = PrivacyEngine(accountant="rdp").make_private(
            module=model,
            optimizer=optimizer,
            criterion=criterion,
            data_loader=loader,
            noise_multiplier=NOISE,
            max_grad_norm=CLIP_NORM,
            poisson_sampling=False,
            grad_sample_mode=mode,
        )
        self.module, self.optimizer = made[0], made[1]
        self.is_ghost = mode == "ghost"
        self.criterion = made[2] if self.is_ghost else criterion

    def step(self) -> None:
        self._backward(self.batch)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def clipped_mean(self, batch: dict[str, Tensor], clip_norm: float) -> list[Tensor]:
        self.optimizer.noise_multiplier, self.optimizer.expected_batch_size = 0.0, len(batch["input_ids"])
        self.optimizer.max_grad_norm = self.module.max_grad_norm = clip_norm
        self._backward(batch)
        self.optimizer.pre_step()
        return gradients_of(self.model)

    def _backward(self, batch: dict[str, Tensor]) -> None:
        """Rows are equally long, so that the mean over all tokens is the mean of the rows' means."""
        ids, labels = batch["input_ids"], batch["labels"]
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)  # GPT-2's own have one row for all
        logits = self.module(input_ids=ids, attention_mask=batch["attention_mask"], position_ids=positions).logits
        targets = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1).flatten()
        shape = {"shape": logits.shape} if self.is_ghost else {}
        self.criterion(logits.flatten(0, 1), targets, **shape).backward()


Maker = Callable[[nn.Module, dict[str, Tensor]], Contender]


def contenders(suite: str) -> dict[str, Maker]:
    """By name, in the table's order; names that start with ours are Veiltune's."""
    shared: dict[str, Maker] = {"plain": Plain}
    if suite == "lora":
        return shared | {
            "ours": lambda m, b: Ours(m, b, max_rows=32),
            "ours_micro8": lambda m, b: Ours(m, b, max_rows=8),
            "ours_checkpointed": lambda m, b: Ours(checkpointed(m), b, max_rows=32),
            "ours_non_private": lambda m, b: Ours(m, b, max_rows=32, is_private=False),
            "ours_bf16": lambda m, b: Ours(m, b, max_rows=32, bf16=True),
            "opacus_hooks": lambda m, b: Opacus(m, b, mode="hooks"),
            "opacus_ghost": lambda m, b: Opacus(m, b, mode="ghost"),
            "opacus_functorch": lambda m, b: Opacus(m, b, mode="functorch"),
            "loop": Loop,
        }
    return shared | {
        "ours_micro4": lambda m, b: Ours(m, b, max_rows=4),
        "ours_micro1": lambda m, b: Ours(m, b, max_rows=1),
        "ours_non_private": lambda m, b: Ours(m, b, max_rows=4, is_private=False),
        "ours_bf16": lambda m, b: Ours(m, b, max_rows=4, bf16=True),
        "opacus_hooks": lambda m, b: Opacus(m, b, mode="hooks"),
        "opacus_ghost": lambda m, b: Opacus(m, b, mode="ghost"),
        "loop": Loop,
    }


class Worker:
    """One contender's process."""

    def __init__(self, suite: str, name: str, device: str, *, quick: bool) -> None:
        self.suite, self.name, self.device, self.size = suite, name, device, size_of(suite, quick)
        self.contender: Any = None
        self.base = 0.0

    def build(self) -> dict[str, Any]:
        """The model, then what the contender makes of it; memory counts from between the two."""
        model = build_model(self.suite, self.size, self.device)
        batch = random_batch(self.size, self.size.rows, self.device)
        self.base = _memory(self.device, peak=False)
        self.contender = contenders(self.suite)[self.name](model, batch)
        gc.collect()
        gc.freeze()  # or a full collection, 0.3 s over all that is imported, falls into somebody's step
        return {}

    def step(self) -> dict[str, float]:
        """Seconds of one step: of the processor in this process, all threads, or of the accelerator."""
        if self.device == "cuda":
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            self.contender.step()
            ended.record()
            torch.cuda.synchronize()
            return {"seconds": began.elapsed_time(ended) / 1e3}
        start = time.process_time()
        self.contender.step()
        return {"seconds": time.process_time() - start}

    def memory(self) -> dict[str, float]:
        """MB of growth at the peak over the model as built."""
        return {"megabytes": _memory(self.device, peak=True) - self.base}

    def error(self) -> dict[str, float | None]:
        """Relative error of the clipped mean gradient, against a batch-of-one loop on a copy of the weights."""
        if not self.contender.is_private:
            return {"grad_error": None}
        batch = random_batch(self.size, ERROR_ROWS, self.device)
        twin = build_model(self.suite, self.size, self.device)
        with torch.no_grad():
            for parameter, source in zip(twin.parameters(), self.contender.model.parameters(), strict=True):
                parameter.copy_(source)
        norms = sorted(norm_of(gradients, torch.float64) for gradients in example_gradients(twin, batch))
        clip_norm = (norms[1] + norms[2]) / 2  # two of the four are clipped
        expected = Loop(twin, batch, dtype=torch.float64).clipped_mean(batch, clip_norm)
        found = self.contender.clipped_mean(batch, clip_norm)
        difference = [one.float() - other for one, other in zip(found, expected, strict=True)]
        return {"grad_error": norm_of(difference, torch.float64) / norm_of(expected, torch.float64)}


def _memory(device: str, *, peak: bool) -> float:
    if device == "cuda":
        if not peak:
            torch.cuda.reset_peak_memory_stats()
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**20
    wanted = "VmHWM:" if peak else "VmRSS:"
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(wanted))


def main() -> None:
    suite, name, device = sys.argv[1:4]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    worker = Worker(suite, name, device, quick="--quick" in sys.argv)
    commands = {"build": worker.build, "step": worker.step, "memory": worker.memory, "error": worker.error}
    for line in sys.stdin:
        command = commands.get(line.strip())
        if command is None:
            return
        try:
            answer: Mapping[str, Any] = command()
        except ModuleNotFoundError as error:
            answer = {"refused": f"{error.name} is not installed (pip install {OPACUS})"}
        except Exception as error:
            answer = {"refused": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
