"""Where models come from: a package, a folder, or the Hugging Face hub."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from veiltune._validate import positive_int
from veiltune.errors import InputError
from veiltune.models.bundled import BUNDLED, bundled_folder, remedy_of
from veiltune.models.catalog import MODELS as MODELS
from veiltune.models.catalog import ModelInfo as ModelInfo
from veiltune.models.families import family_of
from veiltune.models.surgery import aliased_copy, backbone_of, limit_blocks


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A pretrained model as it was found.

    Attributes:
        model: In eval mode: the backbone of an encoder family, the causal LM of a decoder family.
        tokenizer: Its tokenizer.
        name: As it was asked for.
        digest: `weights_digest` of `model`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    digest: str


def quiet_libraries() -> None:
    """Keeps progress bars and remarks about the network off the terminal; what goes wrong is raised all the same."""
    disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)


def load_base(name: str) -> BaseModel:
    """Loads a pretrained model and its tokenizer, in the dtype that its files have.

    Only safetensors weights are read (nothing is unpickled) and no code of the model's folder is run.

    Args:
        name: "minilm" or "smollm2" (weights from a Python package, no network; see `bundled`), a local folder, or a
            name on the hub.

    Raises:
        UnsupportedModelError: For a family without a row in `families.FAMILIES`.
        InputError: If there is no such model, or it cannot be read.
        StorageError: If a bundled model must be converted and the cache cannot be written.
    """
    source = _source_of(name)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        auto_class = AutoModelForCausalLM if family_of(config).causal else AutoModel
        model = auto_class.from_pretrained(source, config=config, use_safetensors=True, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load the model {name!r}: {_first_line(error)}; {_remedy(name)}") from error
    return BaseModel(model=model.eval(), tokenizer=tokenizer, name=name, digest=weights_digest(model.state_dict()))


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Loads a tokenizer alone.

    Args:
        name: As in `load_base`.

    Raises:
        InputError: If there is none, or it cannot be read.
    """
    source = _source_of(name)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load the tokenizer of {name!r}: {_first_line(error)}; {_remedy(name)}") from error
    return tokenizer


def classifier_model(base: BaseModel, *, num_labels: int, seed: int) -> PreTrainedModel:
    """Puts a new sequence classification head on a base model, in eval mode.

    Cheap: the backbone's parameters are new objects on the base's storage, and only the head is initialised.
    Training it in place would change the base: split it, and let `adapters.attach_peft` make private what trains.

    Args:
        base: Left unchanged.
        num_labels: Columns of the logits.
        seed: Of the head's weights, drawn by Hugging Face's own initialisation; global randomness is kept.
    """
    positive_int(num_labels=num_labels)
    config = copy.deepcopy(base.model.config)
    config.num_labels = num_labels
    model = _without_backbone(config, seed)
    model.to(device=base.model.device, dtype=base.model.dtype)  # type: ignore[call-arg]  # transformers wraps `to`
    backbone = backbone_of(aliased_copy(base.model))
    pooler = family_of(config).pooler
    if pooler and getattr(model.base_model, pooler) is None:
        setattr(backbone, pooler, None)  # this head does without the backbone's pooler
    setattr(model, model.base_model_prefix, backbone)
    config.architectures = [type(model).__name__]
    model.config = config
    model.train(False)
    return model


def name_classes(model: PreTrainedModel, names: Sequence[str], *, pad_id: int) -> None:
    """Writes into a classifier's configuration what each logit stands for, and the padding (decoders need it)."""
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: number for number, name in enumerate(names)}
    model.config.pad_token_id = pad_id


def pad_id_of(base: BaseModel) -> int:
    """What stands on padding: it is masked, so any token will do."""
    known = (base.tokenizer.pad_token_id, base.model.config.pad_token_id, base.tokenizer.eos_token_id, 0)
    return next(int(token) for token in known if token is not None)


def settings_digest(model: object) -> str:
    """The SHA-256 of a model's configuration in hexadecimal, but for what saving and training write into it themselves.

    Of nothing if the model has none.
    """
    tell = getattr(getattr(model, "config", None), "to_dict", dict)
    said = dict(tell())
    for name in ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"):
        said.pop(name, None)
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """The SHA-256 of names, dtypes, shapes and bytes, in hexadecimal; the order does not matter.

    >>> one = weights_digest({"a": torch.zeros(2), "b": torch.ones(1)})
    >>> one == weights_digest({"b": torch.ones(1), "a": torch.zeros(2)})
    True
    >>> one == weights_digest({"a": torch.zeros(1, 2), "b": torch.ones(1)})
    False
    """
    total = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        total.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _source_of(name: str) -> str:
    if name in BUNDLED:
        return str(bundled_folder(name))
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():  # no name on the hub begins so
        raise InputError(f"cannot load the model {name!r}: there is no such folder; check its name")
    return name


def _remedy(name: str) -> str:
    if name in BUNDLED:
        return remedy_of(name)
    if Path(name).is_dir():
        return "the folder must hold config.json, safetensors weights and a tokenizer"
    if Path(name).parent.name and Path(name).parent.is_dir():
        return f"there is no folder {name} here, nor such a model on the hub within reach"
    return "give 'minilm', a folder, 'smollm2', or the name of a model on the hub that this machine can reach or has"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")


def _without_backbone(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A classifier whose head is initialised from the seed and whose backbone is next to nothing."""
    small = copy.deepcopy(config)
    limit_blocks(small, 0, 0)
    small.vocab_size = 1
    small.pad_token_id = None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(small)  # type: ignore[no-untyped-call]
        return cast(PreTrainedModel, model)
