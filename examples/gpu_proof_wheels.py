"""Pack the wheels that a GPU machine without network lacks, for `gpu_proof.py --wheels`.

    python examples/gpu_proof_wheels.py --out outputs/wheels                            # beyond torch and numpy
    python examples/gpu_proof_wheels.py --out outputs/wheels --installed freeze.txt     # what that machine lacks

`freeze.txt` is what `python -m pip freeze` prints there. Versions are the newest that every requirement allows; torch,
Triton and NVIDIA's libraries are never packed. From bitsandbytes only the library of the wanted CUDA is kept.
"""

import argparse
import email
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

# of hf_vtc (setup.cfg) and of the parts; torch 2.11 compiles with pkg_resources, which later setuptools lack
ROOTS = (
    "transformers>=4.57.6,<6",
    "safetensors>=0.4.3",
    "huggingface-hub>=0.36",
    "peft>=0.17",
    "accelerate>=1.1",
    "pillow>=10.1",
    "rich>=13.0",
    "bitsandbytes>=0.45",
    "setuptools<82",
)
# there: torch, what torch needs, and numpy, without which hardly anybody has torch
_WITH_TORCH = {"torch", "triton", "filelock", "typing-extensions", "sympy", "networkx", "jinja2", "fsspec", "numpy"}
# of no use without a network
_NETWORK = {"hf-xet"}
LIMIT_MIB = 50
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_24_x86_64", "manylinux2014_x86_64")


def installed_versions(freeze: Path | None) -> dict[str, Version]:
    """Packages and versions of `pip freeze`; lines that pin no version say nothing."""
    found = {}
    for line in freeze.read_text(encoding="utf-8").splitlines() if freeze else []:
        name, separator, version = line.partition("==")
        if separator:
            found[canonicalize_name(name.strip())] = Version(version.split(";")[0].strip())
    return found


def requirements_of(wheel: Path, environment: dict[str, str]) -> Iterator[Requirement]:
    """What a wheel needs on the other machine, without extras."""
    with zipfile.ZipFile(wheel) as content:
        name = next(name for name in content.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(content.read(name))
    for line in metadata.get_all("Requires-Dist") or []:
        try:
            requirement = Requirement(line)
        except InvalidRequirement as error:
            raise ValueError(f"{wheel.name} has a requirement that cannot be read: {line!r}") from error
        if requirement.marker is None or requirement.marker.evaluate({**environment, "extra": ""}):
            yield requirement


def download(name: str, specifier: SpecifierSet, folder: Path, python: str) -> Path:
    """The newest wheel of a package that fits; an older one of it is removed."""
    for wheel in wheels_of(name, folder):
        wheel.unlink()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, "--implementation", "cp", "--dest", str(folder)]
    command += [option for platform in PLATFORMS for option in ("--platform", platform)]
    subprocess.run([*command, f"{name}{specifier}"], check=True)
    return wheels_of(name, folder)[0]


def wheels_of(name: str, folder: Path) -> list[Path]:
    return [wheel for wheel in folder.glob("*.whl") if parse_wheel_filename(wheel.name)[0] == canonicalize_name(name)]


def collect(folder: Path, python: str, installed: dict[str, Version]) -> list[Path]:
    """Download what is needed and not there, requirements of requirements included.

    Raises:
        subprocess.CalledProcessError: no wheel fits all requirements of a package.
    """
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    asked: dict[str, SpecifierSet] = {}
    chosen: dict[str, Path] = {}
    waiting = [Requirement(root) for root in ROOTS]
    while waiting:
        requirement = waiting.pop(0)
        name = canonicalize_name(requirement.name)
        if name in _WITH_TORCH | _NETWORK or name.startswith("nvidia-"):
            continue
        asked[name] = asked.get(name, SpecifierSet()) & requirement.specifier
        if name in chosen:
            if parse_wheel_filename(chosen[name].name)[1] in asked[name]:
                continue
        elif name in installed and asked[name].contains(installed[name], prereleases=True):
            continue
        chosen[name] = download(name, asked[name], folder, python)
        waiting += requirements_of(chosen[name], environment)
    return sorted(chosen.values())


def keep_one_cuda(wheel: Path, cuda: str) -> None:
    """Rewrite bitsandbytes with the library of one CUDA: those of all versions and makers are ten times as large."""
    wanted = f"libbitsandbytes_cuda{cuda}.so"
    scratch = wheel.with_suffix(".part")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(scratch, "w", zipfile.ZIP_DEFLATED) as new:
        names = old.namelist()
        if not any(name.endswith(wanted) for name in names):
            raise ValueError(f"{wheel.name} has no library for CUDA {cuda}. Give another one by --cuda.")
        others = {name for name in names if "/libbitsandbytes_" in name and not name.endswith((wanted, "_cpu.so"))}
        for name in names:
            if name in others:
                continue
            content = old.read(name)
            if name.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines(keepends=True)
                content = "".join(line for line in lines if line.split(",")[0] not in others).encode()
            new.writestr(old.getinfo(name), content)
    scratch.replace(wheel)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the wheels; must be empty")
    parser.add_argument("--installed", type=Path, metavar="FILE", help="`pip freeze` of the machine")
    parser.add_argument("--python", default="3.12", help="version of the machine")
    parser.add_argument("--cuda", default="130", help="that torch was built with there, as in 130 for 13.0")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if any(options.out.glob("*.whl")):
        parser.error(f"--out {options.out} holds wheels already, of which two versions would not install together")
    for wheel in collect(options.out, options.python, installed_versions(options.installed)):
        if wheel.name.startswith("bitsandbytes-"):
            keep_one_cuda(wheel, options.cuda)
    wheels = sorted(options.out.glob("*.whl"), key=lambda wheel: -wheel.stat().st_size)
    sizes = {wheel.name: wheel.stat().st_size / 2**20 for wheel in wheels}
    for name, size in sizes.items():
        print(f"{size:7.2f} MiB  {name}")
    print(f"{sum(sizes.values()):7.2f} MiB  in {len(sizes)} wheels")
    if sum(sizes.values()) > LIMIT_MIB:
        sys.stderr.write(f"more than {LIMIT_MIB} MiB: give --installed, so that only what is missing is packed\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
