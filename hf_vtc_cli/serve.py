"""`hf-vtc serve`: the server of transformers, with our checkpoints and a budget with each request."""

import typer

from .options import DebugOption

# every argument is for the server of transformers, `--help` too
SERVE_SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def serve(context: typer.Context, debug: DebugOption = False) -> None:
    """Serve checkpoints to OpenAI clients: `transformers serve`, whose options these are, with hf_vtc loaded.

    A request may have a field `vtc_budget`; `transformers chat` talks to this server as to any other.
    """
    try:
        from transformers.cli.transformers import app as commands_of_transformers
    except ImportError:
        raise ImportError(
            "`hf-vtc serve` needs the server of transformers 5 and its parts: pip install 'transformers[serving]>=5'."
        ) from None

    from .host_serving import know_methods, take_budgets

    know_methods()
    take_budgets()
    commands_of_transformers(["serve", *context.args], prog_name="hf-vtc", standalone_mode=False)
