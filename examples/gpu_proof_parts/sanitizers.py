"""Part g: every kernel under compute-sanitizer (memcheck, racecheck), and what Nsight Compute reads of it.

A tool that finds nothing may have looked at nothing: both must find the faults of a small program that has them.
"""

import csv
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_vtc.ops.build import find_nvcc

from . import op_once
from .op_cases import OPS
from .work import Proof

TOOLS = ("memcheck", "racecheck")
# our kernels lie in this namespace, and so do those of the control, so that the same filter must let both through
_FILTER = "kernel_substring=3vtc"
# of Nsight Compute, whose filter knows functions by their bare name
KERNELS = (
    "combine_rows",
    "normalize",
    "affine_partial",
    "affine_total",
    "walk_pyramid",
    "choose_groups",
    "group_mean",
)
_KERNEL = re.compile(f"(?:{'|'.join(KERNELS)})(?:_backward)?")
_METRICS = {
    "gpu__time_duration.sum": "nanoseconds",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory_bandwidth_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
}
_SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error)|(?:RACECHECK SUMMARY: (\d+) hazard)")

CONTROL = r"""
#include <cstdio>
namespace vtc {
template <typename T>
__global__ void control(T* out, int n, int shift, bool barrier) {
  __shared__ T shared[64];
  shared[threadIdx.x] = static_cast<T>(threadIdx.x);
  if (barrier) __syncthreads();
  const T other = shared[63 - threadIdx.x];
  if (static_cast<int>(threadIdx.x) < n) out[threadIdx.x + shift] = other;
}
}  // namespace vtc
int main(int argc, char** argv) {
  const bool beyond = argc > 1 && argv[1][0] == 'm', race = argc > 1 && argv[1][0] == 'r';
  float* out = nullptr;
  if (cudaMalloc(&out, 64 * sizeof(float)) != cudaSuccess) return 3;
  vtc::control<float><<<1, 64>>>(out, 64, beyond ? 1 : 0, !race);
  const cudaError_t error = cudaDeviceSynchronize();
  std::printf("%s\n", cudaGetErrorString(error));
  return 0;
}
"""


def run(proof: Proof) -> None:
    with tempfile.TemporaryDirectory() as folder:
        proof.attempt("control", "planted faults", lambda: check_control(proof, Path(folder)), needs=10)
    sanitize(proof)
    proof.attempt("Nsight Compute", "kernels", lambda: read_counters(proof), needs=8)
    proof.headline()


def find_tool(name: str) -> str | None:
    """A tool of the CUDA toolkit, on the PATH or beside nvcc."""
    nvcc = find_nvcc()
    beside = [] if nvcc is None else [str(Path(nvcc).resolve().parent)]
    # where NVIDIA's installers put them
    usual = ["/usr/local/cuda/bin", *map(str, sorted(Path("/opt/nvidia/nsight-compute").glob("*"), reverse=True))]
    return shutil.which(name) or shutil.which(name, path=":".join([*beside, *usual]))


def sanitizer_command(tool: str, command: Sequence[str], option: str = "--kernel-name") -> list[str]:
    """A command under one tool; errors of the tool become the status 99.

    Raises:
        FileNotFoundError: there is no compute-sanitizer.
    """
    program = find_tool("compute-sanitizer")
    if program is None:
        raise FileNotFoundError("compute-sanitizer is not on the PATH, nor beside nvcc")
    return [program, "--tool", tool, "--error-exitcode", "99", option, _FILTER, *command]


def findings_of(said: str) -> int | None:
    """How many errors or hazards a tool counted, None if it came to no summary."""
    found = _SUMMARY.findall(said)
    return int(found[-1][0] or found[-1][1]) if found else None


class Started:
    """A process whose output goes to a file: what it leaves running cannot hold up who reads it."""

    def __init__(self, command: Sequence[str]):
        self.output = tempfile.TemporaryFile("w+", errors="replace")
        # else torch lays tensors side by side into large allocations, and what reads beyond one finds another
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        self.process = subprocess.Popen(command, stdout=self.output, stderr=subprocess.STDOUT, env=environment)

    def finish(self, proof: Proof) -> str:
        """What it said; it is killed when the part's time is nearly up."""
        late = ""
        try:
            self.process.wait(max(1.0, min(proof.left - 2, 600.0)))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            late = "killed, since the time of the part was up\n"
        self.output.seek(0)
        said = self.output.read() + late
        self.output.close()
        sys.stdout.write(said)
        return said


