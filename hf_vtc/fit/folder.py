"""The output folder of a fit: what is done in it is there under its name, and what is not is not.

my-vico/                    the result: weights, processor, code and card
my-vico/fit/settings.json   what was asked for
my-vico/fit/split.json      which records are kept aside, and the hashes of their images
my-vico/fit/held_out.jsonl  those records, as data for `hf-vtc eval`
my-vico/fit/before, after   the two evaluations
my-vico/fit/stages/         models between the stages, logs, and the checkpoints of a stage under way
"""

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..files import locked, read_json

# of an evaluation, when it is done
REPORT = "report.json"
# settings that decide what training starts from
_OF_CONVERSION = {"model", "model_files", "method", "config", "vision_tower", "seed"}
# settings that decide what is asked, and how it is judged, at the end
_OF_EVALUATION = {"budgets", "tolerance", "relative"}
_POLL_SECONDS = 0.5


class FitFolder:
    """Places in the output folder of a fit.

    Args:
        output (`Path`): the folder.
    """

    def __init__(self, output: Path):
        self.output = output
        self.own = output / "fit"
        self.settings = self.own / "settings.json"
        self.split = self.own / "split.json"
        self.held_out = self.own / "held_out.jsonl"
        self.before, self.after = self.own / "before", self.own / "after"
        self.start = self.own / "stages" / "0_start"
        # the same as it is converted
        self.drawn = self.own / "stages" / "0_drawn"
        # complete, but not yet where users look for it
        self.result = self.own / "result"

    def stage(self, idx: int, name: str) -> Path:
        """The folder of a stage, counted from 1."""
        return self.own / "stages" / f"{idx}_{name}"

    @property
    def is_finished(self) -> bool:
        """Whether the result is there as a whole; its config comes last."""
        return (self.output / "config.json").is_file()

    def adopt(self, settings: Mapping[str, Any]) -> bool:
        """Begin, or go on with what was begun with the same settings; whether it goes on.

        Settings on which nothing depends that is done may be others than before: after a bad record the data is
        mended, and after a budget that some image does not admit another one is named.

        Args:
            settings (`Mapping`): what the result depends on, ready for JSON.

        Raises:
            ValueError: the folder holds a fit with other settings.
            FileExistsError: it holds something else.
        """
        # as they come back from a file
        settings = json.loads(json.dumps(settings))
        if self.settings.is_file():
            before = read_json(self.settings)
            for name in sorted(self._settled({*before, *settings})):
                if before.get(name) != settings.get(name):
                    raise ValueError(
                        f"`output` {self.output} holds a fit with other settings: "
                        f"{_difference(name, before.get(name), settings.get(name))}. Give another folder, or remove "
                        "this one to begin anew."
                    )
            if settings != before:
                write_whole(self.settings, json.dumps(settings, indent=1) + "\n")
            return True
        if self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir())):
            raise FileExistsError(f"`output` {self.output} holds something that is no fit. Give another folder.")
        self.own.mkdir(parents=True, exist_ok=True)
        write_whole(self.settings, json.dumps(settings, indent=1) + "\n")
        return False

    def _settled(self, names: set[str]) -> set[str]:
        """Those settings on which something depends that is done."""
        if self.split.is_file():
            return names - (set() if (self.after / REPORT).is_file() else _OF_EVALUATION)
        return names & _OF_CONVERSION if self.start.exists() else set()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder for this run, which ends with the process at the latest.

        Raises:
            RuntimeError: another run works in it.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self.output, wait=False))
            except BlockingIOError as error:
                raise RuntimeError(
                    f"Another run works in `output` {self.output}. Wait for its end, or end it."
                ) from error
            except OSError:
                # this file system has no locks
                pass
            yield

    def publish(self) -> None:
        """Move the result to where users look for it, its config last; a part that has moved already is left."""
        for path in sorted(self.result.iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, self.output / path.name)
        self.result.rmdir()


def write_whole(file: Path, text: str) -> None:
    """Write a file that is there as a whole or not at all."""
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


def empty_folder(folder: Path) -> Path:
    """A folder without what an earlier run has left there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def wait_for(path: Path) -> None:
    """Wait until another process of the run has made something.

    No collective operation, which gives up after minutes: converting and evaluating a large model takes longer. If
    the other process fails, the launcher ends this one.
    """
    while not path.exists():
        time.sleep(_POLL_SECONDS)


def _difference(name: str, before: Any, now: Any) -> str:
    """Where two settings part, at the depth where they do."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        part = next(part for part in sorted({*before, *now}) if before.get(part) != now.get(part))
        return _difference(f"{name}.{part}", before.get(part), now.get(part))
    return f"{name} was {before!r} and is {now!r} now"
