"""Write the tables of README.md and docs that come from the model cards and from `estimate`.

python examples/report_results.py            # replace the tables
python examples/report_results.py --check    # only say which ones are old

A page says where a table stands by `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

import hf_vtc
from hf_vtc.evaluation.statistics import wilson, z_of
from hf_vtc.report import config_of_shape

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/measured.md", "docs/choose.md")
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)

# which rows of a card's table hold the uncompressed model, the method, and as many tokens chosen by lot
CARD_ROWS = {
    "vico": ("full", "auto", "random tiles"),
    "avg-llava": ("full, 16 per tile", "auto", "as many of each granularity, by lot"),
    "llavolta": ("tuned without compression", "tuned in stages, layer 2, stride 2 (as shipped)", None),
    "vistog": ("uncompressed", "VisToG", "random groups"),
    "convllava": ("`base-tiny`: ViT, tiles of a field each", "this model", None),
}
TITLES = {
    "vico": "ViCO",
    "avg-llava": "AVG-LLaVA",
    "llavolta": "LLaVolta",
    "vistog": "VisToG",
    "convllava": "ConvLLaVA",
}

# of `hf_vtc.report`
SHAPES = ("llava-1.5-7b", "llava-next-7b", "internvl3.5-1b", "internvl3.5-8b")
SHARES = (0.5, 0.25, 0.1)


def card_rows(name: str) -> dict[str, dict[str, str]]:
    """The table of a card that holds accuracies: row -> column -> cell."""
    text = (ROOT / "model_cards" / f"{name}-tiny" / "README.md").read_text(encoding="utf-8")
    lines = [line.strip().strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    lines = [[cell.strip() for cell in line] for line in lines]
    header = next(line for line in lines if "coarse" in line)
    return {line[0]: dict(zip(header[1:], line[1:])) for line in lines if len(line) == len(header) and "%" in line[1]}


def num_questions(name: str) -> int:
    """Of which a card measured shares."""
    text = (ROOT / "model_cards" / f"{name}-tiny" / "README.md").read_text(encoding="utf-8")
    return int(re.search(r"^([\d,]+) held-out questions", text, flags=re.MULTILINE)[1].replace(",", ""))


def with_interval(share: str, num: int) -> str:
    """A share of so many questions, with its 95 % interval by Wilson's formula."""
    value = float(share.removesuffix("%"))
    low, high = (100 * bound for bound in wilson(round(value / 100 * num), num, z_of(0.95, 2)))
    return f"{share} [{low:.1f}, {high:.1f}]"


def results_table() -> str:
    """Per method what its card measured: all tokens, its own choice, and as many tokens chosen by lot."""
    costs = ("visual tokens", "fewer", "as many, by lot")
    header = ("method", "questions", "uncompressed", "compressed", "of the accuracy", *costs)
    rows = []
    for name, (full, own, by_lot) in CARD_ROWS.items():
        table = card_rows(name)
        (tokens,) = [column for column in table[own] if column.startswith("visual tokens")]
        before, after = (float(table[row][tokens]) for row in (full, own))
        accuracy, kept_accuracy = (float(table[row]["all"].removesuffix("%")) for row in (full, own))
        link = f"[{TITLES[name]}]({{to_root}}model_cards/{name}-tiny/README.md)"
        # the card's own figures where it has them, which were rounded once
        shares = [cell for column, cell in table[own].items() if column.startswith("of ")]
        share = shares[0] if shares else f"{100 * kept_accuracy / accuracy:.2f} %"
        fewer = table[own].get("fewer", f"{100 * (1 - after / before):.1f} %")
        chance = table[by_lot]["all"] if by_lot else "-"
        counts = f"{table[full][tokens]} -> {table[own][tokens]}"
        num = num_questions(name)
        scores = (with_interval(table[row]["all"], num) for row in (full, own))
        rows.append((link, f"{num:,}", *scores, share, counts, fewer, chance))
    return _markdown(header, rows)


def ideal_table() -> str:
    """Per base what `estimate` says can be gained at most, arithmetic alone."""
    header = ("base", "visual tokens", *(f"{share:.0%} kept: first token".replace("%", " %") for share in SHARES))
    rows = []
    for name in SHAPES:
        config, shape = config_of_shape(name)
        found = [hf_vtc.estimate(config, shape.image_size, vtc_budget=share) for share in SHARES]
        gains = [f"{each.ttft_speedup:.2f} (prefill {each.prefill_speedup:.2f})" for each in found]
        rows.append((f"`{name}`", str(found[0].num_reserved), *gains))
    return _markdown(header, rows)


def _markdown(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


TABLES: dict[str, Callable[[], str]] = {"results": results_table, "ideal": ideal_table}


def with_tables(page: str, text: str) -> str:
    """The text of a page with its tables as they come out now."""
    to_root = "../" * page.count("/")
    return _TABLE.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]().format(to_root=to_root)}\n\n{found[3]}", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a table is old")
    options = parser.parse_args()
    old_pages = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        new = with_tables(page, text)
        if new != text:
            old_pages.append(page)
            if not options.check:
                (ROOT / page).write_text(new, encoding="utf-8")
    if options.check and old_pages:
        sys.stderr.write(f"{', '.join(old_pages)}: old tables, run python examples/report_results.py\n")
    return int(options.check and bool(old_pages))


if __name__ == "__main__":
    sys.exit(main())
