"""Questions about a form, in three kinds, each with one exact answer.

coarse: page colour, orientation. middling: how many boxes, where is one, which colour is one. fine: read a number.

A fourth kind, "auxiliary", is asked in training only: the transcription of the whole page, and answers that name what
they talk about before they say something of it ("red 47"). A model without a pretrained language model learns to look
things up from the latter: "find the colour in the question" and "find it on the page" are then two predictions, and
not one that gives no gradient before both halves exist.
"""

from dataclasses import dataclass

import numpy as np

EVALUATED_KINDS = ("coarse", "middling", "fine")

TEMPLATES = {
    "page_colour": ("What colour is the page?", "Which colour is the paper?", "What is the colour of this form?"),
    "orientation": (
        "Is the page portrait or landscape?",
        "Is this form in portrait or landscape format?",
        "What is the orientation of the page?",
    ),
    "count": ("How many boxes are on the page?", "How many boxes does the form have?", "Count the boxes."),
    "where": (
        "Where is the {colour} box?",
        "In which row and column is the {colour} box?",
        "What is the position of the {colour} box?",
    ),
    "box_colour": (
        "What colour is the box in row {row}, column {column}?",
        "Which colour has the box in row {row}, column {column}?",
    ),
    "is_box": ("Is there a box in row {row}, column {column}?", "Does row {row}, column {column} hold a box?"),
    "number": (
        "What number is in the {colour} box?",
        "Which number is written in the {colour} box?",
        "Read the number in the {colour} box.",
    ),
    "read_box": ("Read the {colour} box.", "Tell me about the {colour} box."),
    "find_box": ("Find the {colour} box.", "Locate the {colour} box."),
    "describe_field": ("Describe row {row}, column {column}.", "What is in row {row}, column {column}?"),
    "transcription": ("Read all boxes.", "Transcribe the page.", "What is written on the form?"),
}
KINDS = {
    "page_colour": "coarse",
    "orientation": "coarse",
    "count": "middling",
    "where": "middling",
    "box_colour": "middling",
    "is_box": "middling",
    "number": "fine",
    "read_box": "auxiliary",
    "find_box": "auxiliary",
    "describe_field": "auxiliary",
    "transcription": "auxiliary",
}


@dataclass(frozen=True)
class Question:
    """One question about a page.

    `kind` is `"coarse"`, `"middling"`, `"fine"` or `"auxiliary"`; `topic` is a key of `TEMPLATES`; `answer` is the
    only string that counts as right.
    """

    text: str
    answer: str
    kind: str
    topic: str


def ask_all(rng: np.random.Generator, page_colour: str, rows: int, columns: int, boxes: list) -> list[Question]:
    """Every question that a page can answer, one wording each, transcription last.

    Args:
        rng (`np.random.Generator`): picks the wordings and the field of a negative `is_box` question.
        page_colour (`str`): name of the tint of the paper.
        rows (`int`), columns (`int`): fields of the form.
        boxes (`list[Box]`): in reading order.
    """
    questions = []

    def ask(topic: str, answer: str, **values) -> None:
        wordings = TEMPLATES[topic]
        text = wordings[rng.integers(len(wordings))].format(**values)
        questions.append(Question(text, answer, KINDS[topic], topic))

    ask("page_colour", page_colour)
    ask("orientation", "portrait" if rows > columns else "landscape")
    ask("count", str(len(boxes)))
    for box in boxes:
        place = {"row": box.row + 1, "column": box.column + 1}
        ask("where", f"row {box.row + 1}, column {box.column + 1}", colour=box.colour)
        ask("box_colour", box.colour, **place)
        ask("number", box.number, colour=box.colour)
        ask("read_box", f"{box.colour} {box.number}", colour=box.colour)
        ask("find_box", f"{box.colour} row {box.row + 1}, column {box.column + 1}", colour=box.colour)
        ask("describe_field", f"row {box.row + 1}, column {box.column + 1} {box.colour}", **place)
    taken = {(box.row, box.column) for box in boxes}
    free = [(row, column) for row in range(rows) for column in range(columns) if (row, column) not in taken]
    box = boxes[rng.integers(len(boxes))]
    row, column = free[rng.integers(len(free))]
    ask("is_box", "yes", row=box.row + 1, column=box.column + 1)
    ask("is_box", "no", row=row + 1, column=column + 1)
    ask("describe_field", f"row {row + 1}, column {column + 1} empty", row=row + 1, column=column + 1)
    ask("transcription", ", ".join(f"{box.colour} {box.number}" for box in boxes))
    return questions
