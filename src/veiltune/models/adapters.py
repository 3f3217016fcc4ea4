"""Parameter-efficient fine-tuning of a part: attach, count, save, load. `peft_methods` has the table of methods.

A sequence classifier's task head, where the part has it, trains in full with every method. A causal LM's head is
pretrained and stays frozen, but for "full".
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from veiltune.errors import InputError
from veiltune.models.compacter import PHM_DIM
from veiltune.models.families import family_of
from veiltune.models.peft_methods import METHODS, PeftPlan, attach, task_head
from veiltune.models.rgp import CarriedLinear
from veiltune.models.split import ModelPart, TopModel
from veiltune.models.surgery import blocks_of, task_of
from veiltune.runs import atomic_write_bytes, storage_errors

__all__ = [
    "METHODS",
    "ParameterCount",
    "PeftPlan",
    "attach_peft",
    "count_parameters",
    "load_adapter",
    "plan_of",
    "save_adapter",
    "trainable_parameters",
]

_TENSORS_FILE = "adapter_model.safetensors"  # where peft looks too
_PLAN_FILE = "veiltune_adapter.json"
_PEFT_TASKS = {"base": None, "classification": "SEQ_CLS", "causal": "CAUSAL_LM"}


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Numbers of scalars.

    Attributes:
        trainable: Those that train.
        total: All of them, frozen ones included.
    """

    trainable: int
    total: int

    @property
    def share(self) -> float:
        """Trainable / total, in [0, 1]; 0 for a module without parameters."""
        return self.trainable / self.total if self.total else 0.0


def attach_peft(
    part: ModelPart | PreTrainedModel,
    *,
    method: str,
    seed: int,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    adapter_size: int = 64,
    targets: Sequence[str] | None = None,
    phm_dim: int = PHM_DIM,
    pooler: bool = True,
) -> None:
    """Freezes a part and makes one method's parameters (and the task head) trainable, in place.

    What becomes trainable first gets storage of its own, so parts that share a frozen base
    (``split_model(..., share_weights=True)``) never train each other. Right after attaching, the part
    computes what it did before: with "adapter" and "compacter" nearly, else exactly.

    Args:
        part: A top, trunk, bottom or head, or a whole model.
        method: One of `METHODS`.
        seed: Of the new parameters; the same on every device. Global randomness is neither used nor changed.
        rank: Of a LoRA update or of RGP's gradient carriers, at least 1; a Compacter's factors have rank 1.
        alpha: LoRA scales its update by alpha / rank; above 0.
        dropout: On the input of a LoRA update or a bottleneck, in [0, 0.99]; the other methods have no place
            for it.
        adapter_size: Width of a bottleneck, at least 1; for "compacter" a multiple of `phm_dim`.
        targets: Last names of the projections that LoRA adapts; None for the family's own.
        phm_dim: Compacter's n, a divisor of the hidden size.
        pooler: False leaves BERT's pretrained pooler, a part of its classifier's head, as it is; nothing else has one.

    Raises:
        InputError: If a value is out of range, a target does not exist, the part has no block for the method,
            `pooler` is False where none could train, or something is attached already.
        UnsupportedModelError: For "bitfit" on blocks without any bias.
    """
    model, first_block = _open(part)
    if plan_of(model):
        raise InputError("PEFT is attached to this model already; load or split it anew")
    family = family_of(model.config)
    if not pooler and (method == "full" or task_head(model) == task_head(model, pooler=False)):
        raise InputError("pooler = false is for BERT's classifier, by any method but 'full'; remove it")
    plan = PeftPlan(
        method=method,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        adapter_size=adapter_size,
        targets=tuple(family.lora_targets if targets is None else targets),
        first_block=first_block,
        stop_block=first_block + len(blocks_of(model)),
        phm_dim=phm_dim,
        pooler=pooler,
    )
    _attach(model, plan, first_block=first_block, seed=seed)


def plan_of(model: PreTrainedModel) -> PeftPlan | None:
    """What is attached to a model, if anything."""
    plan = getattr(model, "veiltune_peft", None)
    return plan if isinstance(plan, PeftPlan) else None


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name, in the module's order."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def count_parameters(module: nn.Module) -> ParameterCount:
    """Counts scalars; a tied parameter counts once.

    >>> layer = nn.Linear(3, 2).requires_grad_(False)
    >>> _ = layer.bias.requires_grad_()
    >>> count_parameters(layer)
    ParameterCount(trainable=2, total=8)
    >>> count_parameters(layer).share
    0.25
    """
    trainable = sum(parameter.numel() for parameter in trainable_parameters(module).values())
    return ParameterCount(trainable=trainable, total=sum(parameter.numel() for parameter in module.parameters()))


