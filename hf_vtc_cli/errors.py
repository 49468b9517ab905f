"""Errors that users can cause, as one line in the words of the command that they typed."""

import functools
import inspect
import io
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any, get_args

import typer

from .options import silence_transformers
from .package import module_alone

# what users can cause ends in one line and this status, anything else in a traceback
_BAD_INPUT = 2
_INPUT_ERRORS = (ValueError, OSError, ImportError, RuntimeError, MemoryError)
# arguments of Python that bear another name on the command line
_OPTIONS_OF = {
    "vtc_budget": "budget",
    "save_code": "code",
    "folder": "dst",
    "output": "save",
    "train_records": "train_data",
}
_COMMANDS_OF = {"hf_vtc.convert.load_official": "hf-vtc convert", "hf_vtc.hub.export": "hf-vtc export"}


def reporting_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn errors that users can cause into one line on standard error and exit status 2, unless with `--debug`."""

    @functools.wraps(command)
    def wrapper(*args: Any, debug: bool, **kwargs: Any) -> None:
        if not debug:
            silence_transformers()
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                # an answer may hold characters that this terminal lacks
                stream.reconfigure(errors="replace")
        try:
            command(*args, debug=debug, **kwargs)
        except BrokenPipeError:
            # who reads has seen enough; click ends the process quietly
            raise
        except Exception as error:
            note = _note_on_newer_host(error)
            if debug or not (note or isinstance(error, _INPUT_ERRORS)):
                raise
            message = in_words_of(command, " ".join(str(error).split())) or type(error).__name__
            if not isinstance(error, _INPUT_ERRORS):
                message = f"{type(error).__name__}: {message}"
            typer.echo(f"Error: {message}" + (f" ({note})" if note else ""), err=True)
            raise typer.Exit(_BAD_INPUT) from None

    return wrapper


def in_words_of(command: Callable[..., None], message: str) -> str:
    """A message of a Python function in the words of a command: `overwrite=True` becomes `--overwrite`."""
    spellings = _spellings(command)

    def spelt(found: re.Match) -> str:
        name, value = found[1], found[2]
        if name in _COMMANDS_OF:
            return f"`{_COMMANDS_OF[name]}`"
        yes, no = spellings.get(_OPTIONS_OF.get(name, name), (None, None))
        word = no if value == "False" else yes
        return found[0] if word is None else f"`{word}`"

    return re.sub(r"`([\w.]+)(?:=(True|False))?`", spelt, message)


def _spellings(command: Callable[..., None]) -> dict[str, tuple[str, str | None]]:
    """How each parameter of a command is typed, and what denies it where it is a switch of two words."""
    spellings = {}
    # `get_type_hints` of Python 3.10 makes an option of what is None by default, and hides what is declared of it
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        declared_as = get_args(parameter.annotation)
        info = next((part for part in declared_as if isinstance(part, typer.models.ParameterInfo)), None)
        if info is None:
            continue
        typed = name.replace("_", "-")
        # in an annotation the first name of an option stands where its default would be
        declared = [text for text in (info.default, *(info.param_decls or ())) if isinstance(text, str)]
        if isinstance(info, typer.models.ArgumentInfo):
            spellings[name] = (info.metavar or typed.upper(), None)
        elif declared:
            yes, _, no = declared[0].partition("/")
            spellings[name] = (yes, no or None)
        else:
            is_switch = parameter.default in (True, False)
            spellings[name] = (f"--{typed}", f"--no-{typed}" if is_switch else None)
    return spellings


def _note_on_newer_host(error: Exception) -> str | None:
    """The remedy, if transformers is newer than what was proven and `error` may come of that, else None."""
    host = sys.modules.get("transformers")
    note = module_alone("models/window_vtc.py").note_on_newer(host.__version__) if host else None
    if error.__cause__ is not None and not isinstance(error.__cause__, _INPUT_ERRORS):
        # named after the folder that was worked with
        error = error.__cause__
    if isinstance(error, ImportError):
        from_host = (error.name or "").split(".")[0] == "transformers"
    elif isinstance(error, _INPUT_ERRORS):
        # a missing file is reported by the host on behalf of whoever named it
        modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
        from_host = not isinstance(error, OSError) and modules[-1].split(".")[0] == "transformers"
    else:
        from_host = True
    return note if from_host else None
