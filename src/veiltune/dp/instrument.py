"""Which layers give per-example gradients, and the refusal of all others.

`recorded` changes the forward passes of a model's layers for the length of a ``with`` block and restores them; the
model's class, parameters and saved form are never touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from veiltune.dp import functions as fn
from veiltune.dp.losses import HeadUse, recorded_heads
from veiltune.dp.record import Record
from veiltune.errors import PrivacyError
from veiltune.models.compacter import PHMLinear
from veiltune.models.rgp import CarriedLinear

Forward = Callable[..., Tensor]

#: Makes a layer's recording forward pass, given the layer, its path, the record and the names of what trains.
Maker = Callable[[Any, str, Record, Mapping[int, str]], Forward | None]


def check_supported(model: nn.Module) -> None:
    """Refuses a model whose per-example gradients could not be told apart or would not be complete.

    Raises:
        PrivacyError: If a layer mixes the examples of a batch (BatchNorm), a trainable parameter belongs to a layer
            without a rule or to a compiled graph, or nothing trains.
    """
    for path, module in model.named_modules():
        if _is_compiled(module) and any(parameter.requires_grad for parameter in module.parameters()):
            raise PrivacyError(
                f"{path or 'the model'} is compiled (torch.compile) and holds what trains: its graph would pass by the "
                "per-example gradients; hand it in uncompiled (parts in which nothing trains may stay compiled)"
            )
        if isinstance(module, _BatchNorm):
            raise PrivacyError(
                f"{path} is a {type(module).__name__}: it mixes the examples of a batch, so one example's gradient "
                "depends on others and no clipping bounds it; replace it by LayerNorm or GroupNorm"
            )
    covered = _covered(model)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise PrivacyError("nothing in the model trains; attach a method first (attach_peft)")
    odd = [name for name in trainable if name not in covered]
    if odd:
        owner = type(model.get_submodule(odd[0].rpartition(".")[0])).__name__
        raise PrivacyError(
            f"{odd[0]} trains but its layer, {owner}, has no rule for per-example gradients ({len(odd)} parameters of "
            f"this kind); freeze it, or use one of: {', '.join(sorted({kind.__name__ for kind in _MAKERS}))}, norms"
        )


def _is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` has wrapped a module, or its own `compile` was called."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def trainable_names(model: nn.Module) -> dict[int, str]:
    """The name of each trainable parameter, by id; a tied one has its first name."""
    return {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}


def carried_layers(model: nn.Module) -> dict[str, CarriedLinear]:
    """The layers whose gradients travel on carriers (RGP), by the name of the weight."""
    names = trainable_names(model)
    layers = [module for module in model.modules() if isinstance(module, CarriedLinear)]
    return {names[id(layer.projection.weight)]: layer for layer in layers if id(layer.projection.weight) in names}


@contextlib.contextmanager
def recorded(model: nn.Module, record: Record) -> Iterator[None]:
    """Lets a forward pass inside the block, and the backward pass that follows, fill the record.

    Args:
        model: One that `check_supported` passes.
        record: For a batch whose first axis has ``record.num_rows`` rows in every layer that trains.
    """
    names = trainable_names(model)
    heads: dict[int, HeadUse] = {}
    output = _output_layer(model)
    if output is not None:
        weight, bias = names.get(id(output.weight)), names.get(id(output.bias))
        if weight or bias:
            heads[id(output.weight)] = HeadUse(record, weight, bias)
    patched: list[nn.Module] = []
    token = recorded_heads.set(heads)
    hook = _let_checkpoints_see_gradients(model)
    try:
        for path, module in model.named_modules():
            forward = _recording_forward(module, path, record, names)
            if forward is not None:
                if "forward" in vars(module):
                    raise PrivacyError(f"{path} has a forward method put on it, which recording would skip; remove it")
                module.forward = forward
                patched.append(module)
        yield
    finally:
        recorded_heads.reset(token)
        if hook:
            hook.remove()
        for module in patched:
            del module.forward


def _let_checkpoints_see_gradients(model: nn.Module) -> RemovableHandle | None:
    """Reentrant checkpointing drops the gradient of a block none of whose inputs needs one."""
    find = getattr(model, "get_input_embeddings", None)
    if find is None or not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return None

    def need_gradient(module: nn.Module, inputs: Any, output: Tensor) -> None:
        output.requires_grad_(True)

    return find().register_forward_hook(need_gradient)  # type: ignore[no-any-return]


def _recording_forward(module: nn.Module, path: str, record: Record, names: Mapping[int, str]) -> Forward | None:
    if isinstance(module, NewGELUActivation):  # the same function, as one operation that keeps its input only
        return lambda values: nn.functional.gelu(values, approximate="tanh")
    maker = _maker(module)
    return maker(module, path, record, names) if maker else None


def _maker(module: nn.Module) -> Maker | None:
    for kind, maker in _MAKERS.items():
        if type(module) is kind:
            return maker
    return _rms_norm if _is_rms_norm(module) else None


def _covered(model: nn.Module) -> set[str]:
    """Names of trainable parameters that a rule's layer owns."""
    names = trainable_names(model)
    owned = (parameter for module in model.modules() if _maker(module) for parameter in _own_parameters(module))
    return {names[id(parameter)] for parameter in owned if id(parameter) in names}


