"""The window of supported versions, measured: a row for each set of versions, in environments made here.

    python tests/window/run.py                       every row, as a markdown table
    python tests/window/run.py --rows 5.23.0 floors  some of them; a version of transformers that has no row makes one
    python tests/window/run.py --list                what rows there are

Needs the Pythons that the rows name, found on PATH or among pyenv's, and PyPI. Environments are kept in `--folder` and
shared by all rows of one Python and one torch: an eager upgrade takes everything to what the row asks for, so that
nothing depends on the row before.

Each row installs a wheel of this clone and checks

- demo: `hf-vtc run` in an empty folder, right answers to all questions with budget auto;
- checkpoints: ids and logits of every shipped checkpoint against those stored beside this file, which transformers
  5.23.0 gave (`--rows 5.23.0 --record FILE` writes others): equal ids, and the largest difference of a logit;
- exported: the same for folders of `hf-vtc export`, in a process without hf_vtc;
- tests: `pytest -m "window and not slow"`.
"""

import argparse
import configparser
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "model_cards"
CHECK = Path(__file__).with_name("check.py")
EXPECTED = Path(__file__).with_name("expected.safetensors")
# largest difference of a logit in float32 that is still the same answer, a contract of the whole window
TOLERANCE = 1e-5
PYTHON, TORCH = "3.11", "2.13.0"
TRANSFORMERS = ("4.57.6", "5.0.0", "5.5.4", "5.11.0", "5.16.1", "5.19.0", "5.22.2", "5.23.0")
OTHER_PYTHONS = ("3.12", "3.13")
# older ones lose imports of imports of a local folder
EXPORTED_SINCE = "5.11"
PACKAGES = ("transformers", "huggingface-hub", "peft", "torch", "pillow")
CHECKS = ("demo", "checkpoints", "exported", "tests")


class StepFailed(Exception):
    """A step of a row failed; the message says how."""


@dataclass(frozen=True)
class Row:
    """A set of versions: a Python, a torch, what else is pinned, and what tests do without. Everything else is the
    newest that fits."""

    name: str
    python: str = PYTHON
    torch: str = TORCH
    pins: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


@dataclass
class Result:
    """What a row gave: versions, a cell per check, and what went wrong."""

    row: Row
    versions: dict[str, str] = field(default_factory=dict)
    cells: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def name_of(requirement: str) -> str:
    return re.match(r"[\w-]+", requirement)[0]


def setup_options() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def smallest_versions() -> Row:
    """The smallest version of everything that setup.cfg promises, Python included."""
    options = setup_options()["options"]
    floors = dict(re.match(r"([\w-]+)>=([\w.]+)", line).groups() for line in options["install_requires"].split())
    torch = floors.pop("torch")
    pins = tuple(f"{name}=={version}" for name, version in floors.items())
    # TRL asks for more than these, and pip would try all of its versions
    return Row("floors", re.match(r">=([\d.]+)$", options["python_requires"])[1], torch, pins, without=("trl",))


def all_rows() -> dict[str, Row]:
    floors = smallest_versions()
    rows = [Row(version, pins=(f"transformers=={version}",)) for version in TRANSFORMERS]
    rows += [Row("newest"), floors]
    # the newest of everything that a Python takes; the oldest shares an environment with the smallest versions
    rows.append(Row(f"Python {floors.python}", floors.python, floors.torch))
    rows += [Row(f"Python {python}", python) for python in OTHER_PYTHONS]
    return {row.name: row for row in rows}


def chosen_rows(names: Sequence[str]) -> list[Row]:
    rows = all_rows()
    for name in names:
        if re.fullmatch(r"\d+\.\d+\.\d+\w*", name):
            rows.setdefault(name, Row(name, pins=(f"transformers=={name}",)))
        if name not in rows:
            raise SystemExit(f"`--rows`: {name!r} is no row. There are {', '.join(rows)}, and any transformers x.y.z.")
    return [rows[name] for name in names or rows]


