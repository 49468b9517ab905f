"""Compiled kernels of the ops that `hf_vtc/models/ops_vtc.py` describes: sources, builder and loader.

Nothing is compiled on import. `python -m hf_vtc.ops.build` builds ahead of time; otherwise the first use of an op on a
CPU or a CUDA device looks for a built file and, where a compiler is there, makes one. `HF_VTC_OPS` is one of:

- `auto` (default): use a built file, else build once, else run the reference in plain PyTorch;
- `prebuilt`: use a built file, never start a compiler;
- `require`: like `auto`, but raise an error in place of running the reference;
- `off`: always the reference.

This package imports nothing of the rest of hf_vtc, so that code which travelled beside weights can use it as well.
"""

from .library import load, mode

__all__ = ["load", "mode"]
