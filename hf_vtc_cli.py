"""Starts `hf-vtc`. Beside the package, because importing anything inside of it registers its models.

That loads torch and transformers, which takes seconds that neither `hf-vtc --help` nor a mistyped option needs. So
`hf_vtc/cli.py`, which imports what it runs inside of its commands, is loaded from its file, under its own name; the
package itself follows with the first import in a command.
"""

import importlib.util
import sys
from pathlib import Path


def main() -> None:
    # a name without a dot is found without being imported
    package = importlib.util.find_spec("hf_vtc")
    spec = importlib.util.spec_from_file_location("hf_vtc.cli", Path(package.origin).with_name("cli.py"))
    cli = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = cli
    spec.loader.exec_module(cli)
    cli.app()
