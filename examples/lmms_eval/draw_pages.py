"""Draw held-out forms and questions about them, one per page, as records for `hf-vtc eval` and for lmms-eval.

    python examples/lmms_eval/draw_pages.py --questions 300 --output outputs/digit_forms
    hf-vtc eval model_cards/vico-tiny --data outputs/digit_forms/held_out.json
    lmms_eval --model hf_vtc --model_args pretrained=model_cards/vico-tiny,vtc_budget=0.5 \\
        --include_path examples/lmms_eval --tasks digit_forms --batch_size 16

With 3,000 questions these are the pages of the model cards, whose generator has the seed 1234.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from digit_forms import evaluation_set  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--output", type=Path, default=Path("outputs/digit_forms"))
    args = parser.parse_args()
    (args.output / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for idx, item in enumerate(evaluation_set(args.questions, args.seed)):
        name = f"images/{idx:05d}.png"
        item.image.save(args.output / name)
        turns = [{"from": "human", "value": f"<image>\n{item.question}"}, {"from": "gpt", "value": item.answer}]
        records.append({"id": f"page-{idx:05d}", "image": name, "conversations": turns, "kind": item.kind})
    file = args.output / "held_out.json"
    file.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    print(file)


if __name__ == "__main__":
    main()
