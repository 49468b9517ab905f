"""`examples/gpu_proof.py` without a GPU: the dry run, and runs that hang, fail or are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
sys.path.append(str(EXAMPLES))

from gpu_proof_parts import PARTS, correctness, runner  # noqa: E402


def environment() -> dict[str, str]:
    # the run chooses by itself whether to use the compiled ops
    return {name: value for name, value in os.environ.items() if name != "HF_VTC_OPS"} | {"OMP_NUM_THREADS": "1"}


def proof_command(out: Path, *options: str) -> list[str]:
    return [sys.executable, str(EXAMPLES / "gpu_proof.py"), "--out", str(out), *options]


def read(out: Path) -> dict:
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def statuses(content: dict) -> dict[str, str]:
    return {part["part"]: part["status"] for part in content["parts"]}


def wait_for(condition, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


# ---- the whole


def test_the_boxes_of_all_parts_fit_into_eight_minutes():
    assert sum(part.seconds for part in PARTS) <= 8 * 60
    assert [part.letter for part in PARTS] == list("abcdefgh")


def test_dry_run_goes_through_every_part(compiled_cpu, tmp_path):
    result = subprocess.run(proof_command(tmp_path, "--dry"), env=environment(), capture_output=True, text=True)
    log = (tmp_path / "log.txt").read_text(errors="replace")
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}\n{log[-6000:]}"
    content = read(tmp_path)
    assert content["dry"] and statuses(content) == dict.fromkeys("abcdefgh", "done")
    tables = {part["part"]: Counter(row["table"] for row in part["rows"]) for part in content["parts"]}
    assert tables["a"]["ops against float64, forward and backward"] == 4 * 3 and tables["a"]["opcheck"] == 8
    assert tables["a"]["shipped checkpoints"] == 5 * len(correctness.BUDGETS) * 2
    assert tables["b"] == {"forward": 8, "backward": 8}
    assert tables["c"]["plain transformers"] == tables["c"]["decoding"] == tables["c"]["models"] == 5
    assert tables["d"] == dict.fromkeys(
        ("per prefill", "per decoded token", "where a prefill waits for the device"), 2 * 5
    )
    assert tables["e"] == {"one training step": 5}
    assert tables["f"]["decoding with a static cache"] == 2
    assert tables["g"] == {"control": 1, "compute-sanitizer": 8, "Nsight Compute": 1}
    assert tables["h"] == {"recipes": 7}
    # results are published
    text = (tmp_path / "results.json").read_text() + (tmp_path / "results.md").read_text()
    assert str(ROOT) not in text and sys.prefix not in text
    assert sorted(file.name for file in tmp_path.iterdir()) == ["log.txt", "results.json", "results.md"]


def test_a_run_that_is_killed_leaves_the_parts_that_were_done(compiled_cpu, tmp_path):
    process = subprocess.Popen(proof_command(tmp_path, "--dry", "--parts", "h,g"), env=environment())
    try:
        # whatever their order on the command line
        wait_for(lambda: (tmp_path / "part_h.jsonl").is_file())
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    finally:
        process.kill()
        process.wait()
    content = read(tmp_path)
    assert statuses(content) == {"g": "done", "h": "running"}
    assert len(content["parts"][0]["rows"]) == 10
    assert "| g |" in (tmp_path / "results.md").read_text()
    # nobody is left who computes for nobody
    assert len(workers) == 1
    wait_for(lambda: not Path(f"/proc/{workers[0]}").exists(), 30)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_part_says_so(tmp_path):
    result = subprocess.run(proof_command(tmp_path, "--parts", "g"), env=environment(), capture_output=True, text=True)
    assert result.returncode == 1
    (part,) = read(tmp_path)["parts"]
    assert part["status"] == "failed" and "torch finds no GPU" in part["reason"]


def test_unknown_parts_are_refused(tmp_path):
    result = subprocess.run(proof_command(tmp_path, "--parts", "a,x"), capture_output=True, text=True)
    assert result.returncode == 2 and "must be some of a, b, c" in result.stderr


# ---- the runner, with small parts


class Small(NamedTuple):
    letter: str
    title: str
    seconds: float
    script: str


FINE = 'note({"row": {"table": "t", "name": "fine", "ok": True}}); note({"headline": "all is well"})'
HANG = 'note({"row": {"table": "t", "name": "begun", "ok": None}}); import time; time.sleep(600)'
# a worker that is stuck says where, two seconds before its end, through faulthandler
STUCK = "import faulthandler; faulthandler.dump_traceback_later(0.1)\n" + HANG
CHILD = (
    'import subprocess; child = subprocess.Popen(["sleep", "600"]); note({"row": {"pid": child.pid, "table": "t"}});'
)


NOTE = """
import json, sys
def note(record):
    print(json.dumps(record), file=open(sys.argv[1], "a"), flush=True)
