"""The version of this package, where `hf-vtc --version` and the build read it without importing torch."""

__version__ = "0.1.0"
