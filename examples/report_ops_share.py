"""What the compiled ops are worth end to end: their time as a share of a prefill that they prepare, on a CPU.

    python examples/report_ops_share.py
    python examples/report_ops_share.py --tokens 736 --dtypes float32

Ops run at the sizes of `benchmark_ops.py`. The prefill is that of a 7B Llama, and is not run: its FLOPs are divided by
the rate of this machine at one of its matrix products, measured in turns with the op. No prefill keeps that rate
throughout, so it is a little slower than assumed here, and shares are upper bounds.
"""

import argparse
import statistics

import torch
from benchmark_ops import DTYPES, PROBLEMS, keep_freed_memory, milliseconds

from hf_vtc.models.ops_vtc import compiled_ops
from hf_vtc.report import DecoderShape

LLAMA_7B = DecoderShape(
    width=4096,
    num_layers=32,
    query_width=4096,
    kv_width=4096,
    ffn_width=11008,
    vocab_size=32000,
    num_experts=1,
    experts_per_token=1,
)
# the one problem that is four prompts at once
PROMPTS = {"4x3072x4096, stride 4": 4}
ROWS = 512


def share(op: str, size: str, dtype: torch.dtype, num_tokens: int, repeats: int) -> tuple[float, float, float]:
    """Median milliseconds of an op, seconds of the prefills it belongs to, and the share."""
    problem = next(build for name, its_size, build in PROBLEMS if (name, its_size) == (op, size))(dtype, "cpu")
    rows, weight = torch.randn(ROWS, LLAMA_7B.width, dtype=dtype), torch.randn(11008, LLAMA_7B.width, dtype=dtype)
    flops = PROMPTS.get(size, 1) * LLAMA_7B.prefill_flops(num_tokens)
    product_flops = 2 * weight.numel() * ROWS
    own, prefills = [], []
    for turn in range(repeats + 1):
        op_milliseconds = milliseconds(problem.ours, "cpu")
        product_seconds = milliseconds(lambda: rows @ weight.T, "cpu") / 1e3
        # the first turn warms up
        if turn > 0:
            own.append(op_milliseconds)
            prefills.append(flops / product_flops * product_seconds)
    shares = [taken / 1e3 / prefill for taken, prefill in zip(own, prefills, strict=True)]
    return statistics.median(own), statistics.median(prefills), statistics.median(shares)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of the compiled ops as a share of a 7B prefill.")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=list(DTYPES))
    parser.add_argument("--tokens", type=int, default=2944, help="length of the prompt that the language model gets")
    parser.add_argument("--repeats", type=int, default=9, help="turns that op and product take")
    options = parser.parse_args()

    keep_freed_memory()
    shares = []
    print(f"{'op':<22}{'size':<28}{'dtype':<10}{'op':>10}{'prefill':>10}{'share':>10}")
    with torch.no_grad(), compiled_ops(True):
        for op, size, _ in PROBLEMS:
            for name in options.dtypes:
                torch.manual_seed(0)
                taken, prefill, part = share(op, size, DTYPES[name], options.tokens, options.repeats)
                shares.append(part)
                print(f"{op:<22}{size:<28}{name:<10}{taken:>7.2f} ms{prefill:>8.0f} s{part:>10.5%}")
    print(
        f"{min(shares):.5%} to {max(shares):.5%} of a 7B prefill of {options.tokens} tokens on a CPU, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
