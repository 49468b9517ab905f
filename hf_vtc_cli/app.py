"""The commands, one file each, under one name."""

from typing import Annotated

import typer

from .bench import bench
from .convert import convert
from .demo import demo
from .errors import reporting_errors
from .estimate import estimate
from .evaluate import evaluate
from .export import export, push
from .fit import fit
from .package import module_alone
from .run import run
from .serve import SERVE_SETTINGS, serve

app = typer.Typer(
    name="hf-vtc",
    help="Vision-token compression for transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (run, demo, convert, fit, export, push, estimate, bench):
    app.command()(reporting_errors(command))
app.command(name="eval")(reporting_errors(evaluate))
app.command(context_settings=SERVE_SETTINGS)(reporting_errors(serve))


def _print_version(wanted: bool) -> None:
    if wanted:
        window = module_alone("models/window_vtc.py")
        proven = f"proven on transformers {window.OLDEST_PROVEN} to {window.NEWEST_PROVEN}"
        typer.echo(f"hf_vtc {module_alone('version.py').__version__}, {proven}")
        raise typer.Exit()


# the help of all commands is that of `app`, so this function has no docstring
@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass
