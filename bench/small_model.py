"""What the audit's benches train: a byte-level BPE tokenizer and a GPT-2-shaped model, by a plain loop in minutes."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from veiltune.models.precision import bf16_products

BOS, EOS, PAD = 0, 1, 2


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.open(encoding="utf-8")]


def new_tokenizer(texts: Sequence[str], *, vocabulary: int) -> PreTrainedTokenizerFast:
    """Merges are learnt from the texts."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", pair=None, special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def new_model(
    tokenizer: PreTrainedTokenizerFast, *, width: int, blocks: int, context: int, seed: int
) -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=width,
        n_layer=blocks,
        n_head=4,
        n_positions=context,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    *,
    epochs: float,
    learning_rate: float,
    batch: int = 16,
    seed: int = 0,
    context: int = 2**31,
) -> None:
    """AdamW with a short warm-up, no privacy: what someone who does not think of leaks would do.

    Matrix products are in bfloat16 where the hardware has them (a quarter faster here), weights in float32.
    """
    device = model.device.type
    fast_bf16 = device == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    longest = min(model.config.max_position_embeddings, context)
    rows = [[*ids[: longest - 1], tokenizer.eos_token_id] for ids in tokenizer(list(texts))["input_ids"]]
    total = round(epochs * len(rows) / batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    model.train()
    for step, chosen in zip(range(total), _batches(rows, batch, random.Random(seed)), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 50) * (1.0 - step / total) ** 0.5
        length = max(map(len, chosen))
        ids = torch.tensor([[*row, *[PAD] * (length - len(row))] for row in chosen], device=model.device)
        real = torch.arange(length, device=model.device) < torch.tensor([[len(row)] for row in chosen]).to(model.device)
        with bf16_products(device, enabled=fast_bf16):
            loss = model(input_ids=ids, attention_mask=real.long(), labels=ids.masked_fill(~real, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()


def _batches(rows: Sequence[list[int]], size: int, order: random.Random) -> Iterator[list[list[int]]]:
    """Epoch after epoch; rows of like length together."""
    while True:
        shuffled = order.sample(range(len(rows)), len(rows))
        parts = [
            sorted(shuffled[at : at + 16 * size], key=lambda row: len(rows[row]))
            for at in range(0, len(rows), 16 * size)
        ]
        batches = [part[at : at + size] for part in parts for at in range(0, len(part), size)]
        order.shuffle(batches)
        yield from ([rows[row] for row in batch] for batch in batches)
