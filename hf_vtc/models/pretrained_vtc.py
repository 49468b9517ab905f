"""What all of our models are to transformers: flags, and saving with the code beside the weights."""

from typing import Any

from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from .configuration_vtc import VtcConfig


class VtcPreTrainedModel(PreTrainedModel):
    """Loading, saving and the flags that transformers asks for."""

    config_class = VtcConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    model_tags = ["vtc", "vision-token-compression", "custom_code"]
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # how many tokens are kept depends on the data
    _can_compile_fullgraph = False

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers guesses from names of classes in the source; tower and decoder have the attention that is meant
        return True

    def post_init(self) -> None:
        super().post_init()
        parts = [module for module in self.modules() if isinstance(module, PreTrainedModel)]
        names = {name for part in parts for name in part._no_split_modules or ()}
        # of all parts, which transformers 4 does not collect, and none that is not here, which FSDP would miss
        self._no_split_modules = sorted(names & {type(module).__name__ for module in self.modules()})

    def save_pretrained(self, save_directory: str, *args: Any, save_code: bool = True, **kwargs: Any) -> None:
        """`PreTrainedModel.save_pretrained`, and the code beside the weights.

        Args:
            save_directory (`str`): the folder.
            save_code (`bool`): copy the model's source files and write every `auto_map` key, so that the folder loads
                with `trust_remote_code=True` where hf_vtc is not installed. `False` writes neither.
        """
        if save_code:
            self.config.auto_map = self.config.remote_code_map()
        else:
            # a map without files would break every load with trust_remote_code
            vars(self.config).pop("auto_map", None)
        super().save_pretrained(save_directory, *args, **kwargs)
        if save_code and kwargs.get("is_main_process", True):
            custom_object_save(self, save_directory)
