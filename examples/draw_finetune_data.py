"""Draw records in LLaVA's format: `examples/finetune_data`, or as many as a fit of a tiny model needs.

    python examples/draw_finetune_data.py
    python examples/draw_finetune_data.py --pages 500 --output outputs/forms

Without options: ten records that teach a model to sum a form up. Most have one image and one turn; there are two
turns, two images, a system prompt and a row without an image as well.

With `--pages` every page is one conversation of up to eight turns that the shipped base can hold. All of them train;
an evaluation asks for the last one, whose kind is also a field of the record: kinds are reported apart. No turn tells
the answer to the last.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from digit_forms import BOX_COLOURS, EVALUATED_KINDS, Question, draw_page, page_rng
from digit_forms.pages import Page

FOLDER = Path(__file__).parent / "finetune_data"
# no page of any training or evaluation has them
SEED, SEED_OF_MANY = 77, 770
NUM_PAGES = 10
MOST_TURNS = 8
QUESTION = "Sum up the form."


def summary(page: Page) -> str:
    """The answer that is to be learned: colour, orientation and number of boxes."""
    orientation = "portrait" if page.rows > page.columns else "landscape"
    return f"{page.colour}, {orientation}, {len(page.boxes)}"


def turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def told(question: Question) -> set[str]:
    """The boxes that a question or its answer names, by colour or place."""
    text = f"{question.text} {question.answer}"
    return {colour for colour in BOX_COLOURS if colour in text} | set(re.findall(r"row \d+, column \d+", text))


def write(folder: Path, records: list[dict[str, Any]]) -> None:
    (folder / "records.json").write_text(json.dumps(records, indent=1) + "\n")


def draw_sample(folder: Path) -> None:
    """Ten records of several shapes."""
    pages, names = [], []
    for index in range(NUM_PAGES):
        pages.append(draw_page(page_rng(SEED, "train", index), "train"))
        names.append(f"images/page_{index + 1}.jpg")
        pages[-1].image.save(folder / names[-1], quality=85)
    records = [
        {"image": name, "conversations": turn(f"<image>\n{QUESTION}", summary(page))}
        for name, page in zip(names[:6], pages, strict=False)
    ]
    # the image may stand at the end, as in half of LLaVA's data
    records[1]["conversations"][0]["value"] = f"{QUESTION}\n<image>"
    records[2]["conversations"] += turn("How many boxes are on the page?", str(len(pages[2].boxes)))
    system = {"from": "system", "value": "Answer in a few words."}
    records.append({"image": names[6], "conversations": [system, *turn(f"<image>\n{QUESTION}", summary(pages[6]))]})
    records.append(
        {
            "image": names[7:9],
            "conversations": turn("<image>\n<image>\nSum up the second form.", summary(pages[8])),
        }
    )
    records.append({"conversations": turn("Does a summary name the colour?", "yes")})
    records.append({"image": [names[9]], "conversations": turn(f"<image>\n{QUESTION}", summary(pages[9]))})
    for index, record in enumerate(records):
        record["id"] = f"form_{index + 1}"
    write(folder, records)


def draw_many(folder: Path, num_pages: int) -> None:
    """A conversation about every page, the kinds of its last question in turn."""
    records = []
    for index in range(num_pages):
        rng = page_rng(SEED_OF_MANY, "train", index)
        page, name = draw_page(rng, "train"), f"images/page_{index + 1}.png"
        page.image.save(folder / name)
        kind = EVALUATED_KINDS[index % len(EVALUATED_KINDS)]
        asked = [question for question in page.questions if question.kind in EVALUATED_KINDS]
        asked = [asked[choice] for choice in rng.permutation(len(asked))]
        last = next(question for question in asked if question.kind == kind)
        # turns before it are shown with their answers, which must not hold its own
        others = [question for question in asked if question.topic != last.topic and not told(question) & told(last)]
        asked = [*others[: MOST_TURNS - 1], last]
        messages = [message for question in asked for message in turn(question.text, question.answer)]
        messages[0]["value"] = f"<image>\n{messages[0]['value']}"
        records.append({"id": f"page_{index + 1}", "image": name, "kind": kind, "conversations": messages})
    write(folder, records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, help="draw so many pages, a conversation about each")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder to write")
    args = parser.parse_args()
    if args.pages is not None and args.output == FOLDER:
        parser.error("--pages needs an --output of its own")
    (args.output / "images").mkdir(parents=True, exist_ok=True)
    if args.pages is None:
        draw_sample(args.output)
    else:
        draw_many(args.output, args.pages)


if __name__ == "__main__":
    main()
