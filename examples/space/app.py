"""The page of `hf-vtc demo` as a Space of the Hub.

Settings of the Space (environment): `MODEL`, a repository of the Hub or a folder; default: vico-tiny, which comes with
hf_vtc. `NOTE`: what visitors should know of it, in Markdown.
"""

import os

from hf_vtc.demo import build_page, launch
from hf_vtc_cli.answers import load
from hf_vtc_cli.demo import examples_of, note_on
from hf_vtc_cli.package import checkpoint_path


def main() -> None:
    path = checkpoint_path(os.environ.get("MODEL") or None)
    page = build_page(*load(path), examples_of(path), os.environ.get("NOTE") or note_on(path))
    # a Space says where it wants to be reached; anywhere else this stays on the machine
    host = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")
    address = launch(page, host, int(os.environ.get("GRADIO_SERVER_PORT", 7860)), block=False)
    print(address, flush=True)
    page.block_thread()


if __name__ == "__main__":
    main()
