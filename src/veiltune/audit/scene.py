"""Everything that one audit works with: the released vectors, the truth for scoring, the adversary and his means."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from veiltune.attacks.averaging import average_views
from veiltune.audit.observing import AuditedRun, choose_texts, flat, observed_views
from veiltune.audit.options import AuditOptions
from veiltune.audit.practice import practice_noise
from veiltune.audit.presets import Preset
from veiltune.audit.public import PublicText, read_public
from veiltune.audit.record import GroupName
from veiltune.audit.scoring import Truth, halves, tokens_needed
from veiltune.audit.suite import Adversary
from veiltune.audit.tagging import PersonalTagger, read_terms
from veiltune.customer.opening import encode
from veiltune.customer.releasing import TOKENS_PER_PASS, pieces
from veiltune.errors import InputError
from veiltune.privatize.importance import token_importance
from veiltune.privatize.mechanisms import DChi, Gaussian

RARE_BELOW = 10.0  # occurrences in 100,000 public tokens


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One audit's material.

    Attributes:
        audited: The run.
        options: What the user asked for.
        preset: Sizes.
        public: What attackers train on.
        rows: Attacked rows of the training table; the first half chooses, the second is reported.
        views: Releases of each text that the vendor holds.
        values: (N, H) what he makes of them: their mean.
        truth: For scoring only.
        adversary: What attacks are given.
        groups: (N,) tokens of each kind.
        described: Each kind in words.
        per_100k: (V,) occurrences in 100,000 public tokens.
        multipliers: (N,) by which each token's eta was scaled when it was released.
    """

    audited: AuditedRun
    options: AuditOptions
    preset: Preset
    public: PublicText
    rows: list[int]
    views: int
    values: Tensor
    truth: Truth
    adversary: Adversary
    groups: dict[GroupName, Tensor]
    described: dict[GroupName, str]
    per_100k: Tensor
    multipliers: Tensor

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each attacked text."""
        return self.truth.lengths

    @property
    def token_ids(self) -> list[list[int]]:
        """The attacked texts."""
        return [self.audited.token_ids[row] for row in self.rows]


def build_scene(audited: AuditedRun, options: AuditOptions, preset: Preset) -> Scene:
    """Samples, reads and encodes; makes no attack.

    Raises:
        InputError: If there are too few tokens for an interval, or the public text cannot be used.
    """
    public = _public(audited, options, preset)
    rows = choose_texts(audited, preset.texts, seed=options.seed)
    token_ids = [audited.token_ids[row] for row in rows]
    truth = _truth(audited, token_ids)
    _check_enough(truth, audited)
    views = observed_views(audited, rows)
    count = min(map(len, views))
    if count == 0:
        raise InputError(f"the outbox of {audited.run.path} lacks releases of some texts; is the run finished?")
    per_100k = 1e5 * torch.bincount(flat(public.token_ids), minlength=_vocab_size(audited)) / public.num_tokens
    multipliers = _multipliers(audited, rows)
    groups, described = _groups(audited, options, rows, truth, per_100k, multipliers)
    return Scene(
        audited=audited,
        options=options,
        preset=preset,
        public=public,
        rows=rows,
        views=count,
        values=torch.cat([average_views(text) for text in views]),
        truth=truth,
        adversary=_adversary(audited, options, public, views=count),
        groups=groups,
        described=described,
        per_100k=per_100k,
        multipliers=multipliers,
    )


def clean_vectors(audited: AuditedRun, token_ids: Sequence[Sequence[int]]) -> Tensor:
    """(N, H) representations without noise, one text after the other."""
    sizes = [len(ids) for ids in token_ids]
    order = sorted(range(len(sizes)), key=lambda i: sizes[i])
    found: dict[int, Tensor] = {}
    audited.releaser.bottom.eval()
    with torch.no_grad():
        for batch in pieces(order, [sizes[i] for i in order], TOKENS_PER_PASS):
            values = audited.releaser.clean([token_ids[i] for i in batch])
            found.update(zip(batch, values.split([sizes[i] for i in batch]), strict=True))
    return torch.cat([found[i] for i in range(len(sizes))])


def fresh_noise(
    audited: AuditedRun, token_ids: Sequence[Sequence[int]], *, views: int, seed: int
) -> Callable[[Tensor], Tensor]:
    """The mean of so many fresh releases of these texts' vectors, under the run's mechanism and the audit's own seed.

    Where contributing tokens have less noise, the attackers' own texts get it too, by a class drawn at random for
    each text: the list is a secret of the customer's, but the radius gives it away, so attackers are given it.
    """
    multipliers = None
    if audited.releaser.contributing is not None:
        table = audited.releaser.contributing.table
        classes = torch.randint(len(table), (len(token_ids),), generator=torch.Generator().manual_seed(seed)).tolist()
        multipliers = torch.cat([table[c, torch.tensor(list(ids))] for c, ids in zip(classes, token_ids, strict=True)])
    return practice_noise(audited.releaser.privatizer, views=views, seed=seed, multipliers=multipliers)


def _public(audited: AuditedRun, options: AuditOptions, preset: Preset) -> PublicText:
    return read_public(
        options.public,
        lambda texts: encode(audited.config, audited.bundle, texts),
        text_column=options.public_column,
        private=audited.table.texts,
        max_tokens=preset.public_tokens,
        seed=options.seed,
    )


def _truth(audited: AuditedRun, token_ids: list[list[int]]) -> Truth:
    ids, lengths = flat(token_ids), tuple(map(len, token_ids))
    special = torch.tensor(sorted(audited.bundle.tokenizer.all_special_ids))
    return Truth(ids=ids, lengths=lengths, real=~torch.isin(ids, special), calibration=halves(lengths))


def _check_enough(truth: Truth, audited: AuditedRun) -> None:
    have = min(int((truth.real & half).sum()) for half in (truth.calibration, ~truth.calibration))
    if have < tokens_needed():
        raise InputError(
            f"{audited.run.path} released too few tokens for an interval of +-0.1: one half of its texts has {have},"
            f" each needs {tokens_needed()}; audit a run over more or longer texts"
        )


def _adversary(audited: AuditedRun, options: AuditOptions, public: PublicText, *, views: int) -> Adversary:
    tokenizer, privatizer = audited.bundle.tokenizer, audited.releaser.privatizer
    special = frozenset(tokenizer.all_special_ids)
    template = tuple(tokenizer("a")["input_ids"])
    root = views**0.5
    return Adversary(
        bottom=audited.bundle.bottom.eval(),
        clean=lambda token_ids: clean_vectors(audited, token_ids),
        template=template,
        position=next(i for i, token in enumerate(template) if token not in special),
        special_ids=special,
        public_ids=public.token_ids,
        public_clean=clean_vectors(audited, public.token_ids),
        privatize=fresh_noise(audited, public.token_ids, views=views, seed=options.seed + 1),
        eta=privatizer.eta * root if isinstance(privatizer, DChi) else None,
        sigma=privatizer.sigma / root if isinstance(privatizer, Gaussian) else None,
        multipliers=_scales(audited),
        seed=options.seed,
    )


def _groups(
    audited: AuditedRun,
    options: AuditOptions,
    rows: list[int],
    truth: Truth,
    per_100k: Tensor,
    multipliers: Tensor,
) -> tuple[dict[GroupName, Tensor], dict[GroupName, str]]:
    if audited.releaser.contributing is None:
        contributing, how = (
            _would_contribute(audited)[truth.ids],
            "tokens at least twice as frequent in one class",
        )
    else:
        contributing, how = multipliers > 1, "tokens that the run sent with less noise (CTI)"
    tagger = PersonalTagger(read_terms(Path(options.personal_terms)) if options.personal_terms else ())
    tags = [
        tagger.tag(audited.bundle.tokenizer, audited.table.texts[row], length=len(audited.token_ids[row]))
        for row in rows
    ]
    personal = torch.tensor([tag for text in tags for tag in text])
    groups: dict[GroupName, Tensor] = {
        "all": truth.real,
        "contributing": truth.real & contributing,
        "personal": truth.real & personal,
        "rare": truth.real & (per_100k[truth.ids] < RARE_BELOW),
    }
    terms = "and the terms given" if options.personal_terms else "by their form; names need --personal-terms"
    described: dict[GroupName, str] = {
        "all": "all tokens but special ones",
        "contributing": how,
        "personal": f"e-mail addresses, phone and other numbers, {terms}",
        "rare": f"tokens seen less than {RARE_BELOW:g} times in 100,000 of the public text",
    }
    return groups, described


def _would_contribute(audited: AuditedRun) -> Tensor:
    """(V,) tokens at least twice as frequent in one class as in the others, by the geometric mean."""
    importance = token_importance(
        audited.token_ids,
        audited.sent_labels,
        num_classes=len(audited.labels),
        vocab_size=_vocab_size(audited),
    )
    return importance.amax(dim=0) > (len(audited.labels) - 1) * math.log(2.0)


def _multipliers(audited: AuditedRun, rows: list[int]) -> Tensor:
    fitted, labels = audited.releaser.contributing, audited.sent_labels
    if fitted is None:
        return torch.ones(sum(len(audited.token_ids[row]) for row in rows))
    return torch.cat([fitted.multipliers(torch.tensor(audited.token_ids[row]), labels[row]) for row in rows])


def _scales(audited: AuditedRun) -> Tensor | None:
    """(C, V) multipliers of eta; 1 for rows of the embedding matrix that the tokenizer has no token for."""
    fitted = audited.releaser.contributing
    if fitted is None:
        return None
    return torch.nn.functional.pad(fitted.table, (0, _vocab_size(audited) - fitted.table.shape[1]), value=1.0)


def _vocab_size(audited: AuditedRun) -> int:
    return len(audited.bundle.bottom.word_embeddings)