def find_python(version: str) -> str:
    """An interpreter of a minor version of Python that can make environments."""
    if f"{sys.version_info.major}.{sys.version_info.minor}" == version:
        return sys.executable
    pyenv = os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv"
    candidates = [shutil.which(f"python{version}"), *sorted(glob.glob(f"{pyenv}/versions/{version}.*/bin/python"))]
    for candidate in filter(None, candidates):
        # pyenv puts a shim on PATH for versions that are not selected too
        if subprocess.run([candidate, "-c", "import ensurepip, venv"], capture_output=True).returncode == 0:
            return candidate
    raise StepFailed(f"there is no Python {version}, neither `python{version}` on PATH nor one of pyenv")


class Environment:
    """The environment of a row, made or reused, with a log of all that ran in it."""

    def __init__(self, row: Row, folder: Path):
        self.row, self.folder = row, folder / f"python{row.python}-torch{row.torch}"
        self.python = self.folder / "bin" / "python"
        self.log = folder / f"{row.name.replace(' ', '-')}.log"
        self.log.write_text("", encoding="utf-8")

    def run(self, *command: object, cwd: Path | None = None, **variables: str) -> str:
        """Standard output of a command, the interpreter of the environment unless it is named, in a clean setting."""
        inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        # what is compared between environments may not depend on a compiler, on the Hub, or on how threads share sums
        clean = {"HF_HUB_OFFLINE": "1", "HF_VTC_OPS": "off", "OMP_NUM_THREADS": "1"}
        clean["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
        result = subprocess.run(
            [str(part) for part in command],
            cwd=cwd or self.folder.parent,
            env={**inherited, **clean, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(map(str, command))}\n{result.stdout}{result.stderr}\n")
        if result.returncode != 0:
            lines = [line for line in (result.stdout + result.stderr).splitlines() if line.strip()]
            raise StepFailed(f"exit status {result.returncode}, {lines[-1] if lines else 'no output'}")
        return result.stdout

    def pip(self, *arguments: object) -> str:
        return self.run(self.python, "-m", "pip", *arguments)

    def install(self, wheel: Path) -> dict[str, str]:
        """Take the environment to the versions of its row, and return those that the table shows."""
        row, options = self.row, setup_options()
        if not self.python.exists():
            self.run(find_python(row.python), "-m", "venv", self.folder)
        # by itself, so that a build of torch that was chosen by its index, such as the one for CPU, stays
        self.pip("install", "--quiet", "--no-compile", f"torch=={row.torch}")
        needed = [*options["options"]["install_requires"].split(), *options["options.extras_require"]["test"].split()]
        # a pin takes the place of a requirement, also of one that it does not meet
        settled = {*map(name_of, row.pins), *row.without}
        needed = [requirement for requirement in needed if name_of(requirement) not in settled]
        eagerly = ("--upgrade", "--upgrade-strategy", "eager")
        self.pip("install", "--quiet", "--no-compile", *eagerly, f"torch=={row.torch}", *row.pins, *needed)
        self.pip("install", "--quiet", "--no-deps", "--force-reinstall", wheel)
        found = json.loads(self.pip("list", "--format", "json"))
        versions = {entry["name"].lower().replace("_", "-"): entry["version"] for entry in found}
        return {name: version for name, version in versions.items() if name in PACKAGES}

    def demo(self, scratch: Path) -> str:
        content = json.loads(self.run(self.python.with_name("hf-vtc"), "run", "--json", cwd=scratch))
        (line,) = [line for line in content["summary"] if line["budget"] == "auto"]
        right = f"{line['num_correct']} of {line['num_marked']}"
        if line["num_correct"] != line["num_marked"]:
            raise StepFailed(f"only {right} answers are right")
        return right

    def checkpoints(self, action: str, expected: Path, models: Path, scratch: Path) -> str:
        modules = str(scratch / "modules")
        text = self.run(self.python, CHECK, action, expected, models, cwd=scratch, HF_MODULES_CACHE=modules)
        content = json.loads(text)
        if content["wrong"] or not content["largest"] <= TOLERANCE:
            raise StepFailed(f"logits differ by up to {content['largest']:.1e}, other ids: {content['wrong']}")
        return f"{content['largest']:.1e}" if content["largest"] else "0"

    def exported(self, expected: Path, transformers: str, scratch: Path) -> str:
        if minor(transformers) < minor(EXPORTED_SINCE):
            return f"from {EXPORTED_SINCE} on"
        self.run(self.python, CHECK, "export", MODELS, scratch / "exported", cwd=scratch)
        return self.checkpoints("remote", expected, scratch / "exported", scratch)

    def tests(self) -> str:
        options = ("-q", "-p", "no:cacheprovider", "-m", "window and not slow")
        text = self.run(self.python, "-m", "pytest", *options, cwd=ROOT, PYTHONPATH=str(ROOT))
        counts = {name: number for number, name in re.findall(r"(\d+) (passed|skipped)\b", text.splitlines()[-1])}
        return ", ".join(f"{number} {name}" for name, number in counts.items())


def minor(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))


def measure(row: Row, wheel: Path, expected: Path, checks: Sequence[str], folder: Path) -> Result:
    """Install a row and run its checks; a check that fails does not stop the next one."""
    result, environment = Result(row), Environment(row, folder)
    with tempfile.TemporaryDirectory(prefix="hf_vtc_window_") as name:
        scratch = Path(name)
        try:
            result.versions = environment.install(wheel)
        except StepFailed as fault:
            result.faults.append(f"{row.name}, install: {fault} (log: {environment.log})")
            return result
        steps = {
            "demo": lambda: environment.demo(scratch),
            "checkpoints": lambda: environment.checkpoints("compare", expected, MODELS, scratch),
            "exported": lambda: environment.exported(expected, result.versions["transformers"], scratch),
            "tests": environment.tests,
        }
        for check in checks:
            try:
                result.cells[check] = steps[check]()
            except StepFailed as fault:
                result.cells[check] = "**fails**"
                result.faults.append(f"{row.name}, {check}: {fault} (log: {environment.log})")
    return result


def table_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def cells_of(result: Result, checks: Sequence[str]) -> list[str]:
    versions = [result.versions.get(name, "**not installed**") for name in PACKAGES]
    return [result.row.name, result.row.python, *versions, *(result.cells.get(check, "") for check in checks)]


def build_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="these alone")
    parser.add_argument("--checks", nargs="+", default=CHECKS, choices=CHECKS, help="these alone")
    parser.add_argument("--folder", type=Path, default=cache / "hf_vtc" / "window", help="of environments and logs")
    parser.add_argument("--expected", type=Path, default=EXPECTED, help="ids and logits to compare with")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write ids and logits of one row, check nothing")
    parser.add_argument("--list", action="store_true", help="print the rows")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    rows = chosen_rows(arguments.rows)
    if arguments.list:
        print("\n".join(f"{row.name}: Python {row.python}, torch=={row.torch} {' '.join(row.pins)}" for row in rows))
        return 0
    if arguments.record and len(rows) != 1:
        raise SystemExit("`--record` takes one row: --rows 5.23.0 --record FILE.")
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="hf_vtc_wheel_") as scratch:
        wheel = build_wheel(Path(scratch))
        if arguments.record:
            environment = Environment(rows[0], folder)
            environment.install(wheel)
            environment.run(environment.python, CHECK, "record", arguments.record.absolute(), MODELS)
            return 0
        print(table_line(("row", "Python", *PACKAGES, *arguments.checks)))
        print(table_line(["---"] * (2 + len(PACKAGES) + len(arguments.checks))), flush=True)
        faults = []
        for row in rows:
            result = measure(row, wheel, arguments.expected.absolute(), arguments.checks, folder)
            print(table_line(cells_of(result, arguments.checks)), flush=True)
            faults += result.faults
    print("\n".join(faults), file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
