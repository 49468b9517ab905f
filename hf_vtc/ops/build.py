"""Build the compiled ops: `python -m hf_vtc.ops.build [--compile-only] [--arch 80 90 100 120] [--out DIR]`."""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from .compiler import build, find_nvcc
from .files import OpsUnavailable, cache_folder, only_builder, place
from .recipe import ARCHITECTURES, Recipe


def build_into(recipe: Recipe, folder: Path) -> Path:
    """Build one file and put it into a folder, as a whole or not at all."""
    return place(partial(build, recipe), folder / recipe.file_name)


def _build_into_cache(recipe: Recipe) -> Path:
    """The same, into the cache, where others may be building."""
    folder = cache_folder()
    with only_builder(folder / recipe.file_name):
        return build_into(recipe, folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m hf_vtc.ops.build", description="Build hf_vtc's compiled ops.")
    parser.add_argument("--kind", choices=("cpu", "cuda"), nargs="+", help="default: cpu, and cuda if there is nvcc")
    parser.add_argument(
        "--arch", nargs="+", default=list(ARCHITECTURES), metavar="CC", help="compute capabilities, as 80 90 100 120"
    )
    parser.add_argument("--out", type=Path, help="folder for the built files; default: the user's cache")
    parser.add_argument(
        "--compile-only",
        action="store_true",
        help="check that all compiles without a warning, and keep nothing",
    )
    options = parser.parse_args(arguments)
    kinds = options.kind or (["cpu", "cuda"] if find_nvcc() else ["cpu"])
    for kind in kinds:
        recipe = Recipe(kind, tuple(options.arch) if kind == "cuda" else ())
        try:
            if options.compile_only:
                with tempfile.TemporaryDirectory(prefix="hf_vtc-") as scratch:
                    build(recipe, Path(scratch), strict=True)
                sys.stdout.write(f"{kind}: compiles\n")
            else:
                built = build_into(recipe, options.out) if options.out else _build_into_cache(recipe)
                sys.stdout.write(f"{kind}: {built}\n")
        except (OpsUnavailable, OSError, RuntimeError) as error:
            sys.stderr.write(f"{kind}: {error}\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
