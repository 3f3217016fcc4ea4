"""Shared fixtures. No test reaches the network; each process computes on one thread."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded source of randomness."""
    import torch

    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """`tiny_model(family, task)` of tests/tiny.py: random weights, 4 blocks, hidden size 32, 128 tokens."""
    import tiny

    return tiny.tiny_model


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, lower case, 99 tokens in all; [PAD] is 0 and texts stand between [CLS] and [SEP]."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = special + [chr(code) for code in range(32, 127)]
    core = Tokenizer(models.WordLevel({token: index for index, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair=None, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@pytest.fixture
def tiny_folder(tmp_path: Path, tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with a tiny BERT and its tokenizer, as `load_base` takes it."""
    folder = tmp_path / "tiny-bert"
    tiny_model("bert", "base").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The house's data sets; a test that needs them is skipped on machines without."""
    if not SHARED.is_dir():
        pytest.skip("the data sets that lie beside the repository in shared/data are not on this machine")
    return SHARED
