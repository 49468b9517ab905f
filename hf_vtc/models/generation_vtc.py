"""`generate` on prompts that are routed and packed once, before the decoding loop (contract C3)."""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import Any

import torch
from transformers import Cache, GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import ModelOutput

from .held_vtc import held_by, hold
from .host_vtc import CACHE_NAME, cache_of, given_cache, is_recurrent, named_cache
from .packing_vtc import DecodePlan, PackedPrompt, is_left_padded, pack_visual_tokens
from .prompt_vtc import OF_PROCESSORS, VisionInputs, leaves_a_choice

# arguments of the stock method that may follow `inputs` and `generation_config` without their names
_POSITIONAL = tuple(inspect.signature(GenerationMixin.generate).parameters)[3:]

# in which prompt learning looks for a cache
_CACHE_NAME_OF_PEFT = "past_key_values"

# what does not work with a packed prompt: the value that asks for nothing, and the remedy
_UNPACKABLE = {
    "prefill_chunk_size": (None, "Leave it out: a compressed prompt is prefilled in one piece."),
    "assistant_model": (None, "Use `prompt_lookup_num_tokens`: a draft model would not see the packed prompt."),
    "assistant_early_exit": (None, "Use `prompt_lookup_num_tokens`: drafts would not see the packed prompt."),
    "token_healing": (False, "Leave it out: it replaces tokens of a prompt that is packed already."),
    "encoder_repetition_penalty": (1.0, "Use `repetition_penalty`: a packed prompt reaches no encoder's penalty."),
    "encoder_no_repeat_ngram_size": (0, "Use `no_repeat_ngram_size`: a packed prompt reaches no encoder's ban."),
    "position_ids": (None, "Leave it out: positions of a packed prompt follow from `attention_mask`."),
}


_DRAFTS = ("prompt_lookup_num_tokens", "assistant_model")


