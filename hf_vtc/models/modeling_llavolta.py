"""LLaVolta / Visual Context Compressor: images get shorter in the middle of the decoder.

Paper: "Efficient Large Multi-modal Models via Visual Context Compression" (arXiv 2406.20092, NeurIPS 2024). Upstream:
Beckschen/LLaVolta@31ec151 `llava/model/language_model/llava_llama.py` (Apache-2.0); checkpoints are LLaVA-1.5's, since
the compressor has no parameters.

Before decoder layer K every span of V visual tokens becomes floor(V / S) means of S neighbours; text stays, and keeps
its positions. A pooled token stands where its first member stood, `S` apart, at position `(S - 1) // 2` further on.

Ours: spans from the prompt instead of a constant, left padding, text-only rows, unequal counts per row, beams, static
caches, every decoder of the Llama, Qwen2, Qwen3 and Mistral families; budgets; compressors other than means; grids of
Qwen's bases, whose windows end with a row, or span frames of a video, and whose tokens keep their coordinates; frames
of LLaVA-OneVision's videos, each a span of its own. Where we differ: positions are exact where the original rounds
means in float16 (from position 1024 on), unless `float16_positions` asks for that, and decoding with K = 0 works.

`modeling_compressors_llavolta.py` makes spans shorter, `host_decoder_vtc.py` runs the layers around that; this file
says which spans, and by how much.
"""

import math
from dataclasses import replace

import torch

from .configuration_llavolta import LlavoltaConfig
from .head_vtc import VtcForConditionalGeneration
from .layout_vtc import Layout
from .modeling_compressors_llavolta import float16_means, shorten
from .modeling_vtc import VtcModel
from .packing_vtc import DecodePlan, PackedPrompt, first_slots, pack_shortened
from .vision_vtc import Choice, Scores, VisualTokens, VtcVisionHalf


class LlavoltaSteps:
    """Images get shorter before a decoder layer, or before the sequence is built.

    `image_hidden_states` of the outputs are the visual tokens as the layers behind see them first. `hidden_states`
    are compact and of two lengths: entry i is the output of layer i - 1, so entry K is what was shortened.
    """

    config_class = LlavoltaConfig

    def choose(self, scores: list[torch.Tensor], layout: Layout) -> Choice:
        """The stride of each image, 1 = as it is, and of frames how many share a window."""
        config = self.config
        strides = [config.stride_of_frame(config.stride_of(level)) for level in layout.levels]
        enter = layout.num_reserved if config.compress_layer_idx > 0 else layout.num_leaving
        return Choice(enter, layout.num_leaving, strides=strides, frames=layout.frames_of_windows)

    def connect(self, features: torch.Tensor, choice: Choice, layout: Layout, scores: Scores | None) -> VisualTokens:
        """Project, and shorten the images here if no decoder layer comes first."""
        visual = super().connect(features, choice, layout, scores)
        return self.shorten_before(visual, layout.num_reserved, choice, layout)

    def shorten_before(
        self, visual: VisualTokens, lengths: torch.LongTensor, choice: Choice, layout: Layout
    ) -> VisualTokens:
        """Shorten images of `lengths` `(num_images,)` that follow each other, unless a decoder layer comes first."""
        config = self.config
        if config.compress_layer_idx > 0 or not choice.shortens:
            return visual
        if config.compress_layer_idx == 0 and config.float16_positions:
            raise ValueError(
                "`float16_positions` needs `compress_layer_idx` of at least 1, got 0, at which the released code "
                "cannot decode. Set it to False, or give `vtc_budget='full'`."
            )
        spans = choice.spans([0] * len(lengths), lengths.cumsum(0) - lengths, lengths, layout.token_columns)
        positions = layout.visual_positions
        side = math.isqrt(config.image_seq_length)
        shortened = shorten(visual.embeds, spans, config.compressor, side, self.training)
        entered, slots = visual.slots, shortened.host_slots
        embeds, rows = shortened.take(visual.embeds, slots), visual.layer_rows
        if rows is not None:
            rows = torch.stack([shortened.take(each, slots) for each in rows])
        if config.compress_layer_idx == -1:
            slots = first_slots(lengths, choice.num_kept)
        slots = slots if entered is None else entered[slots]
        if config.compress_layer_idx == -1:
            return replace(visual, embeds=embeds, slots=slots, layer_rows=rows)
        shifts = shortened.shifts
        if positions is not None:
            places = positions.to(shifts.device, non_blocking=True)
            shifts = (shortened.moved(places) - places)[:, shortened.slots]
        return replace(
            visual, embeds=embeds, slots=slots, position_shifts=shifts, entered_slots=entered, layer_rows=rows
        )


class LlavoltaVision(LlavoltaSteps, VtcVisionHalf):
    """Tower and connector of a LLaVA-type model, whose images get shorter if that is before its sequence is built."""


class LlavoltaModel(LlavoltaSteps, VtcModel):
    """A LLaVA-type model without a head, whose images get shorter before a decoder layer."""

    reads_padding_mask = True

    def shorten(
        self, states: torch.Tensor, position_ids: torch.LongTensor, plan: DecodePlan, scores: torch.Tensor | None
    ) -> tuple[PackedPrompt, torch.Tensor]:
        """Shorten the images of a sequence `(B, L, D)`; rows become ragged and are padded on the left.

        Nothing is read back from the device: how many tokens stay is known, whichever they are.
        """
        config, (num_rows, length) = self.config, states.shape[:2]
        flat, rows = states.flatten(0, 1), plan.layer_rows
        spans = [span._replace(row=0, start=span.row * length + span.start) for span in plan.spans]
        side = math.isqrt(config.image_seq_length)
        shortened = shorten(flat, spans, config.compressor, side, self.training, scores)
        text, counts = plan.real.clone(), plan.real.sum(1)
        for span in plan.spans:
            text[span.row, span.start : span.start + span.length] = False
            counts[span.row] -= span.length
        for span, num_kept in zip(plan.spans, shortened.num_kept, strict=True):
            counts[span.row] += num_kept
        # the plan is made on the CPU, unless the tokens that stay were chosen on the device
        text = text.to(shortened.host_slots.device, non_blocking=True)
        kept = text.flatten().index_fill(0, shortened.host_slots, True).unflatten(0, (num_rows, length))
        positions = position_ids.expand(*position_ids.shape[:-2], num_rows, -1).flatten(-2)
        if config.float16_positions and shortened.members is not None:
            plan = (each.to(positions.device) for each in (shortened.members, shortened.widths))
            positions = positions.index_copy(-1, shortened.slots, float16_means(positions, *plan))
        else:
            positions = shortened.moved(positions)
        rows = None if rows is None else rows[plan.layer_idx :]
        positions = positions.unflatten(-1, (num_rows, length))
        layout = pack_shortened(shortened.take, states, kept, counts, positions, rows)
        return layout, shortened.take(flat, shortened.host_slots)


class LlavoltaForConditionalGeneration(VtcForConditionalGeneration):
    """A LLaVA-type model whose images get shorter before a decoder layer, with a language modelling head."""

    config_class = LlavoltaConfig
    model_class = LlavoltaModel
