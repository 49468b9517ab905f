"""Metadata is in setup.cfg. A plain install is pure Python; HF_VTC_BUILD_OPS builds the compiled ops into it.

HF_VTC_BUILD_OPS=1 pip install --no-build-isolation .       kernels for CPU
HF_VTC_BUILD_OPS=cuda pip install --no-build-isolation .    and for CUDA, with HF_VTC_OPS_ARCH="80 90" for these alone

A wheel carries the checkpoints and pages of this repository, so that `hf-vtc run` needs nothing else; an editable
install finds them where they are.
"""

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
KINDS = {"1": ("cpu",), "cpu": ("cpu",), "cuda": ("cpu", "cuda")}


def wanted_kinds() -> tuple[str, ...]:
    """Kinds of devices to build for, as HF_VTC_BUILD_OPS says."""
    asked = os.environ.get("HF_VTC_BUILD_OPS") or "0"
    if asked != "0" and asked not in KINDS:
        raise SystemExit(f"HF_VTC_BUILD_OPS must be one of 0, {', '.join(KINDS)}, got {asked!r}.")
    return KINDS.get(asked, ())


def ship(target: Path) -> None:
    """Copy the pages, and the checkpoints that read them, to the same places below `target`.

    Their uncompressed base stays behind, which no command runs, and so do checkpoints that read other pages.
    """
    shutil.copytree(ROOT / "examples" / "images", target / "examples" / "images")
    for config in sorted((ROOT / "model_cards").glob("*-tiny/config.json")):
        if json.loads(config.read_text(encoding="utf-8"))["model_type"].startswith("vtc_"):
            shutil.copytree(config.parent, target / "model_cards" / config.parent.name)


class BuildPackage(build_py):
    """Add to what is installed, unless it stays where it is, what the package finds beside itself in a clone."""

    def run(self) -> None:
        package = Path(self.build_lib) / "hf_vtc"
        if not self.editable_mode:
            # files of an earlier build that are gone from here would be installed too
            shutil.rmtree(package, ignore_errors=True)
        super().run()
        if not self.editable_mode:
            ship(package / "_shipped")
        if wanted_kinds():
            self.build_ops()

    def build_ops(self) -> None:
        """Build the kernels beside their sources in what is being installed."""
        try:
            import torch  # noqa: F401
        except ImportError:
            raise SystemExit(
                "HF_VTC_BUILD_OPS needs torch while building. Install torch first, then use "
                "`pip install --no-build-isolation .`"
            ) from None
        # hf_vtc itself imports transformers, which need not be here
        folder = Path("hf_vtc", "ops").resolve()
        location = {"submodule_search_locations": [str(folder)]}
        spec = importlib.util.spec_from_file_location("_hf_vtc_ops", folder / "__init__.py", **location)
        module = sys.modules["_hf_vtc_ops"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        from _hf_vtc_ops.build import build_into
        from _hf_vtc_ops.recipe import ARCHITECTURES, Recipe

        architectures = tuple(os.environ.get("HF_VTC_OPS_ARCH", " ".join(ARCHITECTURES)).split())
        root = Path() if self.editable_mode else Path(self.build_lib)
        for kind in wanted_kinds():
            build_into(Recipe(kind, architectures if kind == "cuda" else ()), root / "hf_vtc" / "ops" / "_lib")


class PlatformWheel(bdist_wheel):
    """A wheel for this platform and any Python: the kernels hold no symbol of Python's."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class PlatformDistribution(Distribution):
    """Installs where files of one platform belong, as if it had extension modules."""

    def has_ext_modules(self) -> bool:
        return True


if wanted_kinds():
    setup(distclass=PlatformDistribution, cmdclass={"build_py": BuildPackage, "bdist_wheel": PlatformWheel})
else:
    setup(cmdclass={"build_py": BuildPackage})