def check_control(proof: Proof, folder: Path) -> None:
    """Both tools on a program without a fault and with one of their kind."""
    source, program = folder / "control.cu", folder / "control"
    source.write_text(CONTROL, encoding="utf-8")
    nvcc = find_nvcc()
    if nvcc is None:
        if proof.dry:
            return proof.skip("control", "planted faults", "there is no nvcc here")
        raise FileNotFoundError("there is no nvcc")
    capability = architecture(proof)
    subprocess.run([nvcc, f"-arch=sm_{capability}", "-lineinfo", str(source), "-o", str(program)], check=True)
    if proof.dry:
        return proof.skip("control", "planted faults", "a dry run has no GPU to run it on")
    running = {
        (tool, fault): Started(sanitizer_command(tool, [str(program), *([tool[0]] if fault else [])]))
        for tool in TOOLS
        for fault in (True, False)
    }
    for (tool, fault), started in running.items():
        findings = findings_of(started.finish(proof))
        right = findings is not None and (findings > 0) == fault
        proof.record("control", f"{tool}, {'with' if fault else 'without'} a fault", right, findings=findings)
    return None


def architecture(proof: Proof) -> str:
    import torch

    return "90" if proof.dry else "".join(map(str, torch.cuda.get_device_capability()))


def cases_command(op: str, records: Path) -> list[str]:
    """The awkward cases of one op, small shapes all of them."""
    command = [sys.executable, "-m", "gpu_proof_parts.op_cases", "--device", "cuda", "--ops", op, "--only-cases"]
    return [*command, "--dtypes", "float32", "bfloat16", "--records", str(records)]


def sanitize(proof: Proof) -> None:
    """Every op under every tool, side by side."""
    with tempfile.TemporaryDirectory() as folder:
        running = {}
        for op in OPS:
            for tool in TOOLS:
                command = cases_command(op, Path(folder) / f"{op}-{tool}.jsonl")
                try:
                    # part a runs these cases in a dry run, too
                    command = [sys.executable, "-c", ""] if proof.dry else sanitizer_command(tool, command)
                except FileNotFoundError as missing:
                    proof.record("compute-sanitizer", f"{op}, {tool}", ok=False, error=str(missing))
                    continue
                running[op, tool] = Started(command)
        for (op, tool), started in running.items():
            report(proof, op, tool, started.finish(proof), started.process.returncode)


def report(proof: Proof, op: str, tool: str, said: str, status: int) -> None:
    """One row: what the tool found, and whether the cases were right under it."""
    findings = findings_of(said)
    if proof.dry:
        return proof.skip("compute-sanitizer", f"{op}, {tool}", "a dry run has no GPU")
    complaints = (line.strip("= ") for line in said.splitlines() if re.search(r"Invalid|Race reported|Error:", line))
    first = next(complaints, "")
    proof.record(
        "compute-sanitizer",
        f"{op}, {tool}",
        ok=findings == 0 and status == 0,
        findings=findings,
        status=status,
        first=first[:300] or None,
    )
    return None


# ---- Nsight Compute


def counters_of(said: str) -> list[dict[str, Any]]:
    """Rows of the CSV that Nsight Compute prints, one per kernel, in the order of launches."""
    lines = said.splitlines()
    begin = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        return []
    kernels: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[begin:]))):
        name, value = row.get("Metric Name"), row.get("Metric Value")
        if name in _METRICS and value:
            known = _KERNEL.search(row["Kernel Name"])
            kernel = kernels.setdefault(row["ID"], {"kernel": known[0] if known else row["Kernel Name"]})
            kernel[_METRICS[name]] = float(value.replace(",", ""))
    return list(kernels.values())


def read_counters(proof: Proof) -> None:
    """Each op once at a real size: its kernels' time, share of the memory bandwidth, and occupancy."""
    if proof.dry:
        op_once.run(proof)
        return proof.skip("Nsight Compute", "kernels", "a dry run has no GPU")
    program = find_tool("ncu")
    if program is None:
        return proof.skip("Nsight Compute", "kernels", "ncu is not on the PATH, nor beside nvcc")
    # clocks are left as they are
    options = [
        "--clock-control",
        "none",
        "--print-units",
        "base",
        "--csv",
        "--kernel-name",
        "regex:" + "|".join(KERNELS),
    ]
    command = [program, *options, "--metrics", ",".join(_METRICS), sys.executable, "-m", "gpu_proof_parts.op_once"]
    said = Started(command).finish(proof)
    kernels = counters_of(said)
    for kernel in kernels:
        proof.record("Nsight Compute", kernel.pop("kernel"), **kernel)
    if not kernels:
        lines = [line for line in said.splitlines() if line.strip()]
        why = f"no counters: {lines[-1] if lines else 'it said nothing'}"
        proof.skip("Nsight Compute", "kernels", why[:300])
    return None
