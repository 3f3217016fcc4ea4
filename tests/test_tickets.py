from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from veiltune.data.tables import LabelSet, read_table
from veiltune.data.tickets import CONDITIONS, PROBLEMS, VAGUE, Ticket, make_tickets, write_tickets
from veiltune.errors import InputError, StorageError


@pytest.fixture(scope="module")
def tickets() -> list[Ticket]:
    return make_tickets(1500, seed=3)


def accuracy(tickets: list[Ticket], targets: list[str]) -> float:
    """Held-out accuracy of a bag of words with logistic regression."""
    texts, split = [ticket.text for ticket in tickets], len(tickets) * 2 // 3
    model = make_pipeline(CountVectorizer(), LogisticRegression(max_iter=500))
    model.fit(texts[:split], targets[:split])
    return float(model.score(texts[split:], targets[split:]))


def test_topics_can_be_learnt_but_not_fully(tickets: list[Ticket]) -> None:
    assert 0.75 <= accuracy(tickets, [ticket.topic for ticket in tickets]) <= 0.97


def test_the_bounds_reject_noise(tickets: list[Ticket]) -> None:
    topics = [ticket.topic for ticket in tickets]
    random.Random(0).shuffle(topics)
    assert accuracy(tickets, topics) < 0.4


def test_conditions_leak_through_the_text(tickets: list[Ticket]) -> None:
    assert 0.5 < accuracy(tickets, [ticket.condition for ticket in tickets]) < 0.95


def test_classes_are_balanced(tickets: list[Ticket]) -> None:
    topics = Counter(ticket.topic for ticket in tickets)
    conditions = Counter(ticket.condition for ticket in tickets)
    assert set(topics) == set(PROBLEMS) and set(conditions) == set(CONDITIONS)
    assert min(topics.values()) > 0.12 * len(tickets) and min(conditions.values()) > 0.18 * len(tickets)


def test_personal_data_is_in_the_text_and_reserved(tickets: list[Ticket]) -> None:
    texts = " ".join(ticket.text for ticket in tickets)
    assert texts.count("@example.") == texts.count("@") > 300
    assert texts.count(") 555-01") == texts.count("(2") > 300
    assert "{" not in texts


def test_vague_sentences_fit_two_known_topics() -> None:
    assert all(topic in PROBLEMS for topics in VAGUE for topic in topics)
    vague = VAGUE["account", "technical"][0].partition("{")[0]
    assert {t.topic for t in make_tickets(1500, seed=0) if vague in t.text} == {"account", "technical"}


def test_the_seed_decides() -> None:
    assert make_tickets(20, seed=1) == make_tickets(20, seed=1) != make_tickets(20, seed=2)


def test_written_tables_read_back(tmp_path: Path) -> None:
    train, evaluation = write_tickets(tmp_path / "new", num_train=30, num_eval=10, seed=5)
    tickets = make_tickets(40, seed=5)
    for path, expected in ((train, tickets[:30]), (evaluation, tickets[30:])):
        table = read_table(path, text_column="text", label_column="topic", attribute_column="condition")
        persons = read_table(path, text_column="text", attribute_column="person").attributes
        assert table.labels is not None and table.attributes is not None and persons is not None
        assert [*map(Ticket, table.texts, table.labels, table.attributes, persons)] == expected
    assert len(LabelSet.fit([ticket.topic for ticket in tickets])) == 5


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="num_eval must be a whole number of at least 1, got 0"):
        write_tickets(tmp_path / "none", num_train=3, num_eval=0, seed=0)
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot write .*file"):
        write_tickets(tmp_path / "file", num_train=3, num_eval=1, seed=0)
