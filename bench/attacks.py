"""The inversion attacks: speed and memory, known figures, and what they recover at each depth.

    python bench/attacks.py                    # speed and memory; random vectors of real size
    python bench/attacks.py --known            # nearest and MAP on MiniLM's word embeddings, d_chi eta = 50
    python bench/attacks.py --depth            # learned, nearest, optimised at 1, 2, 3 blocks; learned under d_chi

Ratios are of runs that alternate, so that a machine whose speed drifts slows both. Data lie in ../shared/data beside
the repository or in --data. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veiltune.attacks.averaging import average_views, averaged_eta
from veiltune.attacks.decoding import NgramPrior, decode_with_prior
from veiltune.attacks.inversion import (
    invert_by_map,
    invert_by_nearest_embedding,
    rank_candidates,
    token_hits,
    unigram_log_prior,
)
from veiltune.attacks.learned import KINDS, train_inverter
from veiltune.attacks.optimize import invert_by_optimization
from veiltune.attacks.result import AttackResult
from veiltune.attacks.sequences import batches_by_length, bootstrap_by_text, pad_texts, rows_of, token_codebook
from veiltune.models.loading import BaseModel, load_base
from veiltune.models.split import BottomModel, split_model
from veiltune.privatize.mechanisms import make_privatizer
from veiltune.privatize.noise import sample_d_chi_noise

VOCAB, HIDDEN, TOKENS = 30_000, 384, 100_000
PUBLIC_TOKENS, SENTENCES, OPTIMIZED = 100_000, 300, 20
STRENGTHS = (0.7, 1.5, 3.0, 5.0)


def speed(tokens: int, rounds: int) -> dict[str, Any]:
    """Nearest embedding against the bare matrix product in equal blocks, and its memory."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = torch.randn(VOCAB, HIDDEN, generator=generator)
    values = torch.randn(tokens, HIDDEN, generator=generator)
    buffer = torch.empty(2**24 // VOCAB, VOCAB)

    def product() -> None:
        for block in values.split(len(buffer)):
            torch.mm(block, vocabulary.T, out=buffer[: len(block)])

    ratios, seconds = [], []
    for _ in range(rounds):
        bare = _seconds(product)
        seconds.append(_seconds(lambda: invert_by_nearest_embedding(values, vocabulary)))
        ratios.append(seconds[-1] / bare)
    return {
        "nearest_ratio": round(statistics.median(ratios), 3),
        "nearest_ratios": [round(ratio, 3) for ratio in ratios],
        "nearest_seconds": round(statistics.median(seconds), 2),
        "nearest_memory_mb": round(_in_child(_extra_memory, tokens), 1),
        "tokens": tokens,
    }


def learned_speed(kinds: Sequence[str]) -> dict[str, Any]:
    """Training time of each inverter at full size; random vectors in texts of 32."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = torch.randn(VOCAB, HIDDEN, generator=generator)
    rates = 1 / torch.arange(1.0, VOCAB + 1)
    ids = torch.multinomial(rates, TOKENS, replacement=True, generator=generator)
    clean = vocabulary[ids]
    mechanism = _mechanism(clean, 1.5, seed=1)
    seconds = {
        kind: _seconds(
            lambda kind=kind: train_inverter(
                kind, clean, ids, [32] * (TOKENS // 32), privatize=mechanism, word_embeddings=vocabulary, seed=0
            )
        )
        for kind in kinds
    }
    return {"learned_seconds": {kind: round(value, 1) for kind, value in seconds.items()}, "learned_tokens": TOKENS}


def known(data: Path, seed: int) -> dict[str, Any]:
    """Figures measured elsewhere before: EP of nearest .867, of MAP .609, of nearest after ten views .005.

    Two readings of "WikiText-2 tokens" are shown: whole words that are one token, and all word pieces. Which of them
    the earlier figures are of is not known; the nearest EP fits both, the MAP EP fits the pieces only.
    """
    base = load_base("minilm")
    text = (data / "wikitext2" / "valid.txt").read_text().lower()
    entries = base.tokenizer.get_vocab()
    words = [entries[word] for word in text.split() if word in entries]
    lines = [line for line in text.splitlines() if line.strip()]
    pieces = [token for ids in base.tokenizer(lines, add_special_tokens=False)["input_ids"] for token in ids]
    return {"words": _known(base, torch.tensor(words), seed), "word_pieces": _known(base, torch.tensor(pieces), seed)}


def _known(base: BaseModel, ids: Tensor, seed: int) -> dict[str, Any]:
    vocabulary, eta = base.model.get_input_embeddings().weight.detach().float(), 50.0
    first, second = ids.split([len(ids) // 2, len(ids) - len(ids) // 2])
    generator = torch.Generator().manual_seed(seed)
    secret = second[torch.randint(len(second), (1500,), generator=generator)]
    prior = unigram_log_prior(first, len(vocabulary), smoothing=0.1)
    views = [
        vocabulary[secret] + sample_d_chi_noise((len(secret), vocabulary.shape[1]), eta=eta, generator=generator)
        for _ in range(10)
    ]
    average = average_views(views)
    guesses = {
        "nearest": invert_by_nearest_embedding(views[0], vocabulary),
        "map": invert_by_map(views[0], vocabulary, log_prior=prior, eta=eta),
        "nearest_ten_views": invert_by_nearest_embedding(average, vocabulary),
        "map_ten_views": invert_by_map(average, vocabulary, log_prior=prior, eta=averaged_eta(eta, 10)),
    }
    return {f"{name}_ep": _empirical(found, secret, [1] * len(secret)) for name, found in guesses.items()}


def depth(data: Path, kinds: Sequence[str], cuts: Sequence[int], noisy_cut: int, seed: int) -> dict[str, Any]:
    """Recovery on SST-2 sentences by inverters trained on Wikipedia, without noise at each cut, with noise at one."""
    base = load_base("minilm")
    public, secret = public_texts(base, data, seed), sst2_sentences(base, data)
    results: dict[str, Any] = {}
    for cut in cuts:
        bottom, _ = split_model(base.model, cut_layer=cut, cut_embeddings="block")
        train, test = encoded(bottom, public), encoded(bottom, secret)
        results[f"cut {cut}"] = _clean(base, bottom, train, test, kinds, seed)
        print(json.dumps({f"cut {cut}": results[f"cut {cut}"]}), flush=True)
        if cut == noisy_cut:
            for strength in STRENGTHS:
                name = f"cut {cut} d_chi {strength}"
                results[name] = _noisy(base, bottom, train, test, kinds, strength, seed)
                print(json.dumps({name: results[name]}), flush=True)
    return results


def _clean(base: BaseModel, bottom: BottomModel, train: Any, test: Any, kinds: Sequence[str], seed: int) -> Any:
    values, ids, lengths = test
    real = ~torch.isin(ids, torch.tensor(base.tokenizer.all_special_ids))
    template = list(base.tokenizer("a")["input_ids"])
    codebook = token_codebook(bottom, template=template, position=1)
    found: dict[str, Any] = {}
    for kind in kinds:
        inverter = train_inverter(
            kind, *train, privatize=torch.clone, word_embeddings=bottom.word_embeddings.detach(), seed=seed
        )
        found[kind] = _recovered(inverter.guess(values, lengths), ids, lengths, real)
    count = sum(lengths[:OPTIMIZED])
    candidates, scores = rank_candidates(values[:count], codebook, top_k=64)
    found["nearest"] = _recovered(invert_by_nearest_embedding(values, codebook), ids, lengths, real)
    shown = (ids[:count], lengths[:OPTIMIZED], real[:count])
    found[f"nearest, first {OPTIMIZED}"] = _recovered(candidates[:, :1], *shown)
    optimized = invert_by_optimization(
        bottom,
        values[:count],
        lengths[:OPTIMIZED],
        candidates=candidates,
        initial_scores=scores / scores.std(dim=1, keepdim=True),
        fixed={0: template[0], -1: template[-1]},
        steps=100,
        seed=seed,
    )
    found[f"optimize, first {OPTIMIZED}"] = _recovered(optimized, *shown)
    return found


def _noisy(
    base: BaseModel, bottom: BottomModel, train: Any, test: Any, kinds: Sequence[str], strength: float, seed: int
) -> Any:
    (clean, public, public_lengths), (secret, ids, lengths) = train, test
    real = ~torch.isin(ids, torch.tensor(base.tokenizer.all_special_ids))
    values = _mechanism(clean, strength, seed=seed + 1)(secret)  # the defence's noise
    codebook = token_codebook(bottom, template=list(base.tokenizer("a")["input_ids"]), position=1)
    found = {"nearest": _recovered(invert_by_nearest_embedding(values, codebook), ids, lengths, real)}
    prior = NgramPrior(public, public_lengths, vocab_size=len(codebook))
    for kind in kinds:
        inverter = train_inverter(
            kind,
            *train,
            privatize=_mechanism(clean, strength, seed=seed + 2),  # the attacker's
            word_embeddings=bottom.word_embeddings.detach(),
            seed=seed,
        )
        candidates, scores = inverter.log_scores(values, lengths, 16)
        found[kind] = _recovered(candidates[:, :1], ids, lengths, real)
        decoded = decode_with_prior(candidates, scores - inverter.log_prior[candidates], lengths, prior)
        found[f"{kind}, trigrams"] = _recovered(decoded, ids, lengths, real)
    return found


def public_texts(base: BaseModel, data: Path, seed: int) -> list[list[int]]:
    """Sentences of WikiText-2, in random order, about 100,000 tokens."""
    lines = [line for part in ("valid", "test") for line in (data / "wikitext2" / f"{part}.txt").open()]
    sentences = [text for line in lines if len(line) > 40 for text in re.split(r"(?<= \.) ", line) if len(text) > 20]
    random.Random(seed).shuffle(sentences)
    texts, total = [], 0
    for ids in base.tokenizer(sentences, truncation=True, max_length=64)["input_ids"]:
        texts.append(ids)
        total += len(ids)
        if total >= PUBLIC_TOKENS:
            return texts
    return texts


def sst2_sentences(base: BaseModel, data: Path) -> list[list[int]]:
    """The first sentences of SST-2's test half."""
    lines = (data / "sst2" / "stsa.binary.test").read_text(encoding="latin-1").splitlines()[:SENTENCES]
    return [list(ids) for ids in base.tokenizer([line[2:] for line in lines])["input_ids"]]


@torch.no_grad()
def encoded(bottom: BottomModel, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, list[int]]:
    """Representations, tokens and lengths, flat."""
    lengths, flat = [len(ids) for ids in texts], torch.tensor([token for ids in texts for token in ids])
    values = torch.empty(len(flat), bottom.hidden_size)
    for group in batches_by_length(lengths, 4096):
        rows = rows_of(lengths, group)
        ids, mask = pad_texts(flat[rows], [lengths[i] for i in group])
        values[rows] = bottom(ids, mask.long())[mask]
    return values, flat, lengths


def _mechanism(clean: Tensor, noise_to_norm: float, seed: int) -> Callable[[Tensor], Tensor]:
    norm = float(clean.norm(dim=-1).mean())
    mechanism = make_privatizer("d_chi", dim=clean.shape[1], reference_norm=norm, noise_to_norm=noise_to_norm)
    generator = torch.Generator().manual_seed(seed)
    return lambda values: mechanism.privatize(values, generator=generator)


def _recovered(guesses: Tensor, ids: Tensor, lengths: Sequence[int], real: Tensor) -> dict[str, Any]:
    """Share of real tokens recovered, with the interval over texts and the exact one."""
    sizes = [int(part.sum()) for part in real.split(list(lengths))]
    hits = token_hits(guesses, ids)[real]
    result = AttackResult(name="recovery", successes=int(hits.sum()), trials=len(hits))
    by_text = bootstrap_by_text(hits, sizes, seed=0)
    return {
        "recovered": round(result.success_rate, 4),
        "ep": round(result.empirical_privacy, 4),
        "exact": [round(value, 4) for value in result.interval()],
        "by_text": [round(value, 4) for value in by_text],
        "tokens": len(hits),
    }


def _empirical(guesses: Tensor, secret: Tensor, lengths: Sequence[int]) -> dict[str, Any]:
    row = _recovered(guesses, secret, lengths, torch.ones(len(secret), dtype=torch.bool))
    return {"ep": row["ep"], "interval": [round(1 - value, 4) for value in reversed(row["exact"])]}


def _seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _extra_memory(tokens: int) -> float:
    """MB by which the attack raises the process's peak."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = torch.randn(VOCAB, HIDDEN, generator=generator)
    values = torch.randn(tokens, HIDDEN, generator=generator)
    torch.mm(values[:64], vocabulary[:64].T)  # the library's own buffers
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins at what is held now
    before = _status_mb("VmRSS")
    invert_by_nearest_embedding(values, vocabulary)
    return _status_mb("VmHWM") - before


def _status_mb(field: str) -> float:
    """Linux: a line of this process's status. (getrusage would carry over the parent's peak.)"""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 1024


def _in_child(function: Callable[[int], float], argument: int) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, (argument,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--known", action="store_true")
    parser.add_argument("--depth", action="store_true")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of the speed test")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--cuts", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--noisy-cut", type=int, default=2, help="where d_chi noise is tried too; -1 for nowhere")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {"bench": "attacks", "seed": arguments.seed, "threads": torch.get_num_threads()}
    if arguments.known:
        result |= known(arguments.data, arguments.seed)
    elif arguments.depth:
        result |= depth(arguments.data, arguments.kinds, arguments.cuts, arguments.noisy_cut, arguments.seed)
    else:
        result |= speed(arguments.tokens, arguments.rounds) | learned_speed(arguments.kinds)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
