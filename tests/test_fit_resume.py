"""Fits that SIGKILL ended: the same command goes on with what is there, and comes to the same weights bit for bit."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fit_samples import differing, small_request, weights_of, write_records
from fit_worker import METHOD, MOMENTS

from hf_vtc.fit import fit

TESTS = Path(__file__).resolve().parent
# what is there when a fit has died
THERE = {
    "converting": (),
    "starting": ("fit/stages/0_drawn/config.json",),
    "splitting": ("fit/held_out.jsonl",),
    "before": ("fit/split.json", "fit/before/samples.jsonl"),
    "first_stage": ("fit/before/report.json", "fit/stages/1_vico_consistency/checkpoint-2/complete"),
    "first_saved": ("fit/stages/1_vico_consistency/checkpoint-3/complete", "fit/stages/1_vico_consistency/saving"),
    "between_stages": ("fit/stages/1_vico_consistency/model/config.json",),
    "second_stage": ("fit/stages/2_vico_router/checkpoint-2/complete",),
    "after": ("fit/stages/2_vico_router/model/config.json", "fit/after/samples.jsonl"),
    "card": ("fit/after/report.json",),
    "publishing": ("fit/result/config.json",),
}
# and what is not, since it appears as a whole or not at all
ABSENT = {
    "converting": ("fit/split.json",),
    "starting": ("fit/stages/0_start", "fit/split.json"),
    "splitting": ("fit/stages/0_drawn", "fit/split.json"),
    "before": ("fit/before/report.json", "fit/stages/1_vico_consistency"),
    "first_stage": ("fit/stages/1_vico_consistency/model", "fit/stages/1_vico_consistency/checkpoint-3"),
    "first_saved": ("fit/stages/1_vico_consistency/model",),
    "between_stages": ("fit/stages/2_vico_router",),
    "second_stage": ("fit/stages/2_vico_router/model",),
    "after": ("fit/after/report.json",),
    "card": ("fit/result",),
    "publishing": (),
}


# a stage that had taken its last step takes it again: from that checkpoint transformers would take one more
FROM_CHECKPOINT = {"first_stage", "first_saved", "second_stage"}


@pytest.fixture(scope="module")
def start():
    return TESTS.parent / "model_cards" / "base-tiny"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(start, data, tmp_path_factory):
    """A fit that nothing has ended."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    return folder, fit(small_request(start, data, folder, METHOD))


@pytest.fixture(scope="module")
def killed(start, data, tmp_path_factory):
    """A folder with what a fit had left when it died, for each moment."""
    folder = tmp_path_factory.mktemp("killed")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS)))}
    command = [sys.executable, str(TESTS / "fit_worker.py"), str(start), str(data), str(folder)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    return folder


def answers_in(folder: Path) -> list[dict]:
    lines = map(json.loads, (folder / "samples.jsonl").read_text().splitlines())
    return sorted(lines, key=lambda line: (line["key"], line["point"]))


def losses_in(stage: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((stage / "log.json").read_text()) if "loss" in entry]


def test_every_moment_is_tested():
    assert set(MOMENTS) == set(THERE) == set(ABSENT)


@pytest.mark.slow
@pytest.mark.parametrize("moment", sorted(THERE))
def test_a_fit_goes_on_where_it_was(killed, whole, start, data, moment):
    output, (expected, measured) = killed / "out", whole
    shutil.rmtree(output)
    shutil.copytree(killed / moment, output)
    assert all((output / place).exists() for place in THERE[moment])
    assert not any((output / place).exists() for place in ABSENT[moment])
    # a folder without its config is no model to anybody
    assert not (output / "config.json").exists()
    lines = []
    again = fit(small_request(start, data, output, METHOD), lines.append)
    assert lines[0] == f"{output}: goes on with what is there"
    assert ("goes on from checkpoint-2" in "\n".join(lines)) == (moment in FROM_CHECKPOINT)
    assert differing(weights_of(output), weights_of(expected)) == set()
    for stage in ("1_vico_consistency", "2_vico_router"):
        assert losses_in(output / "fit" / "stages" / stage) == losses_in(expected / "fit" / "stages" / stage)
    for part in ("before", "after"):
        # each question once, and the same answer
        assert answers_in(output / "fit" / part) == answers_in(expected / "fit" / part)
    assert [row["score"] for row in again.after["rows"]] == [row["score"] for row in measured.after["rows"]]
    for name in ("held_out.jsonl", "split.json"):
        assert (output / "fit" / name).read_bytes() == (expected / "fit" / name).read_bytes()
    assert {path.name for path in output.iterdir()} == {path.name for path in expected.iterdir()}
    assert not list(output.rglob("checkpoint-*")) and not (output / "fit" / "result").exists()
