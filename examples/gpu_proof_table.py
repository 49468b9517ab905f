"""Write the table of GPU results in docs/gpu.md from the runs in docs/results.

python examples/gpu_proof_table.py            # replace the table
python examples/gpu_proof_table.py --check    # only say whether it is up to date
"""

import argparse
import sys
from pathlib import Path

from gpu_proof_parts.report import read_results, results_table

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- gpu results: examples/gpu_proof_table.py -->", "<!-- end of gpu results -->"


def with_table(text: str, table: str) -> str:
    """A text whose table is replaced.

    Raises:
        ValueError: the marks between which it stands are not there once each, in this order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"docs/gpu.md must hold the lines {BEGIN!r} and {END!r} once each, in this order.")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.partition(END)[2]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if the table is old")
    options = parser.parse_args()
    page = ROOT / "docs" / "gpu.md"
    old = page.read_text(encoding="utf-8")
    new = with_table(old, results_table(read_results(ROOT / "docs" / "results")))
    if options.check:
        if new != old:
            sys.stderr.write("docs/gpu.md does not show docs/results: run examples/gpu_proof_table.py\n")
        return int(new != old)
    page.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
