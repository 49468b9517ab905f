"""Every code block of README.md, CONTRIBUTING.md and docs runs, or says why not (`docs_blocks.py`)."""

import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from docs_blocks import DATA, PAGES, ROOT, Block, blocks_of, problems_of
from typer.testing import CliRunner

from hf_vtc_cli.app import app

BLOCKS = [block for page in PAGES for block in blocks_of(page)]
RUN = defaultdict(list)
for _block in BLOCKS:
    if _block.language in ("python", "bash") and _block.mark is None:
        RUN[_block.page].append(_block)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder in which the paths of the pages are there; no link, since links out of a model's folder are refused."""
    for name in ("model_cards", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_blocks_are_of_a_known_kind(block):
    if block.language in DATA:
        return
    assert block.language in ("python", "bash"), "say what the block is: python, bash, or data: text, json, yaml, toml"
    assert block.mark in (None, "not run", "file"), f"no such mark: {block.mark}"
    if block.mark == "file":
        assert block.code == (ROOT / block.note).read_text(encoding="utf-8"), f"{block.note} has changed"
    if block.language == "bash":
        assert not [(command, problem) for command in block.commands() if (problem := problems_of(command))]
    else:
        compile(block.code, str(block), "exec")


@pytest.mark.parametrize("page", RUN)
def test_blocks_run(page, folder):
    variables = {"__name__": "__main__"}
    for block in RUN[page]:
        if block.language == "python":
            exec(compile(block.code, str(block), "exec"), variables)
        else:
            for command in block.commands():
                _run(block, command)


def _run(block: Block, command: list[str]) -> None:
    program, *arguments = command
    if program == "hf-vtc":
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{block}: {shlex.join(command)}\n{result.output}"
    else:
        assert program == "python", f"{block}: `{program}` is not run here; mark the block `<!-- not run: why -->`"
        result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{block}: {shlex.join(command)}\n{result.stderr[-2000:]}"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("hf-vtc run --image a.png --budget 0.4", None),
        ("hf-vtc run --imge a.png", "imge"),
        ("hf-vtc rnu", "rnu"),
        ("hf-vtc convert A", "DST"),
        ("python examples/finetune_lora.py --model m --data d --output o", None),
        ("python examples/finetune_lora.py --modle m", "has no --modle"),
        ("python examples/no_such.py", "there is no"),
        ("accelerate launch --config_file c.yaml examples/train_stage.py r.yaml --model m", None),
        ("X=1 hf-vtc rnu", "rnu"),
        ("accelerate launch -m hf_vtc.lora", None),
    ],
)
def test_commands_are_held_against_their_parsers(text, problem):
    block = Block("page.md", 1, "bash", f"cd x && {text}  # a comment\n", None, None)
    found = [each for command in block.commands() if (each := problems_of(command))]
    assert len(block.commands()) == 2
    assert found == [] if problem is None else problem in found[0]


def test_a_block_that_would_be_passed_over_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("docs_blocks.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("1. one\n\n   ```bash\n   frobnicate\n   ```\n")
    with pytest.raises(ValueError, match="page.md has a fence"):
        blocks_of(page)
    page.write_text("<!-- not run: why -->\n```bash\nfrobnicate\n```\n\n```python\nx = 1\n```\n")
    first, second = blocks_of(page)
    assert (first.mark, first.note, first.line) == ("not run", "why", 1) and second.mark is None
