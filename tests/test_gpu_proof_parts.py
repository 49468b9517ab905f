"""What the parts of `examples/gpu_proof.py` make of what they measure and of what tools say, without a GPU."""

import os
import re
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "examples"))

from gpu_proof_parts import correctness, launches, op_cases, runner, sanitizers  # noqa: E402
from gpu_proof_parts.compiled_decoder import bucket_of, padded  # noqa: E402
from gpu_proof_parts.work import Proof  # noqa: E402


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


TOOLS = {
    "nvcc": 'for last; do :; done; printf "#!/bin/sh\\n" > "$last"; chmod +x "$last"',
    "compute-sanitizer": """
echo "$@" >> "$0.calls"
[ "$PYTORCH_NO_CUDA_MEMORY_CACHING" = 1 ] || exit 3
for last; do :; done
case "$2 $last" in
    "memcheck m") echo "========= ERROR SUMMARY: 1 error"; exit 99;;
    "racecheck r") echo "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)"; exit 99;;
    memcheck*) echo "========= ERROR SUMMARY: 0 errors";;
    *) echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)";;
esac""",
    "ncu": """
echo "$@" >> "$0.calls"
echo '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
echo '"0","void vtc::walk_pyramid<float>(T1 *)","gpu__time_duration.sum","ns","5120"'""",
}


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A CUDA toolkit that answers as the real one, and a device that it would run on."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name, script in TOOLS.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(sanitizers, "architecture", lambda proof: "90")
    return folder


def test_kernels_are_watched_by_the_tools_and_a_control_by_the_same(tools, tmp_path):
    proof = Proof(tmp_path / "records", time.monotonic() + 60, False)
    sanitizers.run(proof)
    rows = [record["row"] for record in runner.read_records(tmp_path / "records") if "row" in record]
    assert [row for row in rows if row["ok"] is False] == []
    findings = {row["name"]: row["findings"] for row in rows if row["table"] == "control"}
    assert findings == {
        "memcheck, with a fault": 1,
        "memcheck, without a fault": 0,
        "racecheck, with a fault": 2,
        "racecheck, without a fault": 0,
    }
    assert sum(row["table"] == "compute-sanitizer" for row in rows) == len(op_cases.OPS) * len(sanitizers.TOOLS)
    assert rows[-1] == {"table": "Nsight Compute", "name": "walk_pyramid", "ok": None, "nanoseconds": 5120.0}
    calls = (tools / "compute-sanitizer.calls").read_text().splitlines()
    # one filter for the control and for the ops
    assert len(calls) == 12 and all("--kernel-name kernel_substring=3vtc" in call for call in calls)
    (call,) = (tools / "ncu.calls").read_text().splitlines()
    assert "--clock-control none" in call and call.endswith("-m gpu_proof_parts.op_once")


def test_a_sanitizer_that_finds_no_planted_fault_fails_the_control(tools, tmp_path):
    (tools / "compute-sanitizer").write_text('#!/bin/sh\necho "========= ERROR SUMMARY: 0 errors"\n')
    proof = Proof(tmp_path / "records", time.monotonic() + 60, False)
    sanitizers.check_control(proof, tmp_path)
    rows = [record["row"] for record in runner.read_records(tmp_path / "records")]
    assert {row["name"]: row["ok"] for row in rows} == {
        "memcheck, with a fault": False,
        "memcheck, without a fault": True,
        "racecheck, with a fault": False,
        "racecheck, without a fault": True,
    }


def test_a_tool_that_is_missing_fails_its_rows(tools, tmp_path):
    (tools / "compute-sanitizer").unlink()
    proof = Proof(tmp_path / "records", time.monotonic() + 60, False)
    sanitizers.sanitize(proof)
    rows = [record["row"] for record in runner.read_records(tmp_path / "records")]
    assert len(rows) == 8 and all(row["ok"] is False and "not on the PATH" in row["error"] for row in rows)
