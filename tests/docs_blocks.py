"""Code blocks of README.md, CONTRIBUTING.md and docs, as CI runs them.

A fenced block of Python or of commands is run. What cannot be says why in a comment on the line above it:

    <!-- not run: the reason -->      commands are still held against the parsers of their programs
    <!-- file: tests/x.py -->         the block is that file, which is run elsewhere

Blocks of a page share their variables and a folder, in which `model_cards` and `examples` are copies.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import typer

from hf_vtc_cli.app import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# languages of blocks that hold no code
DATA = {"text", "json", "yaml", "toml"}
_BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>[\w ]+): (?P<note>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S
)
_FENCES = re.compile(r"^\s*```", re.M)


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    code: str
    mark: str | None
    note: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> list[list[str]]:
        """The words of each command of a block of shell."""
        # a line goes on behind a backslash, and a comment ends it
        lines = self.code.replace("\\\n", " ").splitlines()
        commands = []
        for line in lines:
            lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
            lexer.whitespace_split = True
            commands.append([])
            for word in lexer:
                if set(word) <= set("&|;"):
                    commands.append([])
                else:
                    commands[-1].append(word)
        return [command for command in commands if command]


def blocks_of(path: Path) -> list[Block]:
    """The fenced blocks of a page.

    Raises:
        ValueError: a fence is indented or not closed, so that its block would be passed over.
    """
    text, page = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
    found = [
        Block(page, text.count("\n", 0, match.start()) + 1, *match.group("language", "code", "mark", "note"))
        for match in _BLOCK.finditer(text)
    ]
    if 2 * len(found) != len(_FENCES.findall(text)):
        raise ValueError(f"{page} has a fence that is indented or not closed: blocks stand at the left edge.")
    return found


def is_path_of_repository(word: str) -> bool:
    """Whether a word names a file or folder of this repository, and not a pattern or one that a command will make."""
    known = re.fullmatch(r"(?:examples|tests|docs|model_cards|hf_vtc|hf_vtc_cli)/[\w./-]+", word)
    # DATE, METHOD and the like stand for something
    return bool(known) and not re.search(r"\b(?!README\b)[A-Z]{3,}\b", word)


def problems_of(command: list[str]) -> str | None:
    """What is wrong with a command, as far as can be told without running it."""
    words = [word for word in command if not re.fullmatch(r"\w+=\S*", word)]
    if not words:
        return None
    program, arguments = words[0], words[1:]
    lost = [word for word in arguments if is_path_of_repository(word) and not (ROOT / word).exists()]
    if lost:
        return f"there is no {', '.join(lost)}"
    if program == "hf-vtc":
        return _problem_of_hf_vtc(arguments)
    if program == "accelerate" and arguments[:1] == ["launch"]:
        script = next((idx for idx, word in enumerate(arguments) if word.endswith(".py")), None)
        return None if script is None else _problem_of_script(arguments[script:])
    if program in ("python", ".venv/bin/python") and arguments and arguments[0].endswith(".py"):
        return _problem_of_script(arguments)
    # a program of others, whose arguments are not ours to judge
    return None


def _problem_of_hf_vtc(arguments: list[str]) -> str | None:
    commands = typer.main.get_command(app).commands
    if not arguments or arguments[0].startswith("-"):
        return None
    if arguments[0] not in commands:
        return f"hf-vtc has no command {arguments[0]!r}"
    command = commands[arguments[0]]
    try:
        # parsing runs nothing
        command.make_context(arguments[0], arguments[1:])
    except Exception as error:
        # typer's errors are those of click, or of a copy of it in newer versions
        return error.format_message() if hasattr(error, "format_message") else repr(error)
    return None


def _problem_of_script(arguments: list[str]) -> str | None:
    script = ROOT / arguments[0]
    if not script.is_file():
        return f"there is no {arguments[0]}"
    source = script.read_text(encoding="utf-8")
    for option in re.findall(r"(?<!\S)--[\w-]+", " ".join(arguments[1:])):
        if f'"{option}"' not in source:
            return f"{arguments[0]} has no {option}"
    return None
