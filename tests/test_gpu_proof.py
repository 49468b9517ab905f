"""`examples/gpu_proof.py` without a GPU: the dry run, runs that hang, fail or are killed, and the tables."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

import gpu_proof_table  # noqa: E402
import gpu_proof_wheels  # noqa: E402
from gpu_proof_parts import PARTS, correctness, launches, op_cases, runner, sanitizers  # noqa: E402
from gpu_proof_parts.compiled_decoder import bucket_of, padded  # noqa: E402
from gpu_proof_parts.report import NOT_RUN, as_markdown, read_results, readme_table  # noqa: E402
from gpu_proof_parts.work import Proof  # noqa: E402


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


# ---- what parts make of what tools say


def test_attempts_go_on_and_say_why(tmp_path):
    proof = Proof(tmp_path / "records", float("inf"), True)

    def fail():
        raise ValueError("it is\nbroken")

    assert proof.attempt("t", "first", fail) is None
    assert proof.attempt("t", "second", lambda: 3) == 3
    proof.headline("more to say")
    first, headline = runner.read_records(tmp_path / "records")
    assert first["row"] == {"table": "t", "name": "first", "ok": False, "error": "ValueError: it is broken"}
    assert headline == {"headline": "0 of 1 checks hold; more to say"}


def test_work_that_does_not_fit_into_the_time_left_is_not_begun(tmp_path):
    proof = Proof(tmp_path / "records", time.monotonic() + 5, True)
    # a dry run has time
    proof.dry = False
    assert proof.attempt("t", "long", lambda: pytest.fail("was begun"), needs=10) is None
    (record,) = runner.read_records(tmp_path / "records")
    assert record["row"]["ok"] is None and "too little" in record["row"]["not_run"]


def test_builders_run_side_by_side_and_failures_are_told(tmp_path):
    proof = Proof(tmp_path / "records", float("inf"), True)
    commands = {
        "right": [sys.executable, "-c", "print('built')"],
        "wrong": [sys.executable, "-c", "import sys; print('warning: spilled'); sys.exit(1)"],
    }
    correctness.run_builders(proof, commands)
    right, wrong = (record["row"] for record in runner.read_records(tmp_path / "records"))
    assert right["ok"] and right["error"] is None
    assert not wrong["ok"] and wrong["error"] == "warning: spilled\n"


def test_errors_are_shares_of_the_tolerance_and_nan_is_never_right():
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    limit = op_cases.TOLERANCES[torch.float32]
    off = exact + torch.tensor([0.0, limit["atol"] + 2 * limit["rtol"]])
    assert op_cases.worst([exact], [exact], torch.float32, False) == 0
    assert op_cases.worst([off], [exact], torch.float32, False) == pytest.approx(1, rel=1e-3)
    assert op_cases.worst([exact * torch.nan], [exact], torch.float32, False) == float("inf")
    with pytest.raises(AssertionError, match="shape"):
        op_cases.worst([exact[:1]], [exact], torch.float32, False)


def test_answers_are_compared_by_ids_counts_and_logits():
    logits = torch.tensor([[4.0, 2.0]])
    same, other = ([1, 2], logits, [3]), ([1, 5], logits * 1.5, [4])
    assert correctness.compare([same, same], [same, same]) == {
        "questions": 2,
        "ids_equal": 2,
        "counts_equal": 2,
        "logits_to_largest": 0.0,
        "refused": None,
    }
    found = correctness.compare([same, same], [same, other])
    assert (found["ids_equal"], found["counts_equal"], found["logits_to_largest"]) == (1, 1, 0.5)
    assert correctness.compare([same], [([1, 2], logits * torch.nan, [3])])["logits_to_largest"] == float("inf")
    assert correctness.compare(["no such budget"], ["no such budget"])["ids_equal"] == 1
    assert correctness.compare(["no such budget"], [same])["ids_equal"] == 0


def test_traces_are_counted_by_kind():
    events = [
        {"cat": "kernel", "name": "void vtc::combine_rows<float>"},
        {"cat": "kernel", "name": "gemm"},
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD (Pageable -> Device)"},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoH (Device -> Pageable)"},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoD (Device -> Device)"},
        {"cat": "gpu_memset", "name": "Memset (Device)"},
        {"cat": "cuda_runtime", "name": "cudaStreamSynchronize"},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel"},
        {"cat": "cpu_op", "name": "aten::add"},
        {"ph": "M"},
    ]
    assert launches.events_of({"traceEvents": events}) == {
        "kernels": 2,
        "to_device": 1,
        "to_host": 1,
        "on_device": 1,
        "memsets": 1,
        "waits": 1,
        "cpu_ops": 1,
    }


def test_waits_are_named_by_their_line():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.warn_explicit("called a synchronizing CUDA operation", UserWarning, "/x/modeling_vtc.py", 12)
        warnings.warn_explicit("called a synchronizing CUDA operation", UserWarning, "/x/modeling_vtc.py", 12)
        warnings.warn_explicit("something else", UserWarning, "/x/other.py", 3)
    assert launches.places_of(caught) == {"modeling_vtc.py:12": 2}


@pytest.mark.parametrize(
    ("said", "findings"),
    [
        ("========= ERROR SUMMARY: 0 errors\n", 0),
        ("========= Invalid __global__ write\n========= ERROR SUMMARY: 65 errors\n", 65),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0),
        ("========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n", 1),
        ("killed, since the time of the part was up\n", None),
    ],
)
def test_summaries_of_compute_sanitizer_are_read(said, findings):
    assert sanitizers.findings_of(said) == findings


def test_a_sanitizer_that_saw_nothing_is_no_evidence(tmp_path):
    proof = Proof(tmp_path / "records", float("inf"), False)
    sanitizers.report(proof, "segment_mean", "memcheck", "", 0)
    sanitizers.report(proof, "segment_mean", "memcheck", "========= ERROR SUMMARY: 0 errors\n", 0)
    sanitizers.report(proof, "segment_mean", "racecheck", "========= ERROR SUMMARY: 0 errors\n", 1)
    assert [record["row"]["ok"] for record in runner.read_records(tmp_path / "records")] == [False, True, False]


def test_counters_of_nsight_compute_are_read():
    said = (
        "==PROF== Connected to process 1\n"
        '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","void vtc::<unnamed>::combine_rows<__nv_bfloat16>(const T1 *)","gpu__time_duration.sum","ns","1,234"\n'
        '"0","void vtc::<unnamed>::combine_rows<__nv_bfloat16>(const T1 *)",'
        '"dram__throughput.avg.pct_of_peak_sustained_elapsed","%","81.5"\n'
        '"1","void vtc::(anonymous namespace)::normalize_backward<float>(T1)","gpu__time_duration.sum","ns","7"\n'
    )
    assert sanitizers.counters_of(said) == [
        {"kernel": "combine_rows", "nanoseconds": 1234.0, "memory_bandwidth_percent": 81.5},
        {"kernel": "normalize_backward", "nanoseconds": 7.0},
    ]
    assert sanitizers.counters_of("==ERROR== no permission") == []


def test_every_kernel_is_watched():
    sources = (ROOT / "hf_vtc" / "ops" / "csrc" / "cuda").glob("*.cu")
    text = "".join(source.read_text() for source in sources)
    declared = re.findall(r"__launch_bounds__\([^)]*\)\s+(\w+)\(", text)
    assert len(declared) == text.count("__global__") > 5
    assert all(any(kernel in name for kernel in sanitizers.KERNELS) for name in declared)


def test_prompts_are_rounded_up_on_the_right():
    assert [bucket_of(length, 128) for length in (1, 128, 129)] == [128, 128, 256]
    embeds = torch.ones(1, 3, 2)
    assert padded(embeds, 5)[0, :, 0].tolist() == [1, 1, 1, 0, 0]


# ---- tables


def finished(**overrides) -> dict:
    parts = [{"part": part.letter, "title": part.title, "status": "not started", "rows": []} for part in PARTS]
    parts[0] |= {
        "status": "done",
        "headline": "19 of 19 checks hold",
        "rows": [{"table": "t", "name": "n", "ok": True}],
    }
    parts[1] |= {"status": "killed", "reason": "killed at its time box of 75 s.", "rows": [{"table": "t"}] * 3}
    parts[2] |= {"status": "failed", "reason": "OutOfMemoryError: too much"}
    return {**facts(), "machine": {"device": "NVIDIA H100"}, "parts": parts, **overrides}


def test_without_runs_the_readme_says_so_of_every_part():
    lines = readme_table([]).splitlines()[2:]
    assert len(lines) == len(PARTS) and all(line.endswith(f"| {NOT_RUN} |") for line in lines)


def test_the_readme_shows_the_last_run_that_reached_a_part(tmp_path):
    later = finished(started="2026-03-01T00:00:00Z", commit="e" * 40)
    later["parts"] = [{**part, "status": "not started"} for part in later["parts"]]
    later["parts"][1] |= {"status": "done", "headline": "8 of 8 checks hold"}
    (tmp_path / "z.json").write_text(json.dumps(finished()))
    (tmp_path / "a.json").write_text(json.dumps(later))
    header, _, *lines = readme_table(read_results(tmp_path)).splitlines()
    assert header == "| part | shows | NVIDIA H100 |"
    assert lines[0].endswith("| 19 of 19 checks hold ([2026-01-02](docs/results/z.json), ffffffffff) |")
    assert lines[1].endswith("| 8 of 8 checks hold ([2026-03-01](docs/results/a.json), eeeeeeeeee) |")
    assert "FAILED after 0 results (OutOfMemoryError: too much)" in lines[2]
    assert lines[3].endswith(f"| {NOT_RUN} |")


def test_a_dry_run_is_no_result(tmp_path):
    (tmp_path / "dry.json").write_text(json.dumps(finished(dry=True)))
    with pytest.raises(ValueError, match="shows nothing about a GPU"):
        read_results(tmp_path)
    (tmp_path / "dry.json").write_text("[]")
    with pytest.raises(ValueError, match="not a results.json"):
        read_results(tmp_path)


def test_the_readme_shows_the_results_that_are_kept():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert gpu_proof_table.with_table(text, readme_table(read_results(ROOT / "docs" / "results"))) == text
    with pytest.raises(ValueError, match="once each"):
        gpu_proof_table.with_table("no marks", "table")


def test_a_run_as_markdown_names_failures_and_hides_empty_columns():
    rows = [
        {"table": "t", "name": "one", "ok": False, "error": "a | b", "figure": None},
        {"table": "t", "name": "two", "ok": True, "ratio": 0.00012345},
    ]
    text = as_markdown(finished(parts=[{"part": "a", "title": "x", "status": "done", "rows": rows}]))
    assert "| name | ok | error | ratio |" in text
    assert "| one | NO | a \\| b |  |" in text and "| two | yes |  | 1.23e-04 |" in text


# ---- wheels


def write_wheel(folder: Path, name: str, version: str, *requires: str, files: dict[str, str] | None = None) -> Path:
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as content:
        needs = "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
        content.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}\n")
        content.writestr(f"{info}/RECORD", "".join(f"{file},,\n" for file in files or {}))
        for file, text in (files or {}).items():
            content.writestr(file, text)
    return wheel


@pytest.fixture
def index(monkeypatch):
    """A package index in memory: name -> (version, requirements), newest first; returns what was downloaded."""
    packages = {
        "first": [("2.0", ["shared>=1", "torch>=2", "nvidia-cublas", "windows-only; sys_platform == 'win32'"])],
        "second": [("1.0", ["shared<2", "extra-only; extra == 'all'", "there>=1"])],
        "shared": [("2.0", []), ("1.5", ["deep"])],
        "deep": [("0.1", [])],
        "there": [("3.0", [])],
    }
    downloaded = []

    def download(name, specifier, folder, python):
        for wheel in gpu_proof_wheels.wheels_of(name, folder):
            wheel.unlink()
        version, needs = next(each for each in packages[name] if Version(each[0]) in specifier)
        downloaded.append((name, version))
        return write_wheel(folder, name, version, *needs)

    monkeypatch.setattr(gpu_proof_wheels, "download", download)
    monkeypatch.setattr(gpu_proof_wheels, "ROOTS", ("first", "second"))
    return downloaded


def test_wheels_are_those_that_are_needed_and_missing(index, tmp_path):
    installed = {"there": Version("1.2")}
    wheels = gpu_proof_wheels.collect(tmp_path, "3.12", installed)
    # the second package does not take the newest version of what both need
    assert [wheel.name.split("-py3")[0] for wheel in wheels] == ["deep-0.1", "first-2.0", "second-1.0", "shared-1.5"]
    assert len(list(tmp_path.glob("*.whl"))) == 4
    assert ("shared", "2.0") in index


def test_what_is_installed_in_too_old_a_version_is_packed(index, tmp_path):
    freeze = tmp_path / "freeze.txt"
    freeze.write_text("There==0.9\ntorch==2.11.0+cu130\nhere @ file:///somewhere\n")
    installed = gpu_proof_wheels.installed_versions(freeze)
    assert installed == {"there": Version("0.9"), "torch": Version("2.11.0+cu130")}
    assert ("there", "3.0") not in index
    gpu_proof_wheels.collect(tmp_path, "3.12", installed)
    assert ("there", "3.0") in index


def test_bitsandbytes_keeps_the_library_of_one_cuda(tmp_path):
    libraries = {f"bitsandbytes/libbitsandbytes_{kind}.so": kind for kind in ("cuda130", "cuda128", "rocm70", "cpu")}
    wheel = write_wheel(tmp_path, "bitsandbytes", "0.50", files={**libraries, "bitsandbytes/__init__.py": ""})
    with pytest.raises(ValueError, match="no library for CUDA 999"):
        gpu_proof_wheels.keep_one_cuda(wheel, "999")
    gpu_proof_wheels.keep_one_cuda(wheel, "130")
    with zipfile.ZipFile(wheel) as content:
        names = [name for name in content.namelist() if ".dist-info/" not in name]
        recorded = content.read("bitsandbytes-0.50.dist-info/RECORD").decode().splitlines()
    kept = [
        "bitsandbytes/libbitsandbytes_cuda130.so",
        "bitsandbytes/libbitsandbytes_cpu.so",
        "bitsandbytes/__init__.py",
    ]
    assert names == kept and [line.split(",")[0] for line in recorded] == kept
    assert [file.name for file in tmp_path.iterdir()] == [wheel.name]
