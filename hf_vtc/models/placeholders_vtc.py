"""Where a prompt has placeholders: in ids, or in embeddings of the placeholder's own row."""

from functools import reduce
from operator import or_

import torch


class PromptPlaceholders:
    """How a model finds the placeholders of images and videos in its prompts."""

    def find_placeholders(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.BoolTensor]:
        """Embeddings `(B, L, D)` of a prompt and where its placeholders are, `(B, L)`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        if inputs_embeds is None:
            embeds = self.get_input_embeddings()(self.ids_with_embeddings(input_ids))
            return embeds, reduce(or_, (input_ids == token_id for token_id in self.config.placeholder_ids))
        if self.placeholder_is_beyond_vocabulary:
            raise ValueError(
                f"`inputs_embeds` cannot say where images belong: the placeholder (id {self.config.image_token_id}) "
                "lies beyond the vocabulary and has no embedding. Pass `input_ids`."
            )
        found = (self._is_embedded(inputs_embeds, token_id) for token_id in self.config.placeholder_ids)
        return inputs_embeds, reduce(or_, found)

    def find_videos(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor | None
    ) -> torch.BoolTensor | None:
        """Where the placeholders of videos are in a prompt, `(B, L)`; None for a model that takes none."""
        token_id = self.config.video_token_id
        if token_id is None or input_ids is not None:
            return None if token_id is None else input_ids == token_id
        return self._is_embedded(inputs_embeds, token_id)

    def _is_embedded(self, inputs_embeds: torch.Tensor, token_id: int) -> torch.BoolTensor:
        token = torch.tensor(token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    @property
    def placeholder_is_beyond_vocabulary(self) -> bool:
        """Whether the placeholder is no token of the language model, as in official LLaVA checkpoints."""
        return self.config.image_token_id >= self.config.text_config.vocab_size

    def ids_with_embeddings(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        """`input_ids`, with token 0 for placeholders that have no row in the embeddings; images replace it anyway."""
        if not self.placeholder_is_beyond_vocabulary:
            return input_ids
        return input_ids.masked_fill(input_ids == self.config.image_token_id, 0)

    def require_no_placeholders(self, input_ids: torch.LongTensor) -> None:
        """Raise a ValueError for a prompt that expects images."""
        for token_id, kind, name in zip(
            self.config.placeholder_ids, ("image", "video"), ("pixel_values", "pixel_values_videos"), strict=False
        ):
            if bool((input_ids == token_id).any()):
                raise ValueError(
                    f"The prompt holds {kind} placeholders (id {token_id}), but no `{name}` were given. Pass "
                    f"everything that the processor returned, or leave {kind}s out of the text."
                )