def save_adapter(part: ModelPart | PreTrainedModel, folder: Path) -> None:
    """Writes what trains, under the names that it has in the whole, unsplit model.

    With "lora", ``PeftModel.from_pretrained(whole_model, folder)`` reads the folder: the task head is in
    ``modules_to_save``, and blocks are counted from the whole model's first. A trunk or a bottom is taken to
    come from a model with a head, so its names begin like that model's ("bert.", "model.", "transformer.").

    Args:
        part: What `attach_peft` was called on.
        folder: Made if need be; files of an earlier save are replaced, the plan last.

    Raises:
        InputError: If nothing was attached.
        StorageError: If the disk is full or cannot be written.
    """
    model, _ = _open(part)
    plan = plan_of(model)
    if plan is None:
        raise InputError("nothing is attached to this part; call attach_peft first")
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in _by_saved_name(part).items()}
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if plan.method == "lora":
            _write_peft_config(model, plan, folder)
    atomic_write_bytes(folder / _TENSORS_FILE, safetensors.torch.save(tensors, metadata={"format": "pt"}))
    atomic_write_bytes(folder / _PLAN_FILE, (json.dumps(asdict(plan), indent=2) + "\n").encode())


def load_adapter(part: ModelPart | PreTrainedModel, folder: Path) -> None:
    """Reads what `save_adapter` wrote, attaching it first where nothing is attached.

    Args:
        part: One cut at the same block, or the whole model. Storage that it shares is not written to.
        folder: As written.

    Raises:
        InputError: If the folder cannot be read, or does not fit the part or what is attached to it.
    """
    plan, tensors = _read(folder)
    model, first_block = _open(part)
    if plan_of(model) is None:
        _attach(model, plan, first_block=first_block, seed=0)
    if plan_of(model) != plan:
        raise InputError(f"{folder} holds {plan}, attached is {plan_of(model)}; load it into a fresh split")
    parameters = _by_saved_name(part)
    if plan.method == "full":  # a whole model also has what lies below the cut, which did not train
        parameters = {name: parameter for name, parameter in parameters.items() if name in tensors}
    here = {name: parameter.shape for name, parameter in parameters.items()}
    there = {name: tensor.shape for name, tensor in tensors.items()}
    if here != there:
        odd = [name for name in here.keys() | there.keys() if here.get(name) != there.get(name)]
        raise InputError(f"{folder} does not fit this part: {len(odd)} tensors differ, for one {min(odd)}")
    for name, parameter in parameters.items():
        parameter.data = tensors[name].to(device=parameter.device, dtype=parameter.dtype)
    for module in model.modules():
        if isinstance(module, CarriedLinear):
            module.refresh()


def _open(part: ModelPart | PreTrainedModel) -> tuple[PreTrainedModel, int]:
    """The Hugging Face model in a part and the number of its first block."""
    return (part.model, part.first_block) if isinstance(part, ModelPart) else (part, 0)


def _attach(model: PreTrainedModel, plan: PeftPlan, *, first_block: int, seed: int) -> None:
    attach(model, plan, first_block=first_block, seed=seed)
    model.veiltune_peft = plan  # type: ignore[assignment]  # a plain attribute; copies carry it along


def _by_saved_name(part: ModelPart | PreTrainedModel) -> dict[str, nn.Parameter]:
    """What trains, by its name in the whole model; peft's own spelling for LoRA."""
    model, first_block = _open(part)
    plan = plan_of(model)
    lora = plan is not None and plan.method == "lora"
    is_backbone_of_more = isinstance(part, ModelPart) and not isinstance(part, TopModel)
    prefix = ("base_model.model." if lora else "") + (f"{model.base_model_prefix}." if is_backbone_of_more else "")
    block_number = re.compile(rf"((?:^|\.){re.escape(family_of(model.config).blocks)}\.)(\d+)\.")

    def renamed(name: str) -> str:
        name = block_number.sub(lambda match: f"{match[1]}{int(match[2]) + first_block}.", name, count=1)
        return prefix + (name.replace(".default.", ".") if lora else name)

    return {renamed(name): parameter for name, parameter in trainable_parameters(model).items()}


def _write_peft_config(model: PreTrainedModel, plan: PeftPlan, folder: Path) -> None:
    config = plan.lora_config(model, first_block=0)
    config.modules_to_save = [path.rpartition(".")[2] for path in task_head(model, pooler=plan.pooler)] or None
    config.task_type = _PEFT_TASKS[task_of(model)]
    config.inference_mode = True
    config.save_pretrained(str(folder))


def _read(folder: Path) -> tuple[PeftPlan, dict[str, Tensor]]:
    try:
        fields = json.loads((folder / _PLAN_FILE).read_bytes())
        plan = PeftPlan(**fields | {"targets": tuple(fields["targets"])})
        return plan, safetensors.torch.load((folder / _TENSORS_FILE).read_bytes())
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise InputError(f"cannot read an adapter from {folder}: {error}; expected what save_adapter wrote") from error
