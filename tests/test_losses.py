"""Training objectives, by hand on three numbers."""

import json
import math

import pytest
import torch

from hf_vtc.trainers.losses import (
    SlidingWindowPercentile,
    compression_labels,
    consistency_kl,
    loss_ratio,
    mean_over_items,
    mean_per_row,
    router_cross_entropy,
    router_entropy,
    token_cross_entropy,
    token_kl,
)

REFERENCE = torch.tensor([[0.5, 0.25, 0.25]]).log()
POLICY = torch.tensor([[0.25, 0.25, 0.5]]).log()


def test_token_kl_is_forward_kl_over_the_vocabulary():
    # 0.5 ln 2 + 0.25 ln 1 + 0.25 ln 0.5; logits may be shifted by any constant
    expected = 0.25 * math.log(2)
    torch.testing.assert_close(token_kl(REFERENCE, POLICY + 3.0), torch.tensor([expected]))


def test_token_kl_puts_the_reference_first():
    reference = torch.tensor([[0.8, 0.1, 0.1]]).log()
    policy = torch.tensor([[0.5, 0.25, 0.25]]).log()
    forward = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.1 / 0.25)
    backward = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.25 / 0.1)
    assert abs(forward - backward) > 1e-2
    torch.testing.assert_close(token_kl(reference, policy), torch.tensor([forward]))


def test_token_kl_names_both_shapes():
    with pytest.raises(ValueError, match=r"\(1, 3\) and \(1, 2\)"):
        token_kl(REFERENCE, POLICY[:, :2])


def test_consistency_kl_is_the_mean_over_response_tokens():
    # three tokens: one that differs by 0.25 ln 2, two that agree
    reference = REFERENCE.repeat(3, 1)
    policy = torch.cat([POLICY, REFERENCE, REFERENCE])
    expected = 0.25 * math.log(2) / 3
    torch.testing.assert_close(consistency_kl(reference, policy), torch.tensor(expected))
    # micro-batches of 1 and 2 tokens add up to the same mean
    parts = [consistency_kl(reference[part], policy[part], num_items=3) for part in (slice(0, 1), slice(1, 3))]
    torch.testing.assert_close(sum(parts), torch.tensor(expected))


def test_consistency_kl_gives_the_policy_the_difference_of_probabilities():
    reference = REFERENCE.clone().requires_grad_()
    policy = POLICY.clone().requires_grad_()
    consistency_kl(reference, policy).backward()
    # d KL / d logits = policy - reference
    torch.testing.assert_close(policy.grad, torch.tensor([[-0.25, 0.0, 0.25]]))
    assert reference.grad is None


def test_consistency_kl_of_no_token_is_zero_and_differentiable():
    policy = torch.zeros(0, 3, requires_grad=True)
    loss = consistency_kl(torch.zeros(0, 3), policy)
    loss.backward()
    assert loss.item() == 0.0
    assert consistency_kl(torch.zeros(0, 3), policy, num_items=0).item() == 0.0


def test_token_cross_entropy():
    torch.testing.assert_close(
        token_cross_entropy(REFERENCE, torch.tensor([1])), torch.tensor([math.log(4)]), rtol=1e-6, atol=1e-6
    )


def test_mean_over_items():
    values = torch.tensor([1.0, 2.0, 6.0])
    assert mean_over_items(values).item() == 3.0
    assert mean_over_items(values, num_items=18).item() == 0.5
    assert mean_over_items(values, num_items=torch.tensor(9)).item() == 1.0


def test_mean_per_row_is_nan_without_tokens():
    means = mean_per_row(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0, 2, 2]), num_rows=3)
    assert means[[0, 2]].tolist() == [1.0, 4.0]
    assert means[1].isnan()


def test_loss_ratio():
    ratios = loss_ratio(torch.tensor([3.0, 1.0, 0.0]), torch.tensor([1.0, 3.0, 0.0]), eps=1.0)
    assert ratios.tolist() == [1.5, 0.25, 0.0]


def test_compression_labels_keep_a_tie_and_skip_nan():
    ratios = torch.tensor([0.9, 1.0, 1.1, float("nan")])
    assert compression_labels(ratios, threshold=1.0).tolist() == [0, 1, 1, -100]


def test_router_cross_entropy():
    logits = torch.log(torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.1, 0.9]]))
    labels = torch.tensor([0, 0, -100])
    expected = (math.log(2) + math.log(4)) / 2
    torch.testing.assert_close(router_cross_entropy(logits, labels), torch.tensor(expected))
    torch.testing.assert_close(router_cross_entropy(logits, labels, num_items=6), torch.tensor(expected / 3))


def test_router_cross_entropy_without_labels_has_zero_gradient():
    logits = torch.randn(3, 2, requires_grad=True)
    router_cross_entropy(logits, torch.full((3,), -100)).backward()
    assert torch.equal(logits.grad, torch.zeros(3, 2))


def test_router_entropy():
    assert router_entropy(torch.zeros(3, 2)).item() == pytest.approx(math.log(2))
    assert router_entropy(torch.tensor([[40.0, 0.0]])).item() == pytest.approx(0.0, abs=1e-6)


def test_sliding_window_percentile_of_three_numbers():
    window = SlidingWindowPercentile(window_length=3, percentile=25.0)
    assert window.threshold() is None
    window.update([4.0, 1.0, 2.0])
    # sorted 1, 2, 4; position 0.5
    assert window.threshold() == 1.5
    # 4.0, the oldest, leaves
    window.update([8.0])
    assert len(window) == 3
    assert window.threshold() == 1.5
    window.update([8.0])
    assert window.threshold() == 5.0


@pytest.mark.parametrize(("percentile", "expected"), [(0.0, 1.0), (50.0, 2.0), (100.0, 4.0)])
def test_sliding_window_percentile_range(percentile, expected):
    window = SlidingWindowPercentile(window_length=10, percentile=percentile)
    window.update([4.0, 1.0, 2.0])
    assert window.threshold() == expected


def test_sliding_window_percentile_agrees_with_torch():
    values = torch.rand(101, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    window = SlidingWindowPercentile(window_length=64, percentile=37.0)
    window.update(values.tolist())
    assert window.threshold() == pytest.approx(torch.quantile(values[-64:], 0.37).item(), rel=1e-12)


def test_sliding_window_percentile_state_survives_json():
    first = SlidingWindowPercentile(window_length=4, percentile=30.0)
    first.update([1 / 3, 0.1, 2.0])
    second = SlidingWindowPercentile(window_length=4, percentile=30.0)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for window in (first, second):
        window.update([0.7, 0.2])
    assert first.threshold() == second.threshold()
    assert list(first.values) == list(second.values) == [0.1, 2.0, 0.7, 0.2]


def test_sliding_window_percentile_refuses_another_percentile():
    window = SlidingWindowPercentile(window_length=4, percentile=30.0)
    with pytest.raises(ValueError, match="`percentile` of the saved window is 50"):
        window.load_state_dict(SlidingWindowPercentile(window_length=4, percentile=50.0).state_dict())


@pytest.mark.parametrize("arguments", [{"window_length": 0}, {"percentile": -1.0}, {"percentile": 101.0}])
def test_sliding_window_percentile_checks_its_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        SlidingWindowPercentile(**arguments)
