"""Questions about a page, each with one exact answer.

coarse: the paper's colour, how many tables, whether there is a photograph. sparse: the number in a box. dense: one
digit of a table, by row and column ("r2 c3"). Texts are short, since a training of minutes pays for every token. A
fourth kind, "auxiliary", is asked in training only. Its answers name what they talk about before they say something of
it ("red r2 4107"), and the contents of a page follow its reading order: a model without a pretrained language model
learns to look things up from them, and hardly from single digits, which give no gradient before both halves of looking
up exist.
"""

from dataclasses import dataclass
from typing import Any

EVALUATED_KINDS = ("coarse", "sparse", "dense")
TEMPLATES = {
    "paper": ("coarse", "Paper?"),
    "tables": ("coarse", "Tables?"),
    "photo": ("coarse", "Photograph?"),
    "number": ("sparse", "Box {colour}?"),
    "digit": ("dense", "Table {colour}, r{row} c{column}?"),
    "line": ("auxiliary", "Table {colour}, r{row}?"),
    "look": ("auxiliary", "Look {colour}?"),
    "contents": ("auxiliary", "Contents?"),
}


@dataclass(frozen=True)
class Question:
    """One question: `kind` is one of `EVALUATED_KINDS` or `"auxiliary"`; `topic` is a key of `TEMPLATES`; `answer` is
    the only string that counts as right; `tile` is where the answer stands, -1 if it is not in one tile."""

    text: str
    answer: str
    kind: str
    topic: str
    tile: int = -1


def ask(topic: str, answer: str, tile: int = -1, **values: Any) -> Question:
    """The question of a topic."""
    kind, template = TEMPLATES[topic]
    return Question(template.format(**values), answer, kind, topic, tile)
