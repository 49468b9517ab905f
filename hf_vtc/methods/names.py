"""How methods are named. Nothing is imported here, so that a command can read it without loading torch."""

# begins the `model_type` of every method
PREFIX = "vtc_"


def is_method(model_type: object) -> bool:
    """Whether a `model_type` is that of a method of hf_vtc, known or not."""
    return isinstance(model_type, str) and model_type.startswith(PREFIX)
