"""The versions of transformers that this code was proven on. Needs neither torch nor transformers.

The file travels beside weights, so that an exported folder knows what its code has seen.
"""

import re

# the oldest release that is supported, and the newest minor whose whole window of tests has passed (CONTRIBUTING.md)
OLDEST_PROVEN = "4.57.6"
NEWEST_PROVEN = "5.24"


def release_of(version: str) -> tuple[int, int]:
    """Major and minor number of a version, also of a pre-release: `"5.25.0.dev0"` gives `(5, 25)`."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        raise ValueError(f"`version` must begin with two numbers, such as 5.24.0, got {version!r}.")
    return int(found[1]), int(found[2])


def first_unproven() -> str:
    """The minor after the newest proven one: what `transformers<...` keeps out."""
    major, minor = release_of(NEWEST_PROVEN)
    return f"{major}.{minor + 1}"


def note_on_newer(version: str) -> str | None:
    """What to tell users of a transformers that is newer than the newest proven one, else None."""
    if release_of(version) <= release_of(NEWEST_PROVEN):
        return None
    return (
        f"transformers {version} is newer than {NEWEST_PROVEN}, the newest that this code of hf_vtc was proven on. "
        f'If something fails: pip install "transformers<{first_unproven()}"'
    )
