"""How each fine-tuning method gets into a model's blocks; `adapters` is the door.

=========  ==============================================  ==============================================
method     trains                                          source
=========  ==============================================  ==============================================
lora       low-rank updates of projections (by peft)       Hu et al. 2021, arXiv:2106.09685
bitfit     every bias of the blocks                        Ben Zaken et al. 2021, arXiv:2106.10199
adapter    two bottlenecks a block; norms stay frozen      Houlsby et al. 2019, arXiv:1902.00751
compacter  the same of Kronecker products, norms frozen    Karimi Mahabadi et al. 2021, arXiv:2106.04647
rgp        weights of projections, by low-rank gradients   Yu et al. 2021, arXiv:2106.09352
full       every parameter, also outside the blocks
none       nothing
=========  ==============================================  ==============================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from veiltune._validate import in_range, nearest, one_of, positive, positive_int, refusal
from veiltune.errors import InputError, UnsupportedModelError
from veiltune.models.compacter import PHM_DIM, PHMLinear, new_rules
from veiltune.models.families import family_of
from veiltune.models.rgp import CarriedLinear
from veiltune.models.surgery import blocks_of, task_of


@dataclass(frozen=True, kw_only=True)
class PeftPlan:
    """What is attached; with it, the same parameters can be attached to another copy.

    Attributes:
        method: One of `METHODS`.
        rank: Of a LoRA update or of RGP's gradient carriers, at least 1.
        alpha: LoRA scales its update by alpha / rank; above 0.
        dropout: On the input of a LoRA update or of a bottleneck, in [0, 0.99].
        adapter_size: Width of a bottleneck, at least 1; for "compacter" a multiple of `phm_dim`.
        targets: Last names of the projections that LoRA adapts.
        first_block: Number, in the whole model, of the first block concerned.
        stop_block: One more than that of the last.
        phm_dim: Compacter's n, at least 1; plans saved before there was one have 4.
        pooler: Whether the task head includes the backbone's pooler, where it has one; True in earlier plans.

    Raises:
        InputError: If a value is out of range.
    """

    method: str
    rank: int
    alpha: float
    dropout: float
    adapter_size: int
    targets: tuple[str, ...]
    first_block: int
    stop_block: int
    phm_dim: int = PHM_DIM
    pooler: bool = True

    def __post_init__(self) -> None:
        one_of(METHODS, method=self.method)
        positive_int(rank=self.rank)
        positive(alpha=self.alpha)
        in_range(0.0, 0.99, dropout=self.dropout)
        positive_int(adapter_size=self.adapter_size)
        positive_int(phm_dim=self.phm_dim)
        if self.method == "compacter" and self.adapter_size % self.phm_dim:
            raise refusal("adapter_size", f"a multiple of phm_dim = {self.phm_dim}", self.adapter_size)

    def lora_config(self, model: PreTrainedModel, *, first_block: int) -> LoraConfig:
        """The plan as peft words it, for a model whose first block has the given number in the whole model."""
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # peft computes in floats
            lora_dropout=self.dropout,
            target_modules=list(self.targets),
            layers_to_transform=list(range(self.first_block - first_block, self.stop_block - first_block)),
            layers_pattern=family_of(model.config).blocks.rpartition(".")[2],
            fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in blocks_of(model).modules()),
        )


def attach(model: PreTrainedModel, plan: PeftPlan, *, first_block: int, seed: int) -> None:
    """Freezes a model and makes the plan's parameters and the task head trainable, in place.

    Args:
        model: Whole or a part, with nothing attached.
        plan: Its blocks must be in the model.
        first_block: Number, in the whole model, of this model's first block.
        seed: Of new parameters, which are drawn on the CPU; global randomness is kept.
    """
    blocks = list(blocks_of(model))[plan.first_block - first_block : plan.stop_block - first_block]
    if not blocks and plan.method not in ("full", "none"):
        raise InputError(f"method {plan.method!r} needs a block and the part has none; lower cut_layer or use 'none'")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model.requires_grad_(False)
        _ATTACH[plan.method](model, blocks, plan, first_block)
    for path in task_head(model, pooler=plan.pooler):
        _train(model.get_submodule(path).parameters())
    model.train(model.training)  # new modules, too, are in the model's mode


def task_head(model: PreTrainedModel, *, pooler: bool = True) -> tuple[str, ...]:
    """Paths of what trains in full beside a plan's own: a sequence classifier's head, else nothing.

    Args:
        model: Whole or a part.
        pooler: Whether the backbone's pooler counts as part of the head where the family says so.
    """
    if task_of(model) != "classification":
        return ()
    family = family_of(model.config)
    return tuple(path for path in family.task_head if pooler or path.rpartition(".")[2] != family.pooler)


class BottleneckAdapter(nn.Module):
    """A projection followed by ``y + up(gelu(down(y)))``.

    Its layers are made so that it begins near the identity: Houlsby's weights are drawn near zero (normal, std 0.01,
    cut at two std), Compacter's rules are; biases begin at zero.
    """

    def __init__(self, projection: nn.Module, *, down: nn.Module, up: nn.Module, dropout: float) -> None:
        super().__init__()
        self.projection = projection
        self.dropout = nn.Dropout(dropout)
        self.down = down
        self.up = up
        like = next(projection.parameters())
        self.to(device=like.device, dtype=like.dtype).train(projection.training)

    def forward(self, values: Tensor) -> Tensor:
        """(..., input) -> (..., hidden_size)."""
        projected: Tensor = self.projection(values)
        update: Tensor = self.up(nn.functional.gelu(self.down(self.dropout(projected))))
        return projected + update


def _lora(model: PreTrainedModel, blocks: list[nn.Module], plan: PeftPlan, first_block: int) -> None:
    projections = {
        name.rpartition(".")[2] for name, layer in blocks[0].named_modules() if isinstance(layer, nn.Linear | Conv1D)
    }
    for target in plan.targets:
        if target not in projections:
            raise InputError(f"targets: no projection {target!r} in a block; {nearest(target, sorted(projections))}")
    inject_adapter_in_model(plan.lora_config(model, first_block=first_block), model)


def _bitfit(model: PreTrainedModel, blocks: list[nn.Module], plan: PeftPlan, first_block: int) -> None:
    biases = [bias for block in blocks for name, bias in block.named_parameters() if name.endswith("bias")]
    if not biases:
        family = model.config.model_type
        raise UnsupportedModelError(
            f"blocks of this {family} have no bias for 'bitfit' to train; use 'lora' or 'adapter'"
        )
    _train(biases)


def _houlsby(model: PreTrainedModel, blocks: list[nn.Module], plan: PeftPlan, first_block: int) -> None:
    def pair(hidden_size: int) -> tuple[nn.Module, nn.Module]:
        layers = nn.Linear(hidden_size, plan.adapter_size), nn.Linear(plan.adapter_size, hidden_size)
        for layer in layers:
            nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
            nn.init.zeros_(layer.bias)
        return layers

    _bottlenecks(model, blocks, plan, pair)


def _compacter(model: PreTrainedModel, blocks: list[nn.Module], plan: PeftPlan, first_block: int) -> None:
    if int(model.config.hidden_size) % plan.phm_dim:
        raise refusal("phm_dim", f"a divisor of the model's hidden size {model.config.hidden_size}", plan.phm_dim)
    rules = new_rules(plan.phm_dim)

    def pair(hidden_size: int) -> tuple[nn.Module, nn.Module]:
        down = PHMLinear(hidden_size, plan.adapter_size, rules=rules)
        return down, PHMLinear(plan.adapter_size, hidden_size, rules=rules)

    _bottlenecks(model, blocks, plan, pair)


def _bottlenecks(
    model: PreTrainedModel,
    blocks: list[nn.Module],
    plan: PeftPlan,
    pair: Callable[[int], tuple[nn.Module, nn.Module]],
) -> None:
    """Puts a bottleneck, of the pair (down, up), after the attention and after the feed-forward part of each block."""
    family, hidden_size = family_of(model.config), int(model.config.hidden_size)
    for block in blocks:
        for path in (family.attention_output, family.ffn_output):
            down, up = pair(hidden_size)
            bottleneck = BottleneckAdapter(block.get_submodule(path), down=down, up=up, dropout=plan.dropout)
            block.set_submodule(path, bottleneck)


def _rgp(model: PreTrainedModel, blocks: list[nn.Module], plan: PeftPlan, first_block: int) -> None:
    for block in blocks:
        for path, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear | Conv1D):
                block.set_submodule(path, CarriedLinear(layer, rank=plan.rank))


def _full(model: PreTrainedModel, blocks: list[nn.Module], plan: PeftPlan, first_block: int) -> None:
    _train(model.parameters())


def _none(model: PreTrainedModel, blocks: list[nn.Module], plan: PeftPlan, first_block: int) -> None:
    pass


def _train(parameters: Iterable[nn.Parameter]) -> None:
    """Makes parameters trainable, with storage of their own: it may have been shared with a frozen base."""
    for parameter in list(parameters):
        parameter.data = parameter.data.clone()
        parameter.requires_grad_(True)


_ATTACH: Mapping[str, Callable[[PreTrainedModel, list[nn.Module], PeftPlan, int], None]] = MappingProxyType(
    {
        "lora": _lora,
        "bitfit": _bitfit,
        "adapter": _houlsby,
        "compacter": _compacter,
        "rgp": _rgp,
        "full": _full,
        "none": _none,
    }
)
METHODS = tuple(_ATTACH)
