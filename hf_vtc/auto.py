"""`AutoModelForVision2Seq` on every supported transformers.

transformers 4.57 still has the class (deprecated), and 5.0 removed it together with its mapping. `hf_vtc` offers it on
both: one line of loading code works across the window, also for a repository whose `auto_map` has only this key.
"""

import copy
import os
from typing import Any

import transformers
import transformers.models.auto
from packaging.version import Version
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

# older versions copy only the direct imports of a local folder's entry file (transformers PR 46022)
REMOTE_CODE_FROM_FOLDER = Version(transformers.__version__) >= Version("5.11")

_ALIAS = "AutoModelForVision2Seq"
_TARGET = "AutoModelForImageTextToText"
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# how the weights are loaded: no business of the config
_WEIGHT_ARGUMENTS = ("config", "dtype", "torch_dtype", "quantization_config")
# what loading a config uses up and loading the weights needs again
_KEPT_ARGUMENTS = (*_HUB_ARGUMENTS, *_WEIGHT_ARGUMENTS, "trust_remote_code", "code_revision")


def _needs_alias(auto_map: dict[str, str] | None) -> bool:
    return auto_map is not None and _ALIAS in auto_map and _TARGET not in auto_map


def _with_alias(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of `config` whose `auto_map` names the class under the key that transformers 5 looks up."""
    config = copy.deepcopy(config)
    config.auto_map = {**config.auto_map, _TARGET: config.auto_map[_ALIAS]}
    return config


def _auto_map_of(path: str | os.PathLike, arguments: dict[str, Any]) -> dict[str, str] | None:
    """The `auto_map` in the `config.json` of a folder or repository, None where there is none."""
    hub_arguments = {name: arguments[name] for name in _HUB_ARGUMENTS if name in arguments}
    try:
        values, _ = PretrainedConfig.get_config_dict(path, **hub_arguments)
    except OSError:
        # an adapter repository has no config; for anything else the delegate raises the better error
        return None
    return values.get("auto_map")


class _DelegatingAutoModelForVision2Seq:
    """Auto class that loads what `AutoModelForImageTextToText` loads, also by the `auto_map` key of its own name.

    It delegates rather than inherits: after a remote load transformers 5 checks that the name of the auto class is one
    of its own, and a subclass of this name would fail there.
    """

    _model_mapping = AutoModelForImageTextToText._model_mapping

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise OSError(
            f"`{_ALIAS}` cannot be instantiated directly. Use `{_ALIAS}.from_pretrained(name_or_path)` or "
            f"`{_ALIAS}.from_config(config)`."
        )

    @classmethod
    def from_config(cls, config: PretrainedConfig, **kwargs: Any) -> PreTrainedModel:
        """Build a model with fresh weights; arguments as for `AutoModelForImageTextToText.from_config`."""
        # `auto_map` is an attribute of configs that came from a repository with code only
        if _needs_alias(vars(config).get("auto_map")):
            config = _with_alias(config)
        return AutoModelForImageTextToText.from_config(config, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *model_args: Any, **kwargs: Any
    ) -> PreTrainedModel:
        """Load a model; arguments as for `AutoModelForImageTextToText.from_pretrained`."""
        config = kwargs.get("config")
        if isinstance(config, PretrainedConfig):
            if _needs_alias(vars(config).get("auto_map")):
                kwargs["config"] = _with_alias(config)
        elif _needs_alias(_auto_map_of(pretrained_model_name_or_path, kwargs)):
            for_config = {name: value for name, value in kwargs.items() if name not in _WEIGHT_ARGUMENTS}
            config, unused = AutoConfig.from_pretrained(
                pretrained_model_name_or_path, return_unused_kwargs=True, **for_config
            )
            kept = {name: kwargs[name] for name in _KEPT_ARGUMENTS if name in kwargs}
            kwargs = {**unused, **kept, "config": _with_alias(config)}
        return AutoModelForImageTextToText.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    @classmethod
    def register(
        cls, config_class: type[PretrainedConfig], model_class: type[PreTrainedModel], exist_ok: bool = False
    ) -> None:
        """Register a pair of classes with `AutoModelForImageTextToText`, whose mapping this class shares."""
        AutoModelForImageTextToText.register(config_class, model_class, exist_ok=exist_ok)


_DelegatingAutoModelForVision2Seq.__name__ = _DelegatingAutoModelForVision2Seq.__qualname__ = _ALIAS

try:
    # up to 4.57: the very object of transformers, so that registrations and isinstance are shared
    from transformers import AutoModelForVision2Seq
except ImportError:
    AutoModelForVision2Seq = _DelegatingAutoModelForVision2Seq


def install_vision2seq() -> None:
    """Make `from transformers import AutoModelForVision2Seq` work on transformers 5 too, for code that insists on it.

    Call it before that import runs. Nothing in `hf_vtc` calls it. On 4.57 it changes nothing.
    """
    transformers.AutoModelForVision2Seq = AutoModelForVision2Seq
    transformers.models.auto.AutoModelForVision2Seq = AutoModelForVision2Seq
