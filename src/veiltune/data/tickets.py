"""Synthetic support tickets: something private-looking to try things on, without a single real person in it.

A ticket names a person, an e-mail address, a phone number or an order, has a topic (the label) and often lets a health
condition slip (the sensitive attribute). Topics share most of their words, and one ticket in eight fits two topics, so
that counting words is clearly not enough for all of them.
"""

from __future__ import annotations

import csv
import io
import random
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from faker import Faker

from veiltune._validate import positive_int
from veiltune.runs import atomic_write_bytes, storage_errors

VAGUE_SHARE = 1 / 8
HINT_SHARE = 0.8  # of the tickets with a condition, those that let it slip

PROBLEMS: dict[str, tuple[str, ...]] = {
    "billing": (
        "My card was charged twice for order {order}.",
        "The invoice for {product} shows a higher amount than the price I agreed to.",
        "I cancelled the subscription last month and you still took the money.",
        "A discount code was promised for order {order} but the full price was debited.",
        "Please explain the extra fee of {amount} on my statement.",
        "The tax on the bill for {product} is wrong.",
        "I paid {amount} by bank transfer and the order still says unpaid.",
        "Can I get a receipt with my company's address for order {order}?",
    ),
    "delivery": (
        "Order {order} was supposed to arrive on {day} and nothing came.",
        "The courier left {product} with a neighbour I do not know.",
        "Tracking has said 'in transit' for nine days.",
        "The parcel went to my old address in {city} although I changed it.",
        "Can you bring {product} on {day} instead, nobody is home before that.",
        "The driver rang once and drove off with order {order}.",
        "Only one of two boxes of order {order} reached me.",
        "I have paid for express and {product} is still in your warehouse in {city}.",
    ),
    "account": (
        "I cannot log in since I changed my phone.",
        "The password reset mail never reaches {email}.",
        "Please change the e-mail address of my profile to {email}.",
        "Someone in {city} signed in to my profile and I do not know who.",
        "My profile shows the orders of another customer, among them order {order}.",
        "I want my data and my profile removed from your system.",
        "The code for signing in arrives an hour late, on {day} it did not arrive at all.",
        "Two profiles exist for me, please merge them, the old one has order {order}.",
    ),
    "technical": (
        "{product} does not switch on any more.",
        "Since the update on {day} the app closes whenever I open an order.",
        "{product} loses the connection every few minutes.",
        "The screen of {product} stays black after charging over night.",
        "The app says error 504 when I try to send the form.",
        "{product} gets so hot that I am afraid to leave it on.",
        "How do I pair {product} with my phone, the manual is for another model.",
        "The sound of {product} is distorted, a new cable did not help.",
    ),
    "returns": (
        "I would like to send {product} back, it is not what I expected.",
        "The label for sending back order {order} does not print.",
        "You received {product} on {day} and I am still waiting for my money.",
        "{product} came in the wrong colour, please exchange it.",
        "Is it possible to return an opened box of order {order}?",
        "The shop in {city} refused to take {product} back.",
        "I sent both boxes back and only {amount} was refunded.",
        "The size is wrong, can I swap {product} for a larger one?",
    ),
}
VAGUE: dict[tuple[str, str], tuple[str, ...]] = {
    ("billing", "delivery"): ("I was charged for order {order} and have not received anything.",),
    ("billing", "returns"): ("{amount} for {product} is missing, when will I see my money?",),
    ("delivery", "returns"): ("The wrong product was in the box of order {order}.",),
    ("account", "technical"): ("The app will not let me in since {day}.",),
    ("account", "billing"): ("I do not recognise order {order} in my profile, I never bought {product}.",),
    ("technical", "returns"): ("{product} arrived broken, what should I do now?",),
    ("technical", "delivery"): ("The page with my parcel shows nothing but an error since {day}.",),
}
CONDITIONS: dict[str, tuple[str, ...]] = {
    "none": (),
    "diabetes": (
        "I keep my insulin next to it.",
        "I have to plan this around my blood sugar checks.",
        "My glucose sensor needs it.",
    ),
    "pregnancy": (
        "I am due in six weeks and cannot carry much.",
        "My midwife told me to take it easy.",
        "It has to be settled before the baby comes.",
    ),
    "hearing_loss": (
        "Please do not call, my hearing aids do not work with the phone.",
        "I am deaf in one ear, so write to me.",
        "I could not hear the agent on the hotline at all.",
    ),
}
OPENINGS = (
    "Hello, my name is {name}.",
    "Hi, {name} here.",
    "To the support team:",
    "Good morning!",
    "This is the second time I write about this.",
    "I hope you can help me.",
)
DETAILS = (
    "I already tried the hotline and the chat.",
    "It is about {product} from order {order}.",
    "I bought it on {day} together with {product}.",
    "The app and the mail say different things.",
    "I have been a customer in {city} for years and never had to send a complaint.",
    "I paid by card and can send you a photo of the box.",
    "My neighbour had the same thing with a parcel from you.",
    "",
    "",
)
CLOSINGS = (
    "Please write to {email}.",
    "You can call me at {phone}.",
    "Thanks, {name}",
    "Regards, {name}, {phone}",
    "I expect an answer by {day}.",
    "Please check it and tell me at {email} what happens next.",
)
PRODUCTS = (
    *("the headset", "the coffee machine", "the desk lamp", "the tablet", "the backpack", "the router"),
    *("the keyboard", "the winter jacket", "the speaker", "the vacuum cleaner", "the watch", "the printer"),
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")


@dataclass(frozen=True)
class Ticket:
    """One row: the text, its topic (label), its author's health condition (sensitive attribute) and name."""

    text: str
    topic: str
    condition: str
    person: str


def make_tickets(count: int, *, seed: int) -> list[Ticket]:
    """Invents tickets; the same seed gives the same ones.

    >>> ticket = make_tickets(1, seed=0)[0]
    >>> ticket.topic in PROBLEMS, ticket.condition in CONDITIONS
    (True, True)

    Args:
        count: How many.
        seed: Of names, numbers and the choice of sentences.
    """
    fake = Faker("en_US")
    fake.seed_instance(seed)
    rng = random.Random(seed)
    return [_ticket(fake, rng) for _ in range(positive_int(count=count))]


def write_tickets(folder: str | Path, *, num_train: int, num_eval: int, seed: int) -> tuple[Path, Path]:
    """Writes `train.csv` and `eval.csv` with the columns text, topic, condition, person; returns their paths.

    Args:
        folder: Made if it is missing; files of those names are replaced.
        num_train: Rows of train.csv.
        num_eval: Rows of eval.csv, of other invented persons.
        seed: See `make_tickets`.

    Raises:
        StorageError: If the folder cannot be written.
    """
    folder = Path(folder)
    positive_int(num_train=num_train)
    tickets = make_tickets(num_train + positive_int(num_eval=num_eval), seed=seed)
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    train, evaluation = folder / "train.csv", folder / "eval.csv"
    _write_csv(train, tickets[:num_train])
    _write_csv(evaluation, tickets[num_train:])
    return train, evaluation


def _ticket(fake: Faker, rng: random.Random) -> Ticket:
    topic, problem = _problem(rng)
    condition = rng.choice(list(CONDITIONS))
    hints = CONDITIONS[condition]
    hint = rng.choice(hints) if hints and rng.random() < HINT_SHARE else ""
    middle = [problem, rng.choice(DETAILS), hint]
    rng.shuffle(middle)
    sentences = [rng.choice(OPENINGS), *middle, rng.choice(CLOSINGS)]
    person = _person(fake, rng)
    filled = [s.format(product=rng.choice(PRODUCTS), **person) for s in sentences if s]
    return Ticket(" ".join(s[0].upper() + s[1:] for s in filled), topic, condition, person["name"])


def _problem(rng: random.Random) -> tuple[str, str]:
    """A topic and a sentence for it; a vague one fits two topics and gets one of them by chance."""
    if rng.random() < VAGUE_SHARE:
        topics = rng.choice(list(VAGUE))
        return rng.choice(topics), rng.choice(VAGUE[topics])
    topic = rng.choice(list(PROBLEMS))
    return topic, rng.choice(PROBLEMS[topic])


def _person(fake: Faker, rng: random.Random) -> dict[str, str]:
    """What one invented customer would write into a ticket."""
    name: str = fake.name()
    return {
        "name": name,
        "email": f"{name.lower().replace(' ', '.').replace('..', '.')}@{fake.safe_domain_name()}",
        "phone": fake.numerify("(2##) 555-01##"),
        "order": fake.bothify("??-#####").upper(),
        "city": fake.city(),
        "amount": f"${rng.randint(5, 400)}.{rng.randint(0, 99):02d}",
        "day": rng.choice(DAYS),
    }


def _write_csv(path: Path, tickets: list[Ticket]) -> None:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(field.name for field in fields(Ticket))
    writer.writerows(astuple(ticket) for ticket in tickets)
    atomic_write_bytes(path, buffer.getvalue().encode())
