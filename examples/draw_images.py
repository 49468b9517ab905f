"""Draw the pages that `hf-vtc run` shows: the first four of the held-out split at seed 7, three questions each.

python examples/draw_images.py
"""

import json
from pathlib import Path

from digit_forms import EVALUATED_KINDS, draw_page, page_rng

FOLDER = Path(__file__).parent / "images"
SEED = 7
NUM_PAGES = 4


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    pages = []
    for index in range(NUM_PAGES):
        rng = page_rng(SEED, "test", index)
        page = draw_page(rng, "test")
        name = f"form_{index + 1}.png"
        page.image.save(FOLDER / name, optimize=True)
        questions = []
        for kind in EVALUATED_KINDS:
            choices = [question for question in page.questions if question.kind == kind]
            question = choices[rng.integers(len(choices))]
            questions.append({"question": question.text, "answer": question.answer, "kind": kind})
        pages.append({"image": name, "questions": questions})
    (FOLDER / "pages.json").write_text(json.dumps(pages, indent=1) + "\n")


if __name__ == "__main__":
    main()
