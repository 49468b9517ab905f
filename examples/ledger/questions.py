"""Questions about a page, each with one exact answer.

coarse: the paper's colour, how many tables, whether there is a photograph. sparse: the digit in a box. dense: one
digit of a table, by its cell, A to P row by row ("Table redG?"). Texts are short, since a training of minutes pays for
every token, and a cell is one word with the colour of its table: what a question looks for is then said in one place.
"""

from dataclasses import dataclass
from typing import Any

EVALUATED_KINDS = ("coarse", "sparse", "dense")
# of a table, row by row
CELLS = "ABCDEFGHIJKLMNOP"
TEMPLATES = {
    "paper": ("coarse", "Paper?"),
    "tables": ("coarse", "Tables?"),
    "photo": ("coarse", "Photograph?"),
    "number": ("sparse", "Box {colour}?"),
    "digit": ("dense", "Table {colour}{cell}?"),
}


@dataclass(frozen=True)
class Question:
    """One question: `kind` is one of `EVALUATED_KINDS`; `topic` is a key of `TEMPLATES`; `answer` is the only string
    that counts as right; `tile` is where the answer stands, -1 if it is not in one tile."""

    text: str
    answer: str
    kind: str
    topic: str
    tile: int = -1


def ask(topic: str, answer: str, tile: int = -1, **values: Any) -> Question:
    """The question of a topic."""
    kind, template = TEMPLATES[topic]
    return Question(template.format(**values), answer, kind, topic, tile)
