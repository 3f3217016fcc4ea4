"""Attribute inference: sex, income or whatever else from releases, learnt on some persons and tried on others."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from veiltune._validate import in_range, one_of, positive_int
from veiltune.attacks.pooling import fit_attention_classifier, predict_log_probabilities
from veiltune.attacks.ranking import MIN_PER_CLASS, roc_auc
from veiltune.attacks.result import AttackResult
from veiltune.errors import InputError

KINDS = ("logistic", "mlp", "attention")
_INNER_SHARE = 0.2  # of the training persons, to choose strengths and epochs
_MLP_WIDTH, _MLP_EPOCHS, _MLP_PATIENCE, _MLP_BATCH, _MLP_RATE = 768, 500, 20, 512, 1e-3
_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # inverse, as sklearn has it; of standardised inputs
_WORD_PENALTIES = (0.1, 1.0, 10.0)
_WORDS = r"\w+|[^\w\s]"  # punctuation is style, and style tells


def infer_attribute(
    train: Sequence[Tensor],
    train_labels: Int[Tensor, " N"],
    test: Sequence[Tensor],
    *,
    kind: str,
    num_classes: int,
    seed: int,
    persons: Sequence[Hashable] | None = None,
) -> Float[Tensor, "M C"]:
    """Learns an attribute from the released vectors of texts whose attribute is known, and infers it for others.

    "logistic": on the mean vector of a text. "mlp": the published head H -> 768 -> ReLU -> C on the same, Adam 1e-3,
    batches of 512. "attention": learned weights of the tokens before a small MLP. Strengths and epochs are chosen on a
    fifth of the training persons.

    >>> generator = torch.Generator().manual_seed(0)
    >>> labels = torch.arange(60) % 2
    >>> texts = [torch.randn(5, 4, generator=generator) + 3.0 * label for label in labels]
    >>> scores = infer_attribute(texts[:40], labels[:40], texts[40:], kind="logistic", num_classes=2, seed=0)
    >>> print(score_attribute(scores, labels[40:], "attribute_logistic"))
    attribute_logistic: 1.00 [0.83, 1.00] n=20

    Threat model:
        Honest-but-curious vendor: sees the releases, and knows the attribute of the authors of some of them (customers
        who told, public profiles). Needs hundreds of texts of dozens of persons; seconds to a minute. Compare with
        `majority_guess` and with `bag_of_words_ceiling`: what the text itself tells cannot be hidden by being
        privatized less than it.

    Args:
        train: (T, H) released vectors of each text whose attribute is known.
        train_labels: Its class.
        test: The same of the texts under attack.
        kind: See above.
        num_classes: C.
        seed: Of initialisation, order and the inner split.
        persons: Author of each training text, so that the inner split separates persons; None if each is its own.

    Returns:
        Class probabilities of each test text.

    Raises:
        InputError: If the kind is unknown, counts differ, fewer than two classes occur or a text has no vector.

    Source: attribute inference on representations, Song and Raghunathan 2020, arXiv:2004.00053; the head as in the
        evaluation of Split-N-Denoise, arXiv:2310.09130.
    """
    one_of(KINDS, kind=kind)
    inner = _inner_split(len(train), train_labels, num_classes, seed, persons)
    if any(not len(text) for text in [*train, *test]):
        raise InputError("every text needs at least one vector")
    if not len(test):
        return torch.zeros(0, num_classes)
    if kind == "attention":
        targets = nn.functional.one_hot(train_labels, num_classes).float()
        model = fit_attention_classifier(train, targets, held_in=~inner, seed=seed)
        return predict_log_probabilities(model, test).exp()
    known, asked = (torch.stack([text.float().mean(dim=0) for text in part]) for part in (train, test))
    deviation, mean = torch.std_mean(known, dim=0)
    known, asked = ((part - mean) / deviation.clamp_min(1e-6) for part in (known, asked))
    if kind == "mlp":
        return _mlp(known, train_labels, asked, inner, num_classes, seed)
    return _logistic(known.numpy(), train_labels, asked.numpy(), inner, num_classes, _PENALTIES)


def bag_of_words_ceiling(
    train_texts: Sequence[str],
    train_labels: Int[Tensor, " N"],
    test_texts: Sequence[str],
    *,
    num_classes: int,
    seed: int = 0,
    persons: Sequence[Hashable] | None = None,
) -> Float[Tensor, "M C"]:
    """What words alone tell of the attribute, without any protection: TF-IDF of words, marks and pairs of them.

    Threat model:
        None: a yardstick, someone who counts the words of the clean text. An attack near it has lost little to the
        noise. It is no bound: attacks on releases without noise have passed it a little (SynthPAI incomes, AUC .75
        against .72), since a pretrained bottom knows more of words than these texts teach.

    Args:
        train_texts: Clean texts whose attribute is known.
        train_labels: Its class.
        test_texts: Clean texts of other persons.
        num_classes: C.
        seed: Of the inner split that chooses the penalty.
        persons: Author of each training text.

    Returns:
        Class probabilities of each test text.

    Raises:
        InputError: If counts differ, fewer than two classes occur, or there are no words.
    """
    inner = _inner_split(len(train_texts), train_labels, num_classes, seed, persons)
    if not len(test_texts):
        return torch.zeros(0, num_classes)
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2, token_pattern=_WORDS, lowercase=False)
    try:
        known = vectorizer.fit_transform(train_texts)
    except ValueError:
        raise InputError("the texts have no word that occurs in two of them; there is nothing to learn") from None
    return _logistic(known, train_labels, vectorizer.transform(test_texts), inner, num_classes, _WORD_PENALTIES)


def split_by_person(persons: Sequence[Hashable], *, seed: int, share: float = 0.5) -> Bool[Tensor, " N"]:
    """Halves texts so that nobody is on both sides: True for the test side.

    >>> split_by_person(["ann", "bob", "ann", "cid"], seed=1).tolist()
    [False, True, False, True]

    Args:
        persons: Author of each text.
        seed: Of the draw.
        share: Of the persons on the test side, in (0, 1); at least one is on each.

    Raises:
        InputError: If there are fewer than two persons or the share is out of range.
    """
    names = list(dict.fromkeys(persons))
    if len(names) < 2:
        raise InputError(f"a split by person needs at least 2 persons, got {len(names)}")
    count = min(len(names) - 1, max(1, round(in_range(0.0, 1.0, share=share) * len(names))))
    drawn = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    chosen = {names[i] for i in drawn}
    return torch.tensor([person in chosen for person in persons])


def majority_guess(train_labels: Int[Tensor, " N"], count: int) -> Int[Tensor, " count"]:
    """Guesses the training side's largest class for everybody: what an attack must beat.

    >>> majority_guess(torch.tensor([0, 1, 1]), 2)
    tensor([1, 1])
    """
    return torch.bincount(train_labels).argmax().expand(count)


def score_attribute(scores: Float[Tensor, "M C"], secret: Int[Tensor, " M"], name: str) -> AttackResult:
    """Counts texts whose attribute has the highest score.

    Texts of one person are not independent, so their rate takes the interval of `intervals.share_by_group`.

    Args:
        scores: As an attack returned them.
        secret: The true classes.
        name: Of the attack.

    Raises:
        InputError: If the counts differ or there is no text.
    """
    if len(scores) != len(secret):
        raise InputError(f"scores are for {len(scores)} texts, the secret has {len(secret)}")
    return AttackResult(name=name, successes=int((scores.argmax(dim=-1) == secret).sum()), trials=len(secret))


def attribute_auc(
    scores: Float[Tensor, "M C"], secret: Int[Tensor, " M"], *, persons: Sequence[Hashable] | None = None
) -> dict[int, tuple[float, float, float]]:
    """Area under the ROC curve of each class against the rest, with its interval at 95 %.

    Args:
        scores: As an attack returned them.
        secret: The true classes.
        persons: Author of each text: texts of one person are not independent, so the interval widens.

    Returns:
        (auc, low, high) by class; classes with fewer than 10 texts (or persons) in or outside are left out.

    Raises:
        InputError: If the counts differ.
    """
    if len(scores) != len(secret):
        raise InputError(f"scores are for {len(scores)} texts, the secret has {len(secret)}")
    owners = list(range(len(secret)) if persons is None else persons)
    found = {}
    for label in range(scores.shape[1]):
        own = (secret == label).tolist()
        sides = ({o for o, is_own in zip(owners, own, strict=True) if is_own == side} for side in (True, False))
        if min(map(len, sides)) >= MIN_PER_CLASS:
            found[label] = roc_auc(scores[:, label], own, groups=owners)
    return found


def _inner_split(count: int, labels: Tensor, num_classes: int, seed: int, persons: Sequence[Hashable] | None) -> Tensor:
    """The part of the training texts that chooses, as a mask; checks what both learners need."""
    positive_int(num_classes=num_classes)
    if count != len(labels) or (persons is not None and len(persons) != count):
        raise InputError(f"there are {count} training texts, {len(labels)} labels and persons must be as many")
    if count and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise InputError(f"labels must be in [0, {num_classes - 1}]")
    inner = split_by_person(range(count) if persons is None else persons, seed=seed, share=_INNER_SHARE)
    if len(labels[~inner].unique()) < 2:
        raise InputError("an attribute needs texts of at least two classes to be learnt; label more texts")
    return inner


def _logistic(
    known: Any, labels: Tensor, asked: Any, inner: Tensor, num_classes: int, penalties: Sequence[float]
) -> Tensor:
    """Logistic regression with the penalty that is best on the inner part, then on everything."""
    chooses, truth = inner.numpy(), labels.numpy()

    def fitted(rows: Any, classes: Any, penalty: float) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return LogisticRegression(C=penalty, max_iter=300).fit(rows, classes)

    def loss(penalty: float) -> float:
        model = fitted(known[~chooses], truth[~chooses], penalty)
        scores = _all_classes(model, known[chooses], num_classes)
        return float(-np.log(scores[np.arange(len(scores)), truth[chooses]].clip(1e-12)).mean())

    best = fitted(known, truth, min(penalties, key=loss))
    return torch.from_numpy(_all_classes(best, asked, num_classes)).float()


def _all_classes(model: Any, rows: Any, num_classes: int) -> Any:
    """Probabilities with a column, of zeros, also for classes that were not seen."""
    scores = np.zeros((rows.shape[0], num_classes))
    scores[:, model.classes_] = model.predict_proba(rows)
    return scores


def _mlp(known: Tensor, labels: Tensor, asked: Tensor, inner: Tensor, num_classes: int, seed: int) -> Tensor:
    """The published head; the epoch that is best on the inner part."""
    rows, targets = known[~inner], labels[~inner]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(known.shape[1], _MLP_WIDTH), nn.ReLU(), nn.Linear(_MLP_WIDTH, num_classes))
        optimizer = torch.optim.Adam(model.parameters(), lr=_MLP_RATE)
        best, best_loss, waited = copy.deepcopy(model.state_dict()), torch.inf, 0
        for _ in range(_MLP_EPOCHS):
            for batch in torch.randperm(len(rows)).split(_MLP_BATCH):
                loss = nn.functional.cross_entropy(model(rows[batch]), targets[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                inner_loss = float(nn.functional.cross_entropy(model(known[inner]), labels[inner]))
            waited = waited + 1 if inner_loss >= best_loss else 0
            if inner_loss < best_loss:
                best, best_loss = copy.deepcopy(model.state_dict()), inner_loss
            if waited > _MLP_PATIENCE:
                break
    model.load_state_dict(best)
    with torch.no_grad():
        probabilities: Tensor = model(asked).softmax(dim=-1)
    return probabilities
