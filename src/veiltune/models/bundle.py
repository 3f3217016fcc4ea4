"""The bundle: the folder in which a bottom (and, U-shaped, a head) travels from the vendor to the customer.

bundle/manifest.json       format, base model, cut, SHA-256 of every other file; written last
       bottom_config.json  the bottom's configuration: it counts the bottom's blocks, not the model's
       bottom.safetensors
       tokenizer*.json ...
       head_config.json    only with a head
       head.safetensors

No file is called config.json, lest AutoTokenizer take the tokenizer's class from it instead of from the tokenizer's
own files. The digest of a bundle is the SHA-256 of its manifest. A customer who pins it gets these bytes or an error.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from veiltune.errors import InputError
from veiltune.models.families import FAMILIES
from veiltune.models.split import BottomModel, HeadModel
from veiltune.runs import atomic_write_bytes, storage_errors

FORMAT = 1
_MANIFEST = "manifest.json"
_BOTTOM = ("bottom_config.json", "bottom.safetensors")
_HEAD = ("head_config.json", "head.safetensors")
_REMEDY = "fetch the bundle again"


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """What a bundle holds, verified; the modules are frozen and in eval mode.

    Attributes:
        bottom: The customer's part.
        tokenizer: The base model's tokenizer.
        head: In the U-shape, else None.
        digest: Of the bundle.
        manifest: As written: format, base_name, base_digest, cut_layer, cut_embeddings, files.
    """

    bottom: BottomModel
    tokenizer: PreTrainedTokenizerBase
    head: HeadModel | None
    digest: str
    manifest: Mapping[str, Any]


def write_bundle(
    folder: Path,
    bottom: BottomModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    head: HeadModel | None = None,
    base_name: str,
    base_digest: str,
) -> str:
    """Writes a bundle; without its manifest, which comes last, a folder is none.

    Args:
        folder: New or empty; made if need be.
        bottom: As split, with nothing attached.
        tokenizer: Of the base model.
        head: For the U-shape.
        base_name: For people; of a path only the last part is told.
        base_digest: `loading.weights_digest` of the base model.

    Returns:
        The bundle's digest, in hexadecimal. The same parts give the same digest.

    Raises:
        InputError: If the folder is not empty.
        StorageError: If the disk is full or cannot be written.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise InputError(f"the bundle folder {folder} must be empty; give a new one")
        _as_new(tokenizer).save_pretrained(str(folder), save_jinja_files=False)
        (folder / "tokenizer_config.json").write_bytes(_without_paths(folder / "tokenizer_config.json"))
    _write_part(folder, _BOTTOM, bottom, bottom.config)
    if head is not None:
        _write_part(folder, _HEAD, head, head.config)
    manifest = {
        "format": FORMAT,
        "base_name": Path(base_name).name if Path(base_name).is_dir() else base_name,
        "base_digest": base_digest,
        "cut_layer": bottom.cut_layer,
        "cut_embeddings": bottom.cut_embeddings,
        "files": {path.name: _sha256(path) for path in sorted(folder.iterdir())},
    }
    content = _json_bytes(manifest)
    atomic_write_bytes(folder / _MANIFEST, content)
    return hashlib.sha256(content).hexdigest()


