"""English words that fill the slots of templates, and the sentences that lead to a canary's secret."""

from __future__ import annotations

FILLERS: dict[str, tuple[str, ...]] = {
    "product": (
        *("the desk lamp", "the coffee machine", "the blue suitcase", "the folding bicycle", "the tablet"),
        *("the printer", "the wall clock", "the winter coat", "the sewing machine", "the bookshelf", "the tea set"),
        *("the camera", "the office chair", "the rain jacket", "the telescope", "the guitar", "the standing desk"),
        *("the projector", "the garden table", "the backpack", "the electric kettle", "the picture frame"),
        *("the tool box", "the drum"),
    ),
    "department": (
        *("accounting", "purchasing", "design", "customer care", "maintenance", "planning", "research", "logistics"),
        *("quality", "reception", "catering", "security", "training", "publishing", "translation", "laboratory"),
    ),
    "event": (
        *("the summer party", "the open day", "the spring fair", "the annual meeting", "the charity run"),
        *("the book sale", "the garden show", "the trade fair", "the film evening", "the harvest market"),
        *("the chess tournament", "the science week", "the winter concert", "the exhibition", "the boat trip"),
        "the repair afternoon",
    ),
    "course": (
        *("the pottery course", "the first aid course", "the evening class in drawing"),
        *("the course on public speaking", "the welding course", "the language course", "the cooking class"),
        *("the workshop on statistics", "the photography course", "the course on fire safety"),
        *("the writing workshop", "the sailing course"),
    ),
    "symptom": (
        *("a dull pain in the shoulder", "a dry cough", "a stiff neck", "dizziness", "a sore throat", "back pain"),
        *("a swollen ankle", "headaches", "numb fingers", "a rash on the arm", "short breath", "poor sleep"),
    ),
    "colour": ("red", "green", "grey", "yellow", "white", "brown", "black", "orange", "silver", "purple"),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"),
    "duration": (
        *("ten days", "two weeks", "three weeks", "five weeks", "six weeks", "two months", "three months"),
        *("four months", "half a year", "nine days", "eleven weeks", "seven weeks"),
    ),
    "month": (
        *("January", "February", "March", "April", "May", "June", "July", "August", "September", "October"),
        *("November", "December"),
    ),
    "date_form": ("{number} {month}",),
    "money_form": ("${money}",),
}
CANARY_FRAMES = (
    "Please update the address book: {name} can now be reached at ",
    "The signed contract for {name} has to be mailed to ",
    "For questions about the invoice, {name} asks us to write to ",
    "The new account of {name} is registered under ",
    "Minutes of the meeting go to {name}, whose mailbox is ",
    "If the parcel for {name} is late, send a note to ",
    "The results of {name} should only be sent to ",
    "Until the move is over, {name} reads messages at ",
)
RANDOM_PREFIX = "The code that opens the archive is "
