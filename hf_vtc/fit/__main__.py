"""`accelerate launch -m hf_vtc.fit MODEL ...` is `hf-vtc fit MODEL ...` on every device.

The command is that of `hf_vtc_cli`, which nothing else in this package may import: a launcher starts modules, and no
installed commands.
"""

import sys

from hf_vtc_cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["fit"]
    main()
