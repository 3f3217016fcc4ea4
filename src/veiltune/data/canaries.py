"""Canaries: secrets inserted on purpose, of which it is known how often, and references that never are.

The family "pii" is what a customer cares about (a sentence about an invented person that ends with a random e-mail
address); "random" is harder on the training (one fixed prefix, then letters that nothing predicts); "token" is the
worst case (one fixed prefix, then a token that occurs nowhere else, arXiv:2503.06808), if the tokenizer is given the
tokens as tokens: nothing else that is learnt moves them, so they show the most of a broken privacy claim.
"""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence

from veiltune.data import fillers, templates_zh
from veiltune.data.expansion import seeded
from veiltune.data.manifest import Canary
from veiltune.data.people import People, entropy_bits

GROUPS, GROUP_LENGTH = 5, 4
TOKENS = 1_000_000
_TOKEN_PREFIX = "The seal of the record is "
_FRAMES = {"en_US": fillers.CANARY_FRAMES, "zh_CN": templates_zh.CANARY_FRAMES}
_PREFIX = {"en_US": fillers.RANDOM_PREFIX, "zh_CN": templates_zh.RANDOM_PREFIX}


def secret_bits() -> dict[str, float]:
    """Entropy of a canary's secret in bits, by family; the prefix is known to the attacker.

    >>> {family: round(bits, 1) for family, bits in secret_bits().items()}
    {'pii': 43.4, 'random': 94.0, 'token': 19.9}
    """
    letters = GROUPS * GROUP_LENGTH * math.log2(len(string.ascii_lowercase))
    return {"pii": entropy_bits("en_US")["email_cue_free"], "random": letters, "token": math.log2(TOKENS)}


def make_canaries(
    people: People,
    *,
    seed: int,
    epsilon: int,
    exposure: Mapping[int, int],
    references: int,
    locales: Sequence[str],
    family_for_epsilon: str = "random",
) -> list[Canary]:
    """Canaries of all purposes; sorted by id, which are numbered at random.

    Guarantee:
        Secrets are drawn uniformly and independently of everything else, and each canary for epsilon is included by a
        fair coin of its own, so the one-run bound (arXiv:2305.08846) and exposure (arXiv:1802.08232) may be computed
        from them. Coins and secrets follow from the seed: against whoever knows it nothing holds.

    Args:
        people: Who the persons of "pii" are drawn from, so that nobody else has their values.
        seed: Of secrets and coins.
        epsilon: Number of canaries for the bound.
        exposure: Number of canaries of each family, by how often they are inserted.
        references: Number of references of each family.
        locales: Of prefixes, drawn evenly; the same for canaries and references.
        family_for_epsilon: Of the canaries for the bound, "random" or "token".
    """
    wanted: list[tuple[str, str, int]] = []  # family, purpose, repetitions
    wanted += [(family_for_epsilon, "epsilon", seeded(seed, "coin", n).getrandbits(1)) for n in range(epsilon)]
    if family_for_epsilon == "token":
        wanted += [("token", "reference", 0)] * references
    for family in ("pii", "random"):
        wanted += [(family, "exposure", times) for times, number in exposure.items() for _ in range(number)]
        wanted += [(family, "reference", 0)] * references
    seeded(seed, "canary order").shuffle(wanted)
    tokens = iter(seeded(seed, "tokens").sample(range(TOKENS), sum(family == "token" for family, _, _ in wanted)))
    canaries = []
    for number, (family, purpose, repetitions) in enumerate(wanted):
        id = f"canary-{number:06d}"
        prefix, secret = (
            (_TOKEN_PREFIX, f"<|seal-{next(tokens):06d}|>")
            if family == "token"
            else _secret(people, seed, id, family, locales)
        )
        canaries.append(Canary(id, family, purpose, repetitions > 0, repetitions, prefix, secret))
    return canaries


def _secret(people: People, seed: int, id: str, family: str, locales: Sequence[str]) -> tuple[str, str]:
    rng = seeded(seed, "canary", id)
    locale = rng.choice(locales)
    if family == "pii":
        person = people.draw(id, locale=locale, cue="cue_free", style=0)
        return rng.choice(_FRAMES[locale]).format(name=person["name"]), person["email"]
    groups = ("".join(rng.choices(string.ascii_lowercase, k=GROUP_LENGTH)) for _ in range(GROUPS))
    return _PREFIX[locale], " ".join(groups)
