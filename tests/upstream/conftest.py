"""transformers' own tests are collected by `pytest -m upstream` only: collecting them may download them."""

from pathlib import Path

import pytest

_HERE = Path(__file__).parent
_MARKERS_OF_TRANSFORMERS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "torch_compile_test",
)


def pytest_configure(config: pytest.Config) -> None:
    """Make the markers of transformers' files known, since unknown ones are errors here."""
    for marker in _MARKERS_OF_TRANSFORMERS:
        config.addinivalue_line("markers", f"{marker}: a marker of transformers' tests")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave these files alone unless they are asked for."""
    return None if config.getoption("markexpr") == "upstream" else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is in this folder."""
    for item in items:
        if item.path.is_relative_to(_HERE):
            item.add_marker(pytest.mark.upstream)
