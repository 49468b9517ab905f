"""Compiled CPU kernels against the references in float64: outputs and every gradient, on awkward shapes."""

from collections.abc import Callable, Sequence

import pytest
import torch
from ops.cases import CASES, TOLERANCES, Case, gradients_of, outputs_of
from ops.hostile import VALID, opcheck_arguments

from hf_vtc.models import ops_vtc
from hf_vtc.models.ops_vtc import assign_segment_mean, compiled_ops, pool_pyramid, segment_mean, unshuffle_layernorm

pytestmark = pytest.mark.usefixtures("compiled_cpu")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def poisoned():
    """Every `torch.empty` is filled with NaN, or with the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def ids(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_outputs_and_gradients_match_the_reference_in_float64(case, dtype, poisoned):
    inputs = case.inputs(dtype)
    with compiled_ops(True):
        outputs, gradients = gradients_of(case, inputs)
    expected, expected_gradients = gradients_of(case, [each.to_float64() for each in inputs])
    for output, exact in zip(outputs, expected, strict=True):
        assert output.dtype == (dtype if output.is_floating_point() else torch.long)
        torch.testing.assert_close(output.to(exact.dtype), exact, **TOLERANCES[dtype])
    for gradient, exact in zip(gradients, expected_gradients, strict=True):
        # sums of many rounded products: their error follows the largest of them
        scale = exact.abs().max().clamp(min=1) if exact.numel() else 1
        torch.testing.assert_close(gradient.double() / scale, exact / scale, **TOLERANCES[dtype])


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_runs_repeat_bit_for_bit(case):
    inputs = case.inputs(torch.float32)
    threads = torch.get_num_threads()
    try:
        with compiled_ops(True):
            outputs, gradients = gradients_of(case, inputs)
            again, gradients_again = gradients_of(case, inputs)
            torch.set_num_threads(threads + 2)
            with_threads, _ = gradients_of(case, inputs)
    finally:
        torch.set_num_threads(threads)
    for before, after in zip(outputs + gradients, again + gradients_again, strict=True):
        assert torch.equal(before, after)
    for before, after in zip(outputs, with_threads, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("name", VALID)
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.hf_vtc, name).default, opcheck_arguments(name))


def test_every_op_is_checked():
    defined = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("hf_vtc::")}
    assert defined == VALID.keys()


def all_four(x: torch.Tensor, index: torch.Tensor, offsets: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A function of the rows `x` `(2 * 16, 4)` that goes through every op."""
    means = segment_mean(x, index, offsets)
    folded = unshuffle_layernorm(x.unflatten(0, (2, 16)), 2, weight, weight, 1e-5, tiles=torch.tensor([1, 0]))
    pooled = pool_pyramid(x.unflatten(0, (2, 16)), [16, 8, 2])
    grouped, _ = assign_segment_mean(folded.transpose(1, 2).contiguous(), pooled[2].repeat(1, 2, 1), eps=1.0)
    return means.sum() + pooled[1].square().sum() + grouped.square().sum() + folded.square().mean()


@pytest.mark.slow
def test_compiles_without_a_graph_break():
    x, weight = torch.randn(32, 4, requires_grad=True), torch.randn(16, requires_grad=True)
    index, offsets = torch.randint(32, (9,)), torch.tensor([0, 4, 4, 9])
    with compiled_ops(True):
        eager = all_four(x, index, offsets, weight)
        expected = torch.autograd.grad(eager, (x, weight))
        compiled = torch.compile(all_four, fullgraph=True)(x, index, offsets, weight)
        gradients = torch.autograd.grad(compiled, (x, weight))
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_outputs_are_those_of_their_tiles(dtype):
    """They are written past the caches and into huge pages, which one tile at a time is too small for."""
    # an odd number of registers in a row, and more than one chunk of columns
    features = torch.randn(7, 32 * 32, 1120 if dtype == torch.float32 else 2080).to(dtype)
    affine = torch.randn(2, 4 * features.shape[2], dtype=dtype).unbind()
    scales = [1024, 512, 256, 128, 64]

    def outputs(tiles: torch.Tensor) -> list[torch.Tensor]:
        return [unshuffle_layernorm(tiles, 2, *affine, 1e-5), *pool_pyramid(tiles, scales)]

    with compiled_ops(True):
        together = outputs(features)
        apart = [outputs(tile) for tile in features.split(1)]
    assert together[0].nbytes > 16 << 20 > apart[0][0].nbytes * 2
    for output, tiles in zip(together, zip(*apart)):
        assert torch.equal(output, torch.cat(tiles))


def test_first_of_equal_groups_wins_and_nan_beats_all():
    logits = torch.tensor(
        [[[1.0, 2.0, float("nan"), 0.0], [1.0, 3.0, float("nan"), float("nan")], [0.0, 3.0, 9.0, 9.0]]]
    )
    values = torch.eye(4)[None]
    with compiled_ops(True):
        _, group_idx = assign_segment_mean(logits, values)
    assert torch.equal(group_idx, logits.argmax(1))
    assert group_idx.tolist() == [[0, 1, 0, 1]]