def _own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    for name, parameter in module.named_parameters(recurse=isinstance(module, CarriedLinear)):
        if name.rpartition(".")[2] in ("weight", "bias", "rules", "left", "right"):  # not what weight_norm adds
            yield parameter


def _check_rows(path: str, values: Tensor, record: Record) -> None:
    if len(values) != record.num_rows:
        raise PrivacyError(
            f"{path} sees {len(values)} rows where the batch has {record.num_rows}; a layer that trains needs the "
            "batch as its first axis, so that examples can be told apart"
        )


def _matrix(module: Any, path: str, record: Record, names: Mapping[int, str]) -> Forward | None:
    weight, bias = names.get(id(module.weight)), names.get(id(module.bias))
    if not weight and not bias:
        return None
    use = fn.MatrixUse(record, weight, bias, isinstance(module, Conv1D))

    def forward(values: Tensor) -> Tensor:
        _check_rows(path, values, record)
        return fn.apply(fn.Matrix, values, module.weight, module.bias, use)

    return forward


def _lora(module: Any, path: str, record: Record, names: Mapping[int, str]) -> Forward | None:
    """One fused operation for the ordinary case; otherwise the two factors are plain layers with rules of their own."""
    adapters = [name for name in module.active_adapters if name in module.lora_A]
    base = module.base_layer
    plain = len(adapters) == 1 and not module.merged and not module.disable_adapters and not module.lora_variant
    if not plain or type(base) not in (nn.Linear, Conv1D) or any(id(p) in names for p in base.parameters()):
        return None
    down, up, dropout = module.lora_A[adapters[0]], module.lora_B[adapters[0]], module.lora_dropout[adapters[0]]
    drops = not isinstance(dropout, nn.Identity) and getattr(dropout, "p", 1.0) > 0 and dropout.training
    if drops or down.bias is not None or up.bias is not None:
        return None
    names_of = names.get(id(down.weight)), names.get(id(up.weight))
    use = fn.LoraUse(record, *names_of, module.scaling[adapters[0]], isinstance(base, Conv1D))

    def forward(values: Tensor) -> Tensor:
        _check_rows(path, values, record)
        return fn.apply(fn.Lora, values, base.weight, base.bias, down.weight, up.weight, use)

    return forward


def _carried(module: CarriedLinear, path: str, record: Record, names: Mapping[int, str]) -> Forward | None:
    projection = module.projection
    name = names.get(id(projection.weight))
    if not name:
        return None
    if id(projection.bias) in names:
        raise PrivacyError(f"{path} has a bias that trains beside its carried weight; freeze it")
    use = fn.CarrierUse(record, *carrier_names(name), isinstance(projection, Conv1D))

    def forward(values: Tensor) -> Tensor:
        _check_rows(path, values, record)
        return fn.apply(fn.Carried, values, projection.weight, projection.bias, module.left, module.right, use)

    return forward


