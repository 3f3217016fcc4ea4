"""Label attacks: what the vendor learns of the labels from gradients and from representations.

The labels that gradients show are those that the customer computes with: under randomised response its answers, and no
attack that sees only functions of answers beats `label_success_bound`. Representations are not bound by it: a text
tells its own label as far as its release lets it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from veiltune._validate import positive
from veiltune.attacks.result import AttackResult
from veiltune.errors import InputError

_RESTARTS = 10


def labels_from_output_gradients(
    gradients: Float[Tensor, "N C"],
    *,
    probabilities: Float[Tensor, "N C"] | None = None,
    flip_matrix: Float[Tensor, "C C"] | None = None,
) -> Int[Tensor, " N"]:
    """Reads the label off the gradient of the loss with respect to the logits: its smallest entry.

    softmax(z) - onehot(y) has one negative entry. With the loss corrected for randomised response the entry of class j
    is p_j (1 - Q[j, a] / (p Q)[a]) for the answer a; it is negative for j = a alone as long as keeping is likelier
    than each other answer and all others are equally likely, so the same rule is exact. Any other matrix needs
    `probabilities` and `flip_matrix`: then the answer whose gradient points closest to the observed one is taken.

    >>> probabilities, labels = torch.tensor([[0.9, 0.1], [0.5, 0.5]]), torch.tensor([1, 0])
    >>> labels_from_output_gradients(probabilities - torch.eye(2)[labels])
    tensor([1, 0])

    Threat model:
        Honest-but-curious vendor of a split without a private head: sees the gradient that the customer returns for
        each example, at whatever positive scale; no auxiliary data, no training, no prior. Exact, so the one attack
        that label protection must be measured against. Under randomised response it finds the answer, not the label.

    Args:
        gradients: One row an example.
        probabilities: softmax of the vendor's own logits; needed with `flip_matrix` only.
        flip_matrix: Row y, column a: P[answer = a | label = y].

    Returns:
        Class of each example.

    Raises:
        InputError: If only one of the two optional arguments is given, or shapes differ.

    Source: elementary; noted for federated learning by Zhao et al. 2020, arXiv:2001.02610 (iDLG).
    """
    if (probabilities is None) != (flip_matrix is None):
        raise InputError("probabilities and flip_matrix are needed together; leave both out for symmetric flips")
    if probabilities is None or flip_matrix is None:
        return gradients.argmin(dim=-1)
    if probabilities.shape != gradients.shape:
        raise InputError(f"probabilities have shape {tuple(probabilities.shape)}, gradients {tuple(gradients.shape)}")
    shares, flips = probabilities.double(), flip_matrix.double()
    # (N, answer, class): p_class (1 - Q[class, answer] / (p Q)[answer])
    expected = shares.unsqueeze(1) * (1.0 - flips.T / (shares @ flips).unsqueeze(-1))
    return torch.cosine_similarity(expected, gradients.double().unsqueeze(1), dim=-1, eps=1e-300).argmax(dim=-1)


def labels_by_norm(gradients: Float[Tensor, "N H"], num_classes: int, *, seed: int) -> Int[Tensor, " N"]:
    """Groups examples by the length of their gradient at a hidden layer, for classes of unequal size.

    A model that has learnt the class shares is surer of frequent classes, so the gradients of rare ones are longer.

    >>> labels_by_norm(torch.tensor([[0.1, 0.0], [2.0, 0.0], [0.0, 0.2], [0.0, 2.1]]), 2, seed=0)
    tensor([0, 1, 0, 1])

    Threat model:
        Honest-but-curious vendor of a U-shaped split: sees the gradient at the hidden state that he sent to the
        customer's head, never logits; unsupervised, groups are in the order of their lengths (0 is the shortest), so
        the names of classes are still to be found. Strong for rare classes early in training, at chance for balanced
        ones.

    Args:
        gradients: One row an example; a text's rows summed over its tokens.
        num_classes: C.
        seed: Of the clustering's starts.

    Raises:
        InputError: If there are fewer examples than classes.

    Source: norm attack of Li et al. 2022 (Marvell), arXiv:2102.08504, with clusters for its threshold.
    """
    lengths = torch.linalg.vector_norm(gradients.double(), dim=-1, keepdim=True)
    logs = lengths.clamp_min(1e-30).log()
    clusters = _cluster(logs, num_classes, seed)
    sums = torch.zeros(num_classes).double().index_add(0, clusters, logs.squeeze(-1))
    means = sums / torch.bincount(clusters, minlength=num_classes)  # nan for an empty group, sorted last
    return means.argsort().argsort()[clusters]


def labels_by_direction(gradients: Float[Tensor, "N H"], num_classes: int, *, seed: int) -> Int[Tensor, " N"]:
    """Groups examples by the direction of their gradient at a hidden layer: each class pulls its own way.

    Through a linear head the gradients lie in C - 1 dimensions, in one cone a class; they are projected there, brought
    to one length and clustered.

    >>> labels = labels_by_direction(torch.tensor([[1.0, 0.1], [-2.0, 0.0], [0.3, 0.0], [-0.1, 0.0]]), 2, seed=0)
    >>> bool(labels[0] == labels[2] != labels[1]), bool(labels[1] == labels[3])
    (True, True)

    Threat model:
        As `labels_by_norm`; unsupervised and exact up to a permutation of the classes for two classes and a linear
        head, at any class shares; weaker for more classes once the model is sure of most examples.

    Args:
        gradients: One row an example; a text's rows summed over its tokens.
        num_classes: C, at least 2.
        seed: Of the clustering's starts.

    Returns:
        A group in [0, C) of each example; names by `best_permutation` from a few known labels.

    Raises:
        InputError: If there are fewer examples than classes.

    Source: direction attack of Li et al. 2022 (Marvell), arXiv:2102.08504, with clusters for the known positive.
    """
    rows = torch.nn.functional.normalize(gradients.double(), dim=-1)
    _, _, axes = torch.linalg.svd(rows, full_matrices=False)
    projected = rows @ axes[: max(1, num_classes - 1)].T
    return _cluster(torch.nn.functional.normalize(projected, dim=-1), num_classes, seed)


def labels_by_clustering(pooled: Float[Tensor, "N H"], num_classes: int, *, seed: int) -> Int[Tensor, " N"]:
    """Groups texts by their pooled representations, or by the vendor's own outputs for them: k-means.

    >>> groups = labels_by_clustering(torch.tensor([[0.0], [5.0], [0.1], [5.1]]), 2, seed=0)
    >>> bool(groups[0] == groups[2] != groups[1]), bool(groups[1] == groups[3])
    (True, True)

    Threat model:
        Honest-but-curious vendor: sees the representations of each text at the cut, or at any layer of his own that
        the task has shaped; no gradient, no label. Weak at a frozen bottom, strong where training has pulled the
        classes apart. Randomised response does not bound it.

    Args:
        pooled: One row a text, e.g. the mean over its tokens.
        num_classes: C.
        seed: Of the clustering's starts.

    Returns:
        A group in [0, C) of each text; names by `best_permutation` from a few known labels.

    Raises:
        InputError: If there are fewer texts than classes.

    Source: the activation leak of P3EFT, arXiv:2412.16669.
    """
    return _cluster(pooled.double(), num_classes, seed)


def best_permutation(groups: Int[Tensor, " N"], labels: Int[Tensor, " N"], num_classes: int) -> Int[Tensor, " C"]:
    """The naming of groups that agrees most with the labels of a calibration half; score it on the other half.

    >>> best_permutation(torch.tensor([1, 1, 0]), torch.tensor([0, 0, 1]), 2)
    tensor([1, 0])

    Args:
        groups: As an attack returned them.
        labels: Of the calibration half: what the attacker knows.
        num_classes: C.

    Returns:
        The class of each group, each used once.

    Raises:
        InputError: If the counts differ or an entry is out of range.

    Source: assignment, Kuhn 1955.
    """
    if len(groups) != len(labels):
        raise InputError(f"groups are for {len(groups)} examples, there are {len(labels)} labels")
    both = torch.cat([groups, labels])
    if both.numel() and not 0 <= int(both.min()) <= int(both.max()) < num_classes:
        raise InputError(f"groups and labels must be in [0, {num_classes - 1}]")
    together = torch.bincount(groups * num_classes + labels, minlength=num_classes**2).reshape(num_classes, -1)
    _, chosen = linear_sum_assignment(-together.numpy())
    return torch.from_numpy(np.asarray(chosen)).long()


def score_labels(
    guesses: Int[Tensor, " N"], secret: Int[Tensor, " N"], name: str, *, permutation: Int[Tensor, " C"] | None = None
) -> AttackResult:
    """Counts labels that were guessed.

    Args:
        guesses: As the attack returned them.
        secret: The true labels, before any randomised response.
        name: Of the attack.
        permutation: Names of groups, found on other examples than these.

    Raises:
        InputError: If the counts differ or there is no example.
    """
    if len(guesses) != len(secret):
        raise InputError(f"guesses are for {len(guesses)} examples, the secret has {len(secret)}")
    named = guesses if permutation is None else permutation[guesses]
    return AttackResult(name=name, successes=int((named == secret).sum()), trials=len(secret))


def label_success_bound(shares: Sequence[float], epsilon: float) -> float:
    """The largest success rate that randomised response leaves to whoever sees only its answers, and knows the shares.

    >>> round(label_success_bound([0.5, 0.5], math.log(3)), 6)  # e^epsilon / (e^epsilon + C - 1)
    0.75
    >>> round(label_success_bound([0.9, 0.1], math.log(3)), 6)  # answers add nothing to guessing the larger class
    0.9

    Guarantee:
        The Bayes-optimal guess from one answer, sum over answers a of max over labels y of share_y P[a | y], in
        expectation over labels of these shares. It covers every attack on anything computed from the answers; not one
        that also sees the text's representation.

    Args:
        shares: Of each class among the true labels; they add up to 1.
        epsilon: Of the randomised response.

    Raises:
        InputError: If shares are negative or do not add up to 1, there are fewer than two, or epsilon is not positive.

    Source: Bayes; the mechanism: Warner 1965.
    """
    positive(epsilon=epsilon)
    if len(shares) < 2 or min(shares) < 0 or not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
        raise InputError(
            f"shares must be at least two numbers that add up to 1, got {len(shares)} of sum {sum(shares)}"
        )
    other = math.exp(-epsilon) / (1.0 + (len(shares) - 1) * math.exp(-epsilon))
    keep = 1.0 / (1.0 + (len(shares) - 1) * math.exp(-epsilon))
    return sum(
        max(share * (keep if label == answer else other) for label, share in enumerate(shares))
        for answer in range(len(shares))
    )


def _cluster(rows: Tensor, num_classes: int, seed: int) -> Tensor:
    """k-means from several starts; rows that are all alike end up in one group."""
    if len(rows) < num_classes:
        raise InputError(f"{num_classes} groups need at least as many examples, got {len(rows)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than groups
        fitted = KMeans(num_classes, n_init=_RESTARTS, random_state=seed).fit(rows.numpy())
    return torch.from_numpy(np.asarray(fitted.labels_)).long()