# transformers 5 looks for "GenerationMixin" in the qualified name of `generate`, and else makes a new class of every
# model that it loads by remote code
class VtcGenerationMixin(GenerationMixin):
    """`GenerationMixin` for a head whose `model` is a `VtcModel`."""

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.LongTensor | ModelOutput:
        """`GenerationMixin.generate` on prompts that are routed and packed once, before the decoding loop.

        Takes everything that the stock method takes, the vision arguments of `forward`, and returns the original
        prompts followed by the new tokens, so that `out[:, input_ids.shape[1]:]` holds the answer. Logits processors
        and stopping criteria see the packed prompt. A `vtc_budget` of the generation config is the default; the call's
        own argument wins, None included. The placeholder of images is never generated.

        Raises:
            ValueError: bad images, placeholders or budgets as in `forward`; an argument that a packed prompt cannot
                honour, such as `assistant_model`, together with images or right-padded text.
        """
        kwargs.update(zip(_POSITIONAL, args, strict=False))
        self._refuse_drafts_of_recurrent(generation_config, kwargs)
        kwargs["logits_processor"] = self._without_placeholders(kwargs.get("logits_processor"))
        if kwargs.get("router_decisions") is None and "vtc_budget" not in kwargs:
            kwargs["vtc_budget"] = self._asked_for("vtc_budget", generation_config, kwargs)
        vision = VisionInputs(**{name: kwargs.pop(name, None) for name in VisionInputs.__dataclass_fields__})
        # the stock method refuses what only processors know
        kwargs = {name: value for name, value in kwargs.items() if name not in OF_PROCESSORS}
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        cache = given_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        if cache is not None:
            kwargs.update(named_cache(cache))
        mask = kwargs.get("attention_mask")
        if not vision.given:
            if input_ids is not None:
                self.model.require_no_placeholders(input_ids)
            if input_ids is None or mask is None or is_left_padded(mask):
                with self._prompt_learning():
                    return super().generate(input_ids, generation_config, **kwargs)
        self._refuse_unpackable(generation_config, kwargs)
        if not vision.given:
            # the stock loop would continue after the padding
            embeds, mask = self.get_input_embeddings()(input_ids), kwargs.pop("attention_mask").cpu()
            keep = torch.ones_like(mask, dtype=torch.bool)
            packed = pack_visual_tokens(embeds, keep, mask, align_left=True, expands=False)
            return self._generate_packed(packed, input_ids, generation_config, kwargs)

        packed, num_images, plan = self._packed_prompt(input_ids, vision, cache, kwargs)
        if plan is not None:
            kwargs["decode_plan"] = plan
        if input_ids is None:
            return self._generate_packed(packed, None, generation_config, kwargs)
        if cache is not None:
            self._require_continued(packed.pack_ids(input_ids), cache.get_seq_length(), vision)
        out = self._generate_packed(packed, input_ids, generation_config, kwargs)
        filled = cache_of(out) if isinstance(out, ModelOutput) else cache
        if filled is not None:
            hold(filled, input_ids, mask, vision, packed, num_images, plan)
        return out

    def _require_continued(self, packed_ids: torch.LongTensor, num_cached: int, vision: VisionInputs) -> None:
        """Raise for a prompt that a filled cache does not begin, or whose images may be decided otherwise now."""
        _require_shorter_cache(num_cached, packed_ids.shape[1])
        new_ids = packed_ids[:, num_cached:]
        new_images = any(bool((new_ids == token_id).any()) for token_id in self.config.placeholder_ids)
        if num_cached > 0 and (new_images or self.model.routes_by_text):
            _require_settled_decisions(vision, self.model.budgets_settle)

    def _generate_packed(
        self,
        packed: PackedPrompt,
        input_ids: torch.LongTensor | None,
        generation_config: GenerationConfig | None,
        kwargs: dict[str, Any],
    ) -> torch.LongTensor | ModelOutput:
        """The stock loop on a packed prompt; the original one `(B, L)` comes back in its place."""
        batch_size, packed_length = packed.inputs_embeds.shape[:2]
        mask = packed.attention_mask
        if mask is None:
            mask = torch.ones(batch_size, packed_length, dtype=torch.long, device=packed.inputs_embeds.device)
        prompt = {"inputs_embeds": packed.inputs_embeds, "attention_mask": mask}
        if input_ids is None:
            # as in the stock method, a prompt of embeddings gives back new tokens only
            with self._prompt_learning():
                return super().generate(None, generation_config, **prompt, **kwargs)

        generation_config = self._lengths_without_prompt(generation_config, kwargs, input_ids.shape[1])
        if kwargs.get("streamer") is not None:
            kwargs["streamer"] = _FullPromptStreamer(kwargs["streamer"], input_ids)
        # the loop looks tokens up in the vocabulary: embeddings of candidates, scores of repeated tokens
        packed_ids = self.model.ids_with_embeddings(packed.pack_ids(input_ids))
        with self._prompt_learning():
            out = super().generate(packed_ids, generation_config, **prompt, **kwargs)
        sequences = out.sequences if isinstance(out, ModelOutput) else out
        prompts = input_ids.repeat_interleave(sequences.shape[0] // batch_size, dim=0)
        sequences = torch.cat([prompts.to(sequences.device), sequences[:, packed_length:]], dim=1)
        if not isinstance(out, ModelOutput):
            return sequences
        out.sequences = sequences
        return out

    def _packed_prompt(
        self, input_ids: torch.LongTensor | None, vision: VisionInputs, cache: Cache | None, kwargs: dict[str, Any]
    ) -> tuple[PackedPrompt, int, DecodePlan | None]:
        """A prompt of text and images as the language model sees it, the number of its images, and its plan.

        Takes mask and embeddings out of `kwargs`. What the cache holds of the prompt is left as it is.
        """
        mask, embeds = kwargs.pop("attention_mask", None), kwargs.pop("inputs_embeds", None)
        packing = {"align_left": True, "expands": False}
        # virtual tokens of PEFT may stand in the cache
        held = None if "prepare_inputs_for_generation" in vars(self) else held_by(cache, input_ids, mask, vision)
        if held is not None:
            behind, later = held.behind(vision), input_ids[:, held.length :]
            if not behind.given:
                self.model.require_no_placeholders(later)
                text = self.get_input_embeddings()(later)
                packed = PackedPrompt(text, None, None, torch.ones_like(later, dtype=torch.bool))
                return held.followed_by(packed), held.num_images, held.plan
            # a plan speaks of the columns of a whole prompt
            compressed = self.model.compress_prompt(later, behind, **packing) if held.plan is None else None
            if compressed is not None and compressed.plan is None:
                num_images = held.num_images + len(compressed.num_kept)
                return held.followed_by(compressed.packed), num_images, None
        compressed = self.model.compress_prompt(input_ids, vision, mask, inputs_embeds=embeds, **packing)
        return compressed.packed, len(compressed.num_kept), compressed.plan

    def _asked_for(self, name: str, generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> Any:
        """A generation parameter as the stock method finds it: of the call, its config or the model's, or None."""
        if kwargs.get(name) is not None:
            return kwargs[name]
        configs = (
            [self.generation_config] if generation_config is None else [generation_config, self.generation_config]
        )
        if kwargs.get("use_model_defaults") is False:  # 4.57 only
            configs = configs[:1]
        stock = vars(_stock_config()).get(name)
        given = [vars(config).get(name) for config in configs]
        return next((value for value in given if value is not None and value != stock), None)

    def _refuse_unpackable(self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> None:
        for name, (neutral, remedy) in _UNPACKABLE.items():
            value = self._asked_for(name, generation_config, kwargs)
            if value is not None and (neutral is None or value != neutral):
                raise ValueError(f"`{name}` does not work together with images or right-padded prompts. {remedy}")

    def _refuse_drafts_of_recurrent(self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> None:
        for name in _DRAFTS if is_recurrent(self.config.text_config) else ():
            if self._asked_for(name, generation_config, kwargs) is not None:
                raise ValueError(
                    f"`{name}` does not work with a decoder that has recurrent layers, as Qwen3.5's: what they keep "
                    "of tokens that are rejected cannot be taken back. Leave it out."
                )

    def _without_placeholders(self, given: list[LogitsProcessor] | None) -> LogitsProcessorList:
        """`given`, and one that keeps the placeholder out: what `generate` returns can be a prompt again."""
        return LogitsProcessorList([*(given or ()), _NoPlaceholder(self.config.placeholder_ids)])

    @contextmanager
    def _prompt_learning(self) -> Iterator[None]:
        """Let virtual tokens of PEFT stand before packed embeddings while the body runs.

        For prompt learning PEFT replaces `prepare_inputs_for_generation` by a method that embeds the ids of the prompt
        once more; what it puts before them is kept, and they are replaced by the embeddings that were packed. And it
        knows the cache by its older name alone (PEFT 0.21.2): by another it finds none, and puts virtual tokens before
        every new token.
        """
        replaced = vars(self).get("prepare_inputs_for_generation")
        if replaced is None:
            yield
            return

        num_virtual = 0

        @wraps(type(self).prepare_inputs_for_generation)
        def prepare(
            input_ids: torch.LongTensor, *args: Any, inputs_embeds: torch.Tensor | None = None, **kwargs: Any
        ) -> dict[str, Any]:
            nonlocal num_virtual
            positions = kwargs.get("cache_position")  # 4.57 only
            prefill = kwargs.get("is_first_iteration") or positions is not None and int(positions[0]) == 0
            inputs = replaced(input_ids, *args, **kwargs, cache_name=_CACHE_NAME_OF_PEFT)
            if _CACHE_NAME_OF_PEFT in inputs:
                inputs.update(named_cache(inputs.pop(_CACHE_NAME_OF_PEFT)))
            if prefill and inputs_embeds is not None:
                given, cache = inputs.get("inputs_embeds"), inputs.get(CACHE_NAME)
                if given is not None:
                    num_virtual = given.shape[1] - inputs_embeds.shape[1]
                    inputs_embeds = torch.cat([given[:, :num_virtual], inputs_embeds], dim=1)
                elif cache is not None:
                    # of prefix tuning, whose virtual tokens are in the cache
                    num_virtual = int(cache.get_seq_length())
                inputs["inputs_embeds"], inputs["input_ids"] = inputs_embeds, None
            if inputs.get("decode_plan") is not None:
                inputs["decode_plan"] = inputs["decode_plan"].behind(num_virtual)
            return inputs

        self.prepare_inputs_for_generation = prepare
        try:
            yield
        finally:
            self.prepare_inputs_for_generation = replaced

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        *args: Any,
        inputs_embeds: torch.Tensor | None = None,
        decode_plan: DecodePlan | None = None,
        cache_name: str = CACHE_NAME,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The stock method, and the plan of the packed prompt; the cache is returned as `cache_name`.

        The stock method loses embeddings where looked-up candidate tokens follow the prompt (4.57 and 5.x), and where
        a filled cache holds its beginning (4.57).
        """
        # for stop strings alone, but the stock loop hands it to every step
        kwargs.pop("tokenizer", None)
        positions = kwargs.get("cache_position")  # 4.57 only
        prefill = kwargs.get("is_first_iteration") or positions is not None and len(positions) == input_ids.shape[1]
        if prefill and inputs_embeds is not None and input_ids.shape[1] > inputs_embeds.shape[1]:
            candidates = self.get_input_embeddings()(input_ids[:, inputs_embeds.shape[1] :])
            inputs_embeds = torch.cat([inputs_embeds, candidates.to(inputs_embeds.dtype)], dim=1)
        elif positions is not None and inputs_embeds is not None and input_ids.shape[1] == inputs_embeds.shape[1]:
            inputs_embeds = inputs_embeds[:, -len(positions) :]
        inputs = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        if self.model.reads_padding_mask or decode_plan is not None:
            # for static caches the stock method has made masks of one length of cache
            inputs["attention_mask"] = kwargs.get("attention_mask")
        if decode_plan is not None:
            inputs["decode_plan"] = decode_plan
        if CACHE_NAME in inputs:
            inputs[cache_name] = inputs.pop(CACHE_NAME)
        return inputs

    def _lengths_without_prompt(
        self, generation_config: GenerationConfig | None, kwargs: dict[str, Any], prompt_length: int
    ) -> GenerationConfig | None:
        """Turn `max_length` and `min_length`, which count the original prompt, into numbers of new tokens."""
        given = self.generation_config if generation_config is None else generation_config
        stock = _stock_config()
        asked = {
            name: self._asked_for(name, generation_config, kwargs)
            for name in ("max_length", "max_new_tokens", "min_length", "min_new_tokens")
        }
        for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            kwargs.pop(total, None)
            length = asked[total]
            if length is None or asked[new] is not None:
                continue
            if total == "max_length" and length <= prompt_length:
                raise ValueError(
                    f"`max_length` counts the prompt: {length} leaves no room after a prompt of {prompt_length} "
                    "tokens. Raise it, or set `max_new_tokens`."
                )
            kwargs[new] = max(length - prompt_length, 0)
        totals = {total: getattr(stock, total) for total in ("max_length", "min_length")}
        if all(getattr(given, total) == value for total, value in totals.items()):
            return generation_config
        config = copy.deepcopy(given)
        vars(config).update(totals)
        return config


@lru_cache
def _stock_config() -> GenerationConfig:
    """What stands in a config where nobody asks for anything else."""
    return GenerationConfig()


class _NoPlaceholder(LogitsProcessor):
    """Never lets the placeholder of images be generated, where the language model has a score for it."""

    def __init__(self, placeholder_ids: tuple[int, ...]):
        self.placeholder_ids = placeholder_ids

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        known = [token_id for token_id in self.placeholder_ids if token_id < scores.shape[-1]]
        if not known:
            return scores
        scores = scores.clone()
        scores[:, known] = -torch.inf
        return scores


class _FullPromptStreamer(BaseStreamer):
    """Shows a streamer the original prompt in place of the packed one."""

    def __init__(self, streamer: BaseStreamer, input_ids: torch.LongTensor):
        self.streamer = streamer
        self.prompt: torch.LongTensor | None = input_ids

    def put(self, value: torch.Tensor) -> None:
        if self.prompt is not None:
            value, self.prompt = self.prompt.cpu(), None
        self.streamer.put(value)

    def end(self) -> None:
        self.streamer.end()


def _require_shorter_cache(num_cached: int, packed_length: int) -> None:
    if num_cached >= packed_length:
        raise ValueError(
            f"`past_key_values` holds {num_cached} tokens, but with this `vtc_budget` the whole prompt has "
            f"{packed_length}: it was filled with another budget. Give the same one, or start without the cache."
        )


def _require_settled_decisions(vision: VisionInputs, budgets_settle: bool) -> None:
    if vision.router_decisions is not None:
        return
    if leaves_a_choice(vision.vtc_budget):
        raise ValueError(
            "A filled `past_key_values` and a longer prompt need a fixed `vtc_budget` or `router_decisions`: with "
            "'auto' a new image, or new text where the router reads it, can change how many tokens the cached images "
            "should have. Fix the budget, or start without the cache."
        )
    entries = vision.vtc_budget if isinstance(vision.vtc_budget, (list, tuple)) else [vision.vtc_budget]
    if not budgets_settle and any(entry != "full" for entry in entries):
        raise ValueError(
            "A filled `past_key_values` and a longer prompt need `router_decisions` here: new text changes which "
            "tokens of the cached images should stay. Give those of the first call, or start without the cache."
        )