def test_nan_infinity_and_halves_are_stored_as_torch_rounds_them():
    # each kind: halfway cases, subnormal numbers, overflow, NaN
    wide = torch.tensor(
        [1 + 2**-9, 1 + 3 * 2**-9, 65519.0, 65520.0, 2e-8, 6e-8, 1e-41, -0.0, float("inf"), float("nan")]
    )
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.stack([wide, wide]).to(dtype)
        with compiled_ops(True):
            means = segment_mean(x, torch.tensor([0, 1, 0]), torch.tensor([0, 2, 3]))
        # equal rows have themselves as their mean
        torch.testing.assert_close(means, x, rtol=0, atol=0, equal_nan=True)
        half = x[:1].float() / 2
        with compiled_ops(True):
            grouped, _ = assign_segment_mean(torch.zeros(1, 1, 1), x[None, :1], eps=1.0)
        torch.testing.assert_close(grouped[0], half.to(dtype), rtol=0, atol=0, equal_nan=True)


REFUSED: Sequence[tuple[str, Callable, str]] = [
    ("index", lambda: segment_mean(torch.zeros(2, 3), torch.tensor([2]), torch.tensor([0, 1])), "must lie in 0 to 1"),
    (
        "falling offsets",
        lambda: segment_mean(torch.zeros(2, 3), torch.tensor([0]), torch.tensor([0, 2, 1])),
        "not fall",
    ),
    ("short offsets", lambda: segment_mean(torch.zeros(2, 3), torch.tensor([0]), torch.tensor([0, 0])), "end with 1"),
    (
        "tile",
        lambda: unshuffle_layernorm(
            torch.zeros(2, 4, 3), 2, torch.ones(12), torch.ones(12), 1e-5, tiles=torch.tensor([1, 1])
        ),
        "comes twice",
    ),
    ("weight", lambda: unshuffle_layernorm(torch.zeros(2, 4, 3), 2, torch.ones(9), torch.ones(9), 1e-5), "12 entries"),
    ("scale", lambda: pool_pyramid(torch.zeros(2, 16, 3), [5]), "granularity of 5"),
    (
        "group",
        lambda: assign_segment_mean(torch.zeros(1, 2, 3), torch.zeros(1, 3, 4), group_idx=torch.tensor([[0, 1, 2]])),
        "must lie in 0 to 1",
    ),
]


@pytest.mark.parametrize(("call", "message"), [each[1:] for each in REFUSED], ids=[each[0] for each in REFUSED])
def test_what_would_read_beyond_memory_is_refused(call, message):
    with compiled_ops(True), pytest.raises((RuntimeError, ValueError), match=message):
        call()


def test_a_second_derivative_is_refused_and_the_reference_has_one():
    x = torch.randn(4, 3, requires_grad=True)
    plan = torch.tensor([0, 1, 2]), torch.tensor([0, 2, 3])
    with compiled_ops(True):
        (first,) = torch.autograd.grad(segment_mean(x, *plan).square().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="no second derivative"):
            first.sum().backward()
    with compiled_ops(False):
        (first,) = torch.autograd.grad(segment_mean(x, *plan).square().sum(), x, create_graph=True)
    assert first.requires_grad


def test_autocast_means_the_same_with_and_without_kernels():
    features, weight = torch.randn(1, 4, 3, dtype=torch.bfloat16), torch.ones(12)
    outputs = []
    for enabled in (True, False):
        with compiled_ops(enabled), torch.autocast("cpu", torch.bfloat16):
            outputs.append(unshuffle_layernorm(features, 2, weight, weight, 1e-5))
    assert outputs[0].dtype == outputs[1].dtype
    torch.testing.assert_close(*outputs)


def test_what_the_kernels_do_not_take_runs_the_reference():
    class Wrapped(torch.Tensor):
        pass

    plan = torch.tensor([0, 2]), torch.tensor([0, 2])
    with compiled_ops(True):
        assert segment_mean(torch.ones(3, 2, dtype=torch.float64), *plan).dtype == torch.float64
        assert segment_mean(torch.ones(3, 2).as_subclass(Wrapped), *plan).tolist() == [[1.0, 1.0]]
        assert pool_pyramid(torch.ones(1, 4, 2, device="meta"), [2])[0].shape == (1, 2, 2)
        levels = pool_pyramid(torch.arange(256.0).reshape(1, 256, 1), [256, 1])
    assert levels[1].item() == 127.5 and ops_vtc._MAX_HALVINGS < 8


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_references_agree_with_plain_loops(case):
    inputs = [each.to_float64() for each in case.inputs(torch.float32)]
    with torch.no_grad(), compiled_ops(False):
        outputs = outputs_of(case, inputs)
    for output, expected in zip(outputs, case.by_loops(*(each.value for each in inputs)), strict=True):
        torch.testing.assert_close(output.double(), expected.double(), rtol=1e-10, atol=1e-10)
