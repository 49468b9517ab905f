"""The parts of `gpu_proof.py`, in order of worth. This file, `runner` and `report` need nothing but Python itself."""

from typing import NamedTuple


class Part(NamedTuple):
    """One part of the proof.

    Args:
        letter (`str`): its name on the command line.
        module (`str`): file of this folder whose `run` does the work.
        title (`str`): what it shows.
        seconds (`float`): its time box, of the eight minutes of a whole run.
    """

    letter: str
    module: str
    title: str
    seconds: float


PARTS = (
    Part("a", "correctness", "the CUDA ops build and are right, the shipped checkpoints answer as on a CPU", 60),
    Part("b", "op_speed", "every op against a copy, eager PyTorch and torch.compile", 75),
    Part("c", "first_token", "time to the first token of five methods at 7B shapes, memory, decoding", 130),
    Part("d", "launches", "kernels, copies and synchronisations per prefill and per decoded token", 35),
    Part("e", "training_steps", "LoRA, QLoRA, int8 and RGLF steps, with their memory", 45),
    Part("f", "compiled_decoder", "decoder under torch.compile and CUDA graphs with bucketed lengths", 55),
    Part("g", "sanitizers", "every kernel under compute-sanitizer and Nsight Compute", 45),
    Part("h", "recipes", "training throughput of the tiny recipes", 35),
)
