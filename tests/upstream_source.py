"""transformers' own common tests, from the source distribution of the installed version.

The files are fetched by pip when a suite of `tests/upstream` is run, kept in a cache outside of this repository, and
imported under the package name `transformers_tests`. What they import from files that no distribution holds is
replaced by stand-ins.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType

import pytest

PACKAGE = "transformers_tests"
FILES = (
    "test_configuration_common.py",
    "test_image_processing_common.py",
    "test_modeling_common.py",
    "test_processing_common.py",
)
# stands for every picture that the tests would download
PICTURE = Path(__file__).resolve().parents[1] / "examples" / "images" / "form_1.png"
_DOWNLOAD_SECONDS = 400


def cache_folder() -> Path:
    """`HF_VTC_UPSTREAM_TESTS`, or a folder of the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HF_VTC_UPSTREAM_TESTS") or Path(cache) / "hf_vtc" / "upstream_tests")


def fetch(version: str, cache: Path) -> Path:
    """Folder with `FILES` of a version of transformers; pip downloads its source distribution if they are not there.

    Raises:
        FileNotFoundError: pip cannot download it, or it lacks a file.
    """
    folder = cache / f"transformers-{version}"
    if not all((folder / name).is_file() for name in ("__init__.py", *FILES)):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            extracted = Path(scratch) / "extracted"
            extract(download(version, Path(scratch)), version, extracted)
            shutil.rmtree(folder, ignore_errors=True)
            extracted.rename(folder)
    return folder


def download(version: str, folder: Path) -> Path:
    """The source distribution of a version of transformers; pip compares its checksum with that of the index.

    Raises:
        FileNotFoundError: pip cannot download it.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
    try:
        result = subprocess.run(
            [*command, "--dest", str(folder), f"transformers=={version}"],
            capture_output=True,
            text=True,
            timeout=_DOWNLOAD_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise FileNotFoundError(f"pip took longer than {_DOWNLOAD_SECONDS} s for transformers {version}.") from error
    archive = folder / f"transformers-{version}.tar.gz"
    if not archive.is_file():
        reason = (result.stderr or result.stdout).strip().splitlines()[-1:]
        raise FileNotFoundError(f"pip has no source distribution of transformers {version}: {''.join(reason)}")
    return archive


def extract(archive: Path, version: str, folder: Path) -> None:
    """Copy `FILES`, and nothing else, out of a source distribution.

    Names are ours and only the content is the archive's, so nothing can land outside of `folder`.

    Raises:
        FileNotFoundError: the archive lacks one of them, or holds something other than a plain file under its name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as content:
        members = {member.name: member for member in content.getmembers() if member.isfile()}
        for name in FILES:
            member = members.get(f"transformers-{version}/tests/{name}")
            if member is None:
                raise FileNotFoundError(f"{archive.name} has no file tests/{name}.")
            (folder / name).write_bytes(content.extractfile(member).read())
    # the tests of configurations import their own folder as a package
    (folder / "__init__.py").touch()


def load_or_skip(name: str) -> ModuleType:
    """Import one of `FILES`, given without `.py`; the calling test module is skipped if it cannot be had."""
    pytest.importorskip("parameterized", reason="transformers' tests need `pip install parameterized`")
    import transformers

    if f"{PACKAGE}.{name}" in sys.modules:
        return sys.modules[f"{PACKAGE}.{name}"]
    try:
        folder = fetch(transformers.__version__, cache_folder())
    except FileNotFoundError as error:
        pytest.skip(f"transformers' tests could not be fetched: {error}", allow_module_level=True)
    _install_stand_ins(folder)
    spec = importlib.util.spec_from_file_location(f"{PACKAGE}.{name}", folder / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def one_row_per_image(method: str) -> dict:
    """Fields of an image processor that give one row of `pixel_values` for each image, as these tests expect it.

    One tile, or the whole image in place of tiles.
    """
    other = {"avg_llava": {"tiling": "pad"}, "convllava": {}}
    return other.get(method, {"max_tiles": 1})


def _install_stand_ins(folder: Path) -> None:
    """The package itself, and the modules that its files import and that no distribution holds."""
    contents = {
        PACKAGE: {"__path__": [str(folder)]},
        # in these, tests are inherited: none here
        f"{PACKAGE}.exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
        f"{PACKAGE}.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
        # values of general fields, which the test of composite configurations does not read
        f"{PACKAGE}.utils.test_configuration_utils": {"config_common_kwargs": {}},
        # downloads a file
        "fetch_hub_objects_for_ci": {"url_to_local_path": lambda url: str(PICTURE)},
    }
    for name, content in contents.items():
        parent = name.rpartition(".")[0]
        for module_name in filter(None, (parent, name)):
            if module_name not in sys.modules:
                sys.modules[module_name] = ModuleType(module_name)
                sys.modules[module_name].__path__ = []
        vars(sys.modules[name]).update(content)
