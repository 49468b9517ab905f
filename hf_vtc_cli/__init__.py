"""The command `hf-vtc`: see what compression does, convert, export and push checkpoints, estimate and measure it.

A package of its own, since importing anything inside of hf_vtc registers its models. That loads torch and
transformers, which takes seconds that neither `hf-vtc --help` nor a mistyped option needs: commands check their
arguments first, and import what they run inside of their functions.
"""

import signal
import sys


def main() -> None:
    from .app import app

    # ended from outside, a command still removes what it has half written
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    app()
