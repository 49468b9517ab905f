"""The GPU table of docs/gpu.md, and the wheels for a machine without network."""

import json
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "examples"))

import gpu_proof_table  # noqa: E402
import gpu_proof_wheels  # noqa: E402
from gpu_proof_parts import PARTS  # noqa: E402
from gpu_proof_parts.report import NOT_RUN, as_markdown, read_results, results_table  # noqa: E402


def finished(**overrides) -> dict:
    parts = [{"part": part.letter, "title": part.title, "status": "not started", "rows": []} for part in PARTS]
    parts[0] |= {
        "status": "done",
        "headline": "19 of 19 checks hold",
        "rows": [{"table": "t", "name": "n", "ok": True}],
    }
    parts[1] |= {
        "status": "killed",
        "reason": "killed at its time box of 75 s.",
        "rows": [{"ok": ok} for ok in (True, None, False)],
    }
    parts[2] |= {"status": "failed", "reason": "OutOfMemoryError: too much"}
    return {
        "command": "c",
        "started": "2026-01-02T03:04:05Z",
        "commit": "f" * 40,
        "changed_files": [],
        "dry": False,
        "machine": {"device": "NVIDIA H100"},
        "parts": parts,
        **overrides,
    }


def test_without_runs_the_page_says_so_of_every_part():
    lines = results_table([]).splitlines()[2:]
    assert len(lines) == len(PARTS) and all(line.endswith(f"| {NOT_RUN} |") for line in lines)


def test_the_page_shows_the_last_run_that_reached_a_part(tmp_path):
    later = finished(started="2026-03-01T00:00:00Z", commit="e" * 40)
    later["parts"] = [{**part, "status": "not started"} for part in later["parts"]]
    later["parts"][1] |= {"status": "done", "headline": "8 of 8 checks hold"}
    (tmp_path / "z.json").write_text(json.dumps(finished()))
    (tmp_path / "a.json").write_text(json.dumps(later))
    header, _, *lines = results_table(read_results(tmp_path)).splitlines()
    assert header == "| part | shows | NVIDIA H100 |"
    assert lines[0].endswith("| 19 of 19 checks hold ([2026-01-02](results/z.json), ffffffffff) |")
    assert lines[1].endswith("| 8 of 8 checks hold ([2026-03-01](results/a.json), eeeeeeeeee) |")
    own = results_table([finished(file="x.json")]).splitlines()[3]
    assert "1 of 2 checks hold; cut off at its time box after 3 results (" in own
    assert "FAILED after 0 results (OutOfMemoryError: too much)" in lines[2]
    assert lines[3].endswith(f"| {NOT_RUN} |")


def test_a_dry_run_is_no_result(tmp_path):
    (tmp_path / "dry.json").write_text(json.dumps(finished(dry=True)))
    with pytest.raises(ValueError, match="shows nothing about a GPU"):
        read_results(tmp_path)
    (tmp_path / "dry.json").write_text("[]")
    with pytest.raises(ValueError, match="not a results.json"):
        read_results(tmp_path)


def test_the_page_shows_the_results_that_are_kept():
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert gpu_proof_table.with_table(text, results_table(read_results(ROOT / "docs" / "results"))) == text
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