def carrier_names(weight: str) -> tuple[str, str]:
    """The names under which a carried weight's two carriers are recorded."""
    return f"{weight}/left", f"{weight}/right"


def _hypercomplex(module: PHMLinear, path: str, record: Record, names: Mapping[int, str]) -> Forward | None:
    tensors = module.rules, module.left, module.right, module.bias
    if any(id(tensor) not in names for tensor in tensors):
        return None
    use = fn.HypercomplexUse(record, *(names[id(tensor)] for tensor in tensors))

    def forward(values: Tensor) -> Tensor:
        _check_rows(path, values, record)
        return fn.apply(fn.Hypercomplex, values, *tensors, use)

    return forward


def _table(module: Any, path: str, record: Record, names: Mapping[int, str]) -> Forward | None:
    name = names.get(id(module.weight))
    if not name:
        return None
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        raise PrivacyError(f"{path} has max_norm, scale_grad_by_freq or sparse, which mix examples; switch them off")
    use = fn.TableUse(record, name, module.padding_idx)

    def forward(ids: Tensor) -> Tensor:
        if len(ids) == 1 and record.num_rows != 1:  # positions that are made once for the whole batch
            ids = ids.expand(record.num_rows, *ids.shape[1:])
        _check_rows(path, ids, record)
        return fn.apply(fn.Table, module.weight, ids, use)

    return forward


def _layer_norm(module: Any, path: str, record: Record, names: Mapping[int, str]) -> Forward | None:
    weight, bias = names.get(id(module.weight)), names.get(id(module.bias))
    if not weight and not bias:
        return None
    if len(module.normalized_shape) != 1:
        raise PrivacyError(f"{path} is a LayerNorm over {len(module.normalized_shape)} axes, of which one has a rule")
    use = fn.ScaleUse(record, weight, bias)

    def forward(values: Tensor) -> Tensor:
        _check_rows(path, values, record)
        normed = nn.functional.layer_norm(values, module.normalized_shape, None, None, module.eps)
        return fn.apply(fn.Scale, normed, module.weight, module.bias, use)

    return forward


def _rms_norm(module: Any, path: str, record: Record, names: Mapping[int, str]) -> Forward | None:
    weight = names.get(id(module.weight))
    if not weight:
        return None
    use = fn.ScaleUse(record, weight, None)

    def forward(values: Tensor) -> Tensor:
        _check_rows(path, values, record)
        return fn.apply(fn.Scale, _rms_normed(values, module.variance_epsilon), module.weight, None, use)

    return forward


def _rms_normed(values: Tensor, epsilon: float) -> Tensor:
    wide = values.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(values.dtype)


def _is_rms_norm(module: nn.Module) -> bool:
    """Whether a layer computes w * x / rms(x); asked of the layer itself, as each family has a class of its own."""
    if not type(module).__name__.endswith("RMSNorm") or not hasattr(module, "variance_epsilon"):
        return False
    weight = module.weight
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1:
        return False
    with torch.no_grad():
        epsilon = float(module.variance_epsilon)  # type: ignore[arg-type]
        probe = torch.linspace(-1.0, 2.0, len(weight), device=weight.device, dtype=weight.dtype)[None]
        expected = weight * _rms_normed(probe, epsilon)
        return bool(torch.allclose(type(module).forward(module, probe), expected, rtol=1e-3, atol=1e-5))


def _output_layer(model: nn.Module) -> Any | None:
    """A causal LM's head, whose gradient the loss records: it computes the logits itself, in chunks."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find else None
    return head if isinstance(head, nn.Linear) else None


_MAKERS: Mapping[type[nn.Module], Maker] = MappingProxyType(
    {
        nn.Linear: _matrix,
        Conv1D: _matrix,
        LoraLinear: _lora,
        CarriedLinear: _carried,
        PHMLinear: _hypercomplex,
        nn.Embedding: _table,
        nn.LayerNorm: _layer_norm,
    }
)
