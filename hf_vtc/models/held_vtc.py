"""What a filled cache knows of its prompt: images that it holds are neither encoded nor packed again."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import Cache

from .packing_vtc import DecodePlan, PackedPrompt
from .prompt_vtc import Budget, VisionInputs

# whose bits are those of floats of as many bytes
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class HeldPrompt:
    """A prompt as `generate` packed it; stands on the cache that it filled.

    Args:
        input_ids, attention_mask (`torch.Tensor` of shape `(B, L)`): as given, the latter None for no padding.
        packed_mask (`torch.Tensor` of shape `(B, K)`): 0 = padding.
        source_index (`torch.LongTensor` of shape `(B, K)`): original positions of packed ones.
        marks (`torch.LongTensor` of shape `(T,)`): a number of each tile, by which images are known again.
        num_images (`int`): of the prompt.
        vtc_budget, router_decisions: what was asked for them.
        plan ([`DecodePlan`], *optional*): of the packed prompt.
    """

    input_ids: torch.LongTensor
    attention_mask: torch.Tensor | None
    packed_mask: torch.Tensor
    source_index: torch.LongTensor
    marks: torch.Tensor
    num_images: int
    vtc_budget: Budget | Sequence[Budget]
    router_decisions: torch.Tensor | None
    plan: DecodePlan | None

    @property
    def length(self) -> int:
        return self.input_ids.shape[1]

    def begins(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None, vision: VisionInputs) -> bool:
        """Whether a longer prompt, which pads nothing behind this one, begins with it and its images."""
        if input_ids.shape[0] != len(self.input_ids) or input_ids.shape[1] <= self.length:
            return False
        if vision.pixel_values is None or vision.has_videos or vision.supervised is not None:
            return False
        num_new = len(vision.pixel_values) - len(self.marks)
        # of several rows the images of each follow each other
        if num_new < 0 or num_new > 0 and len(input_ids) > 1 or not self.was_asked(vision):
            return False
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        own_mask = torch.ones_like(self.input_ids) if self.attention_mask is None else self.attention_mask
        same = (input_ids[:, : self.length] == self.input_ids).all()
        same &= (mask[:, : self.length] == own_mask).all() & (mask[:, self.length :] != 0).all()
        marks = marks_of(vision.pixel_values[: len(self.marks)])
        return bool(same & (marks == self.marks).all().to(same.device))

    def was_asked(self, vision: VisionInputs) -> bool:
        """Whether a call asks for the images here what was asked for when they were packed."""
        now, then = vision.router_decisions, self.router_decisions
        if now is not None or then is not None:
            return now is not None and then is not None and torch.equal(now[: len(then)].cpu(), then.cpu())
        return _first(vision.vtc_budget, self.num_images) == _first(self.vtc_budget, self.num_images)

    def behind(self, vision: VisionInputs) -> VisionInputs:
        """What a call says about the images behind those here."""
        num_tiles, num_images = len(self.marks), self.num_images
        decisions, budget = vision.router_decisions, vision.vtc_budget
        return VisionInputs(
            vision.pixel_values[num_tiles:],
            None,
            None if vision.num_tiles is None else vision.num_tiles[num_images:],
            None if vision.image_sizes is None else vision.image_sizes[num_images:],
            list(budget)[num_images:] if isinstance(budget, (list, tuple)) else budget,
            None if decisions is None else decisions[len(self.router_decisions) :],
        )

    def followed_by(self, packed: PackedPrompt) -> PackedPrompt:
        """This prompt and what was packed behind it. Embeddings of the cached part are empty: nobody reads them."""
        held = packed.inputs_embeds.new_zeros(*self.source_index.shape, packed.inputs_embeds.shape[2])
        mask, source = packed.attention_mask, packed.source_index
        num_rows, length = packed.inputs_embeds.shape[:2]
        if mask is None:
            mask = self.packed_mask.new_ones(num_rows, length)
        if source is None:
            source = torch.arange(length, device=self.source_index.device).expand(num_rows, -1)
        return PackedPrompt(
            inputs_embeds=torch.cat([held, packed.inputs_embeds], dim=1),
            attention_mask=torch.cat([self.packed_mask, mask], dim=1),
            position_ids=None,
            kept_mask=F.pad(packed.kept_mask, (self.length, 0), value=True),
            source_index=torch.cat([self.source_index, source + self.length], dim=1),
        )


def held_by(
    cache: Cache | None, input_ids: torch.LongTensor | None, attention_mask: torch.Tensor | None, vision: VisionInputs
) -> HeldPrompt | None:
    """The prompt in a cache, if it begins this one and nothing of it has left the cache."""
    held = None if cache is None or input_ids is None else vars(cache).get("vtc_prompt")
    if held is None or cache.get_seq_length() < held.source_index.shape[1]:
        return None
    return held if held.begins(input_ids, attention_mask, vision) else None


def hold(
    cache: Cache,
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor | None,
    vision: VisionInputs,
    packed: PackedPrompt,
    num_images: int,
    plan: DecodePlan | None,
) -> None:
    """Leave on a cache what prompt it was filled with, unless features were given instead of pixels."""
    # a prompt with videos, or with answers that were not to be read, is packed anew
    if vision.pixel_values is None or vision.has_videos or vision.supervised is not None:
        return
    shape, source = packed.inputs_embeds.shape[:2], packed.source_index
    if source is None:
        source = torch.arange(shape[1], device=input_ids.device).expand(shape)
    mask = input_ids.new_ones(shape) if packed.attention_mask is None else packed.attention_mask
    marks, asked = marks_of(vision.pixel_values), (vision.vtc_budget, vision.router_decisions)
    cache.vtc_prompt = HeldPrompt(input_ids, attention_mask, mask, source, marks, num_images, *asked, plan)


def marks_of(pixel_values: torch.Tensor) -> torch.LongTensor:
    """A number `(T,)` for each tile `(T, 3, S, S)`: its bits, weighted by their places."""
    bits = pixel_values.contiguous().flatten(1).view(_INTEGERS[pixel_values.element_size()])
    return (bits * torch.arange(1, bits.shape[1] + 1, device=bits.device)).sum(1)


def _first(vtc_budget: Budget | Sequence[Budget], num_images: int) -> list[Budget]:
    entries = list(vtc_budget) if isinstance(vtc_budget, (list, tuple)) else [vtc_budget] * num_images
    return ["auto" if entry is None else entry for entry in entries[:num_images]]
