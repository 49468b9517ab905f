"""Whether a server's answer is what a model says in transformers: the same prompt, and the same probabilities.

In float32 greedy answers are equal token by token. In bfloat16 two programs may choose differently where two tokens
are nearly as likely, and everything that follows differs. So the model reads the server's answer in one forward pass:
each of its tokens must have the probability that the server gave, and be the likeliest, within a tolerance.
"""

from typing import Any, NamedTuple

import torch


class Comparison(NamedTuple):
    """Visual tokens, and the largest differences of log-probabilities: to the budget asked for, and to another."""

    num_visual: int
    difference: float
    to_another: float = 0.0


def compare(
    model: Any, inputs: dict[str, torch.Tensor], answer: Any, budget: Any, other: Any, tolerance: float
) -> Comparison:
    """Compare a chat completion, asked with `logprobs` and `return_token_ids`, with a model of hf_vtc.

    Args:
        inputs: what the model's processor makes of the same conversation.
        budget: which the server was asked for.
        other: a budget of other counts, to see how far away its probabilities are; None for none.
        tolerance: of log-probabilities.

    Raises:
        RuntimeError: the prompts or their counts differ, or a probability does by more than `tolerance`.
    """
    choice, placeholder = answer.choices[0], model.config.image_token_id
    answer_ids, logprobs = choice.token_ids, [token.logprob for token in choice.logprobs.content]
    has_images = "pixel_values" in inputs
    asked = {"vtc_budget": budget} if has_images else {}
    num_visual = int(model.count_visual_tokens(**inputs, **asked).sum()) if has_images else 0
    found, expected = answer.prompt_token_ids, inputs["input_ids"][0].tolist()
    num_found = found.count(placeholder)
    texts = [[token for token in prompt if token != placeholder] for prompt in (found, expected)]
    if num_found != num_visual or texts[0] != texts[1]:
        raise RuntimeError(
            f"At budget {budget!r} the server's prompt has {num_found} visual tokens and {len(texts[0])} others, the "
            f"model's {num_visual} and {len(texts[1])}."
        )
    difference = _difference(model, inputs, answer_ids, logprobs, asked)
    if not difference <= tolerance:
        raise RuntimeError(
            f"At budget {budget!r} the server's log-probabilities are {difference:.2g} from the model's (tolerance "
            f"{tolerance:g})."
        )
    if other is None or not has_images:
        return Comparison(num_visual, difference)
    return Comparison(num_visual, difference, _difference(model, inputs, answer_ids, logprobs, {"vtc_budget": other}))


def require_control(comparisons: list[Comparison]) -> str:
    """A line about some comparisons.

    Raises:
        RuntimeError: other budgets fit no worse, so that the comparisons say nothing.
    """
    difference = max(each.difference for each in comparisons)
    to_another = max(each.to_another for each in comparisons)
    if to_another <= difference:
        raise RuntimeError(f"Another budget fits as well ({to_another:.2g}) as the right one ({difference:.2g}).")
    return (
        f"log-probabilities differ by at most {difference:.2g}, from those of other budgets by up to {to_another:.2g}"
    )


@torch.no_grad()
def _difference(
    model: Any, inputs: dict[str, torch.Tensor], answer_ids: list[int], logprobs: list[float], asked: dict[str, Any]
) -> float:
    """How far tokens are from the probabilities that the model gives them, or from the likeliest one's."""
    answer = torch.tensor([answer_ids], device=model.device)
    read = {**inputs, "input_ids": torch.cat([inputs["input_ids"], answer], dim=1)}
    read["attention_mask"] = torch.ones_like(read["input_ids"])
    logits = model(**read, **asked).logits[0, -len(answer_ids) - 1 : -1]
    ours = logits.float().log_softmax(-1)
    own = ours.gather(1, answer[0, :, None])[:, 0]
    server = torch.tensor(logprobs, device=model.device)
    return max(float((own - server).abs().max()), float((ours.max(-1).values - own).max()))
