"""Draw `examples/finetune_data`: ten records in LLaVA's format that teach a model to sum a form up.

python examples/draw_finetune_data.py

Most have one image and one turn; there are two turns, two images, a system prompt and a row without an image as well.
"""

import json
from pathlib import Path

from digit_forms import draw_page, page_rng
from digit_forms.pages import Page

FOLDER = Path(__file__).parent / "finetune_data"
# no page of any training or evaluation has it
SEED = 77
NUM_PAGES = 10
QUESTION = "Sum up the form."


def summary(page: Page) -> str:
    """The answer that is to be learned: colour, orientation and number of boxes."""
    orientation = "portrait" if page.rows > page.columns else "landscape"
    return f"{page.colour}, {orientation}, {len(page.boxes)}"


def turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def main() -> None:
    (FOLDER / "images").mkdir(parents=True, exist_ok=True)
    pages, names = [], []
    for index in range(NUM_PAGES):
        pages.append(draw_page(page_rng(SEED, "train", index), "train"))
        names.append(f"images/page_{index + 1}.jpg")
        pages[-1].image.save(FOLDER / names[-1], quality=85)
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
    (FOLDER / "records.json").write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