def read_bundle(folder: Path, *, expected_digest: str | None = None) -> Bundle:
    """Verifies a bundle, file by file, then reads it.

    Guarantee:
        Nothing but the manifest is parsed before the list of files is exactly the manifest's and every digest
        fits; with `expected_digest`, not even that. Nothing is unpickled and no code from the folder is run.
        Without `expected_digest` this finds damage only: whoever can replace a file can replace the manifest.

    Args:
        folder: As `write_bundle` left it.
        expected_digest: The digest that was agreed on.

    Raises:
        InputError: If a file is missing, extra or altered, the digest is another, or the content is no
            bundle.
        UnsupportedModelError: For a family that this version does not know.
    """
    manifest, digest = _verified_manifest(folder, expected_digest)
    try:
        bottom_config = _read_config(folder / _BOTTOM[0])
        if manifest["cut_layer"] != bottom_config.num_hidden_layers:
            raise InputError(f"the bundle {folder} states another cut_layer than its configuration; {_REMEDY}")
        bottom = BottomModel.from_config(
            bottom_config, cut_layer=manifest["cut_layer"], cut_embeddings=manifest["cut_embeddings"]
        )
        _load_weights(bottom, folder / _BOTTOM[1])
        head = None
        if _HEAD[1] in manifest["files"]:
            head = HeadModel.from_config(_read_config(folder / _HEAD[0]))
            _load_weights(head, folder / _HEAD[1])
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except InputError:
        raise
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"the bundle {folder} is intact but unreadable ({type(error).__name__}); {_REMEDY}") from error
    return Bundle(bottom=bottom, tokenizer=tokenizer, head=head, digest=digest, manifest=MappingProxyType(manifest))


def _verified_manifest(folder: Path, expected_digest: str | None) -> tuple[dict[str, Any], str]:
    try:
        content = (folder / _MANIFEST).read_bytes()
    except OSError as error:
        raise InputError(f"{folder} holds no readable bundle ({error.strerror}); {_REMEDY}") from error
    digest = hashlib.sha256(content).hexdigest()
    if expected_digest is not None and digest != expected_digest:
        raise InputError(f"the bundle {folder} has the digest {digest}, expected was {expected_digest}; {_REMEDY}")
    manifest = _parsed_manifest(folder, content)
    listed = {_MANIFEST, *manifest["files"]}
    found = {path.name for path in folder.iterdir()}
    if listed != found:
        odd = min(listed ^ found)
        raise InputError(f"the bundle {folder} has {'an extra' if odd in found else 'no'} file {odd!r}; {_REMEDY}")
    for name, sha256 in manifest["files"].items():
        path = folder / name
        if path.is_symlink() or not path.is_file() or _sha256(path) != sha256:
            raise InputError(f"the bundle {folder} has an altered file {name!r}; {_REMEDY}")
    return manifest, digest


def _parsed_manifest(folder: Path, content: bytes) -> dict[str, Any]:
    try:
        manifest = json.loads(content)
        if manifest["format"] != FORMAT:
            raise InputError(f"the bundle {folder} has format {manifest['format']!r}, this version reads {FORMAT}")
        types = {"base_name": str, "base_digest": str, "cut_layer": int, "cut_embeddings": str, "files": dict}
        if all(type(manifest[key]) is kind for key, kind in types.items()):
            return dict(manifest)
    except (ValueError, TypeError, KeyError):
        pass
    raise InputError(f"the manifest of the bundle {folder} is malformed; {_REMEDY}")


def _write_part(folder: Path, names: tuple[str, str], part: nn.Module, config: PreTrainedConfig) -> None:
    content = json.loads(config.to_json_string())
    content.pop("_name_or_path", None)  # a path of the vendor's
    atomic_write_bytes(folder / names[0], _json_bytes(content))
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in part.state_dict().items()}
    atomic_write_bytes(folder / names[1], safetensors.torch.save(tensors))


def _as_new(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that does not remember how its last texts were padded and cut, which its files would tell."""
    tokenizer = copy.deepcopy(tokenizer)
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
    return tokenizer


def _read_config(path: Path) -> PreTrainedConfig:
    content = json.loads(path.read_bytes())
    model_type = content["model_type"]
    if model_type not in FAMILIES:
        raise InputError(f"{path} is for model_type {model_type!r}; this version knows {', '.join(FAMILIES)}")
    config: PreTrainedConfig = CONFIG_MAPPING[model_type].from_dict(content)
    return config


def _load_weights(part: nn.Module, path: Path) -> None:
    part.load_state_dict(safetensors.torch.load_file(path), strict=True, assign=True)
    part.eval().requires_grad_(False)


def _without_paths(path: Path) -> bytes:
    content = json.loads(path.read_bytes())
    content.pop("name_or_path", None)
    return _json_bytes(content)


def _json_bytes(content: object) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
