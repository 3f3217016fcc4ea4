"""What the releases tell besides tokens: the size of the noise, what hangs on it, lengths, and noise used twice.

Rows are flat: the vectors of several texts one after the other, cut by `lengths`. "Clean" vectors are what the
attacker computes from his own guesses with the bottom model that he holds, or knows exactly (special tokens at a cut
of 0); never the customer's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from scipy.special import betaincinv
from scipy.stats import chi2, gamma
from torch import Tensor

from veiltune._validate import in_range, one_of, positive, positive_int
from veiltune.attacks.result import AttackResult
from veiltune.errors import InputError

LAWS = ("d_chi", "gaussian")
_SPREAD = 8.0  # nats of ln(radius) over which a position that was guessed wrong is taken to be uniform
_CHANCE = 1e-3  # that a whole run of `repeated_noise` reports a pair though noise is independent
_BLOCK = 2048


def noise_scale_scores(
    values: Float[Tensor, "N H"], reference: Float[Tensor, "N H"] | None = None
) -> Float[Tensor, " N"]:
    """Ranks positions by how little noise they have: minus the radius of what is left after the guess.

    >>> reference = torch.zeros(3, 4)
    >>> noise_scale_scores(reference + torch.tensor([[2.0], [0.5], [1.0]]), reference)
    tensor([-4., -1., -2.])

    With contributing tokens (CTI) the noise of a token depends on whether the task needs it, and in H dimensions a
    radius is known to 1 / sqrt(H): 5 % at 384. One shared covariance gives nothing to rank.

    Threat model:
        Honest-but-curious vendor: sees released vectors and has token guesses from any attack, with their clean
        vectors; no auxiliary text. Without guesses (reference None) ||y|| alone, which also varies with the clean
        norms. Strong wherever the scale differs by more than a few percent; costs one pass over the data.

    Args:
        values: Released vectors.
        reference: Clean vector of each position's guess, in its guessed context.

    Returns:
        Scores for `ranking.roc_auc`, higher for less noise.

    Source: reference/sap.md C4; the radius of d_chi noise is Gamma(H, 1 / eta), arXiv:1910.08902.
    """
    residual = values.float() if reference is None else values.float() - reference.float()
    scores: Tensor = -torch.linalg.vector_norm(residual, dim=-1)
    return scores


def denoised_reference(
    values: Float[Tensor, "N H"], public_clean: Float[Tensor, "P H"], public_released: Float[Tensor, "P H"]
) -> Float[Tensor, "N H"]:
    """A reference for `noise_scale_scores` that needs no guess: the best linear estimate of the clean vectors.

    Where guesses are poor, the vectors of wrong tokens, and of right ones in a wrong context, blur the radius; this
    does not. Measured on MiniLM at a cut of 2 with contributing tokens: AUC .999 at noise-to-norm .7, where guesses
    with half of the tokens right give .6.

    >>> clean = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [2.0, 0.0], [0.0, 0.0]])
    >>> noise = torch.tensor([[0.0, 1.0], [0.0, -1.0], [0.0, -1.0], [0.0, 1.0]])
    >>> denoised_reference(torch.tensor([[1.5, 9.0]]), clean, clean + noise).round(decimals=2).abs()
    tensor([[1.5000, 0.0000]])

    Threat model:
        Honest-but-curious vendor: holds the bottom, knows the mechanism, and noises public text of his own with it.
        One least-squares fit in H dimensions; needs a few times H public tokens.

    Args:
        values: Released vectors.
        public_clean: Clean vectors of public text.
        public_released: The same with noise that the attacker drew himself.

    Raises:
        InputError: If widths or counts differ, or there are fewer public vectors than dimensions.

    Source: ridge regression, Hoerl and Kennard 1970.
    """
    count, dim = public_clean.shape
    if public_released.shape != public_clean.shape or values.shape[1] != dim or count < dim:
        raise InputError(
            f"a reference needs at least {dim} public vectors, clean and noised, of width {values.shape[1]};"
            f" got {tuple(public_clean.shape)} and {tuple(public_released.shape)}"
        )
    known, target = public_released.double(), public_clean.double()
    inputs, outputs = known - known.mean(dim=0), target - target.mean(dim=0)
    gram = inputs.T @ inputs
    gram += 1e-6 * gram.diagonal().mean() * torch.eye(dim, dtype=torch.float64)
    weights = torch.linalg.solve(gram, inputs.T @ outputs)
    estimate: Tensor = (values.double() - known.mean(dim=0)) @ weights + target.mean(dim=0)
    return estimate.float()


def labels_from_radius(
    radii: Float[Tensor, " N"],
    guesses: Int[Tensor, " N"],
    lengths: Sequence[int],
    table: Float[Tensor, "C V"],
    *,
    eta: float,
    dim: int,
    law: str = "d_chi",
    wrong_share: float = 0.05,
) -> Int[Tensor, " texts"]:
    """Reads the label of each text off the noise scale of its tokens, where that scale was chosen by the label.

    For every class the log-likelihood of all radii of a text is summed up, each under the scale that the class would
    give its guessed token; the largest wins. A share of positions is taken to be guessed wrong and tells nothing.

    >>> table = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> labels_from_radius(torch.tensor([10.0, 5.0]), torch.tensor([0, 1]), [2], table, eta=10.0, dim=100)
    tensor([1])

    Threat model:
        Honest-but-curious vendor: sees released vectors, has token guesses, and knows mechanism, eta and the table of
        multipliers (an insider, or one who fitted it on similar labelled text). Exact in practice for the published
        "budget" variant of CTI; for a table whose rows agree every class ties and the first is returned.

    Args:
        radii: Distance of each released vector from the clean vector of its guess.
        guesses: Token ids.
        lengths: Positions of each text.
        table: eta multipliers by class and token, > 0; inf for no noise.
        eta: At multiplier 1.
        dim: H.
        law: "d_chi", or "gaussian" with standard deviation sqrt(H + 1) / eta.
        wrong_share: Of positions whose guess is wrong, in (0, 1).

    Returns:
        The class of each text.

    Raises:
        InputError: If lengths do not add up, a number is out of range, or the law is unknown.

    Source: reference/sap.md C4 for the CTI of arXiv:2312.15603.
    """
    if sum(lengths) != len(radii) or len(guesses) != len(radii):
        raise InputError(f"lengths add up to {sum(lengths)}, but there are {len(radii)} radii, {len(guesses)} guesses")
    positive(eta=eta), positive_int(dim=dim), one_of(LAWS, law=law)
    in_range(1e-9, 1 - 1e-9, wrong_share=wrong_share)
    multipliers = table.double()[:, guesses]  # (C, N)
    log_radii = radii.double().clamp_min(1e-12).log()
    fitting = _log_density(log_radii + math.log(eta) + multipliers.log(), dim, law)
    silent = _log_density(torch.tensor(math.log(dim)), dim, law)  # no noise at all: any radius well below the usual
    unnoised = torch.where(log_radii < math.log(dim / eta) - math.log(2.0), silent, -torch.inf)
    fitting = torch.where(multipliers.isinf(), unnoised, fitting)
    wrong = torch.full_like(fitting, math.log(wrong_share) - math.log(_SPREAD))
    each = torch.logaddexp(fitting + math.log1p(-wrong_share), wrong)
    return torch.stack([part.sum(dim=1) for part in each.split(list(lengths), dim=1)]).argmax(dim=1)


def text_lengths(guesses: Int[Tensor, " N"], lengths: Sequence[int], pad_id: int) -> Int[Tensor, " texts"]:
    """Tells how many real tokens each text has where padding tokens are sent along to hide it.

    Padding stands at the end, so the length is where "no padding before, only padding after" fits the guesses best;
    for guesses without a mistake that is the number of tokens that are not padding.

    >>> text_lengths(torch.tensor([5, 7, 0, 0, 8, 0, 9, 0]), [4, 4], pad_id=0)
    tensor([2, 3])

    Threat model:
        Honest-but-curious vendor: token guesses from any attack on the released vectors, the padding id; no training.
        Padding is the most frequent token of a padded release, so it is recovered better than others; what stays
        hidden is what the guesses miss.

    Args:
        guesses: Token ids of all sent positions.
        lengths: Sent positions of each text, padding included.
        pad_id: The padding token.

    Returns:
        Real tokens of each text, special tokens included, in [0, lengths].

    Raises:
        InputError: If the lengths do not add up.

    Source: reference/sap.md C5.
    """
    if sum(lengths) != len(guesses):
        raise InputError(f"lengths add up to {sum(lengths)}, but there are {len(guesses)} guesses")
    sign = torch.where(guesses == pad_id, -1, 1)
    # the fit of length l, less that of length 0, is the sum of the first l signs; the longest wins a tie
    return torch.stack([_last_argmax(part) for part in sign.split(list(lengths))])


def score_lengths(
    guesses: Int[Tensor, " texts"], secret: Int[Tensor, " texts"], *, name: str = "text_lengths"
) -> AttackResult:
    """Counts the texts whose length was told exactly.

    Args:
        guesses: As `text_lengths` returned them.
        secret: True number of tokens, special tokens included and padding left out.
        name: Of the attack.

    Raises:
        InputError: If the counts differ or there is no text.
    """
    if len(guesses) != len(secret):
        raise InputError(f"guesses are for {len(guesses)} texts, the secret has {len(secret)}")
    return AttackResult(name=name, successes=int((guesses == secret).sum()), trials=len(secret))


def noise_scale_from_special_tokens(
    values: Float[Tensor, "M H"], clean: Float[Tensor, "M H"], *, law: str = "d_chi", confidence: float = 0.95
) -> tuple[float, float, float]:
    """Estimates eta from positions whose clean vector is known, such as [CLS] and [SEP] at a cut of 0.

    >>> generator = torch.Generator().manual_seed(0)
    >>> noise = torch.randn(50, 64, generator=generator) * 65**0.5 / 8.0
    >>> eta, low, high = noise_scale_from_special_tokens(noise, torch.zeros(50, 64), law="gaussian")
    >>> round(eta, 1), low < 8.0 < high
    (8.0, True)

    Threat model:
        Honest-but-curious vendor: known plaintext in every text, the law of the noise; no auxiliary text. The strength
        of a mechanism is no secret, so this costs no privacy by itself; it shows that an attacker needs not be told.
        Above the embeddings the vector of a special token depends on the secret context: what remains of that is
        taken for noise and eta comes out too small.

    Args:
        values: Released vectors at known slots.
        clean: What stood there.
        law: "d_chi", or "gaussian" (then the eta of equal power, sqrt(H + 1) / sigma).
        confidence: Of the interval.

    Returns:
        (eta, low, high), the maximum of the likelihood and its exact interval; all inf where there is no noise.

    Raises:
        InputError: If there is no row or the law is unknown.

    Source: reference/sap.md C6; radii of d_chi noise add up to a Gamma variable, arXiv:1910.08902.
    """
    one_of(LAWS, law=law)
    if not len(values):
        raise InputError("an estimate needs at least one vector at a known slot, got none")
    radii = torch.linalg.vector_norm(values.double() - clean.double(), dim=-1)
    tail, size, dim = (1.0 - in_range(0.0, 1.0, confidence=confidence)) / 2, values.numel(), values.shape[1]
    if float(radii.max()) == 0.0:
        return math.inf, math.inf, math.inf
    if law == "d_chi":
        total = float(radii.sum())
        low, high = (float(gamma.ppf(p, size)) / total for p in (tail, 1 - tail))
        return size / total, low, high
    power = float(radii.square().sum())
    low, high = (math.sqrt((dim + 1) * float(chi2.ppf(p, size)) / power) for p in (tail, 1 - tail))
    return math.sqrt((dim + 1) * size / power), low, high


def repeated_noise(residuals: Float[Tensor, "M H"], *, name: str = "repeated_noise") -> AttackResult:
    """Counts pairs of residuals that point the same or the opposite way far beyond chance.

    >>> noise = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    >>> print(repeated_noise(noise))
    repeated_noise: 0.00 [0.00, 0.46] n=6
    >>> print(repeated_noise(noise[:1].expand(4, -1)))
    repeated_noise: 1.00 [0.54, 1.00] n=6

    Two texts with the same noise vector, or a scaled one, at the same slot give away their difference. Independent
    directions have a cosine of known law; the threshold is such that a sound mechanism shows any pair at all with a
    chance of at most 1 in 1000.

    Threat model:
        Honest-but-curious vendor: known plaintext at one slot of several texts (residual = released - clean), or rows
        whose guesses he trusts. Needs H of about 30 or more for so many pairs. Finds vectors used again, not other
        dependence.

    Args:
        residuals: One row a text, at least 2. A common error in the clean vectors counts as repeated noise.
        name: For the report.

    Returns:
        Pairs found out of all pairs.

    Raises:
        InputError: If there are fewer than 2 rows or columns.

    Source: reference/sap.md C3 (noise reused) and D3 (public samplers that share a vector).
    """
    count, dim = residuals.shape
    if count < 2 or dim < 2:
        raise InputError(f"repeated noise needs at least 2 residuals of width at least 2, got shape ({count}, {dim})")
    pairs = count * (count - 1) // 2
    # (1 + cosine) / 2 of two independent directions is Beta((H-1)/2, (H-1)/2)
    threshold = 1.0 - 2.0 * float(betaincinv((dim - 1) / 2, (dim - 1) / 2, _CHANCE / (2 * pairs)))
    unit = torch.nn.functional.normalize(residuals.double(), dim=-1)
    found = 0
    for start in range(0, count, _BLOCK):
        cosines = (unit[start : start + _BLOCK] @ unit[start:].T).abs()
        found += int((cosines.triu(diagonal=1) > min(threshold, 1.0 - 1e-9)).sum())
    return AttackResult(name=name, successes=found, trials=pairs)


def replayed_differently(
    first: Sequence[bytes], second: Sequence[bytes], *, name: str = "replayed_differently"
) -> AttackResult:
    """Counts texts whose released bytes changed between two requests: each change is a second view to average.

    >>> print(replayed_differently([b"a", b"b"], [b"a", b"c"]))
    replayed_differently: 0.50 [0.01, 0.99] n=2

    Threat model:
        Vendor who asks again ("the transfer failed"), in the same epoch or a later one; sees bytes only.

    Args:
        first: What came at the first request, one entry a text.
        second: What came at the second, in the same order.
        name: For the report.

    Raises:
        InputError: If the counts differ or there is no text.

    Source: reference/sap.md C3, C9c.
    """
    if len(first) != len(second):
        raise InputError(f"both requests must be for the same texts, got {len(first)} and {len(second)}")
    changed = sum(a != b for a, b in zip(first, second, strict=True))
    return AttackResult(name=name, successes=changed, trials=len(first))


def _log_density(log_scaled: Tensor, dim: int, law: str) -> Tensor:
    """Log-density of ln(radius) at ln(eta * radius)."""
    if law == "d_chi":
        return dim * log_scaled - log_scaled.exp() - math.lgamma(dim)
    half_square = (2.0 * log_scaled).exp() / (2.0 * (dim + 1))  # radius^2 / (2 sigma^2)
    return math.log(2.0) + dim / 2 * half_square.log() - half_square - math.lgamma(dim / 2)


def _last_argmax(sign: Tensor) -> Tensor:
    """The number of leading entries with the largest sum; the larger of equals."""
    sums = torch.cat([torch.zeros(1, dtype=torch.long), sign.cumsum(0)])
    return len(sign) - sums.flip(0).argmax()