"""


def command_of(part: Small, records: Path, end: float) -> list[str]:
    return [sys.executable, "-c", NOTE + part.script, str(records)]


def facts() -> dict:
    return {"command": "c", "started": "2026-01-02T03:04:05Z", "commit": "f" * 40, "changed_files": [], "dry": False}


def run_small(folder: Path, *parts: Small) -> dict:
    runner.run_parts(parts, command_of, runner.Results(folder, facts()))
    return read(folder)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_hanging_part_is_killed_at_its_box_with_its_children_and_the_next_one_runs(tmp_path):
    start = time.monotonic()
    content = run_small(
        tmp_path, Small("a", "hangs", 1.5, CHILD + STUCK), Small("b", "is fine", 20, FINE), Small("c", "too", 20, FINE)
    )
    assert time.monotonic() - start < 20
    assert statuses(content) == {"a": "killed", "b": "done", "c": "done"}
    killed = content["parts"][0]
    assert killed["reason"].startswith('killed at its time box of 2 s. It was in File "<string>", line')
    assert [row.get("name") for row in killed["rows"]] == [None, "begun"]
    wait_for(lambda: not alive(killed["rows"][0]["pid"]), 5)
    assert content["parts"][1]["headline"] == "all is well"


def test_a_part_that_fails_says_why_and_the_next_one_runs(tmp_path):
    content = run_small(
        tmp_path,
        Small("a", "knows why", 20, 'note({"reason": "no such thing"}); sys.exit(1)'),
        Small("b", "raises", 20, "raise LookupError('nobody home')"),
        Small("c", "crashes", 20, "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
        Small("d", "is fine", 20, FINE),
    )
    assert statuses(content) == {"a": "failed", "b": "failed", "c": "failed", "d": "done"}
    reasons = [part.get("reason") for part in content["parts"]]
    assert reasons[0] == "no such thing"
    assert reasons[1] == "ended with status 1: LookupError: nobody home"
    assert reasons[2].startswith("ended with status -11")


def test_time_that_is_left_over_goes_to_the_next_part_and_no_further(tmp_path):
    content = run_small(tmp_path, Small("a", "", 3, FINE), Small("b", "", 1, FINE), Small("c", "", 0.5, HANG))
    boxes = [part["box_seconds"] for part in content["parts"]]
    assert boxes[0] == 3 and 1 < boxes[1] <= 4 and boxes[1] < boxes[2] + 1
    assert sum(part["seconds"] for part in content["parts"]) < 3 + 1 + 0.5 + 1


def test_a_run_that_is_stopped_ends_its_worker_and_writes_what_it_knows(tmp_path):
    parts = [Small("a", "", 60, FINE), Small("b", "", 60, CHILD + HANG), Small("c", "", 60, FINE)]
    commands = {part.letter: [sys.executable, "-c", NOTE + part.script] for part in parts}
    script = f"""
import sys
from pathlib import Path
from gpu_proof_parts import Part, runner
parts = [Part(letter, "", "", 60) for letter in "abc"]
results = runner.Results(Path(sys.argv[1]), {facts()!r})
runner.run_parts(parts, lambda part, records, end: {commands!r}[part.letter] + [str(records)], results)
"""
    paths = {"PYTHONPATH": str(EXAMPLES)}
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], env=environment() | paths)
    records = tmp_path / "part_b.jsonl"
    wait_for(lambda: records.is_file() and len(runner.read_records(records)) == 2)
    pid = runner.read_records(records)[0]["row"]["pid"]
    assert alive(pid)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) != 0
    content = read(tmp_path)
    assert statuses(content) == {"a": "done", "b": "stopped", "c": "not started"}
    assert [row.get("name") for row in content["parts"][1]["rows"]] == [None, "begun"]
    wait_for(lambda: not alive(pid), 5)


def test_half_a_record_is_left_out(tmp_path):
    file = tmp_path / "records"
    file.write_text('{"row": {"table": "t"}}\n{"row": {"ta')
    assert runner.read_records(file) == [{"row": {"table": "t"}}]
