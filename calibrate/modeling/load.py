"""Load a checkpoint into an unmodified transformers model, whatever its weights are stored in.

Transformers cannot read every base that fp8kv meets (FP8 blocks of ragged height, ``kimi_k2``), and reads one
wrongly (MiniMax-M2 before 5.18), so weights are decoded here and configurations are corrected here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    modeling_utils,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config

from fp8kv.calibrate.formats.checkpoint import Checkpoint
from fp8kv.calibrate.modeling.load_report import (
    conversion_failure,
    is_out_of_memory,
    load_report,
)
from fp8kv.calibrate.modeling.weight_stream import Progress, WeightStream
from fp8kv.recipes.errors import CalibrationError, CheckpointError, UnsupportedModelError

_CONFIGURATION_KEYS = ("quantization_config", "compression_config")

# What transformers raises, building a model from a configuration that makes no sense or weights that do not fit it.
_LOAD_ERRORS = (
    ValueError,
    RuntimeError,
    OSError,
    LookupError,
    TypeError,
    ArithmeticError,
    ImportError,
)


def load_config(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Return the transformers configuration, corrected where transformers reads it wrongly.

    * ``kimi_k2`` is DeepSeek-V3's architecture under another ``model_type`` that transformers does not map.
    * MiniMax-M2 configurations carry ``rotary_dim`` 64 of ``head_dim`` 128; transformers before 5.18 ignores it
      and rotates all 128.

    The quantisation entries are dropped: weights are decoded before they reach the model. Where transformers has a
    class of its own, it is used even if remote code is trusted: a checkpoint may need that for its tokenizer only
    (Kimi-K2), and its model code is often older than this transformers.

    Raises:
        UnsupportedModelError: transformers has no class for this ``model_type``, or it needs remote code and
            ``trust_remote_code`` is off.
        CheckpointError: a value of the configuration is not what the architecture needs.
    """
    raw = {key: value for key, value in checkpoint.config.items() if key not in _CONFIGURATION_KEYS}
    model_type = raw.get("model_type")
    try:
        if model_type == "kimi_k2":
            config: PretrainedConfig = DeepseekV3Config.from_dict(
                {**raw, "model_type": "deepseek_v3"}
            )
        else:
            config = AutoConfig.from_pretrained(
                checkpoint.path,
                trust_remote_code=trust_remote_code and model_type not in CONFIG_MAPPING,
                local_files_only=True,
            )
    except StrictDataclassError as error:
        raise CheckpointError(
            f"{checkpoint.path / 'config.json'} is no valid {model_type} configuration: "
            f"{' '.join(str(error).split())}; use the config that the model was published with"
        ) from error
    except (ValueError, OSError, LookupError, TypeError, ArithmeticError) as error:
        raise UnsupportedModelError(
            f"transformers cannot build {model_type!r} from {checkpoint.path / 'config.json'}: "
            f"{_first_line(error)} (models with code of their own need --trust-remote-code)"
        ) from error
    for part in (config, getattr(config, "text_config", None)):
        for key in _CONFIGURATION_KEYS:
            if part is not None and hasattr(part, key):
                delattr(part, key)
    _restore_partial_rotary(config)
    return config


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> nn.Module:
    """Return the model in evaluation mode, weights decoded to ``dtype``, on ``device``.

    Weights of every format go straight to the device, and are decoded there, on transformers' four reading threads.
    Peak memory:

    * of the device: the weights once in ``dtype``; once more the largest tensor that is merged from several, such as
      the first matrices of a layer's experts; and four times what
      :class:`~fp8kv.calibrate.modeling.weight_stream.WeightStream` says of one weight.
    * of the host, if the device is another: 64 MiB, four times
      :data:`~fp8kv.calibrate.modeling.staged_reader.STAGING_BYTES`.

    On a CPU the C library keeps much of what is freed when experts are merged, up to the size of the model; with
    ``MALLOC_MMAP_THRESHOLD_=1048576`` in the environment it gives that back at once.

    Args:
        checkpoint: of a language model, or of one that reads images and text.
        dtype: of the weights, but for those that the architecture keeps in float32.
        device: where they go.
        trust_remote_code: let the checkpoint run Python code of its own.
        progress: is called with the bytes read and the bytes of all weights, from any thread, one at a time.

    Raises:
        UnsupportedModelError: the architecture or the quantisation is unknown.
        CheckpointError: the checkpoint lacks weights that the architecture needs, their shapes differ, or a shard
            cannot be read.
        CalibrationError: the device has too little memory.
    """
    config = load_config(checkpoint, trust_remote_code=trust_remote_code)
    place = torch.device(device)
    too_large = CalibrationError(
        f"the weights of {checkpoint.path} in {str(dtype).removeprefix('torch.')} do not fit into the memory of "
        f"{place}: use --device cpu or a larger GPU"
    )
    with (
        WeightStream(checkpoint, dtype=dtype, device=place, progress=progress) as stream,
        load_report() as text,
        _no_warm_up(),
    ):
        try:
            model_class = _model_class(config, checkpoint, trust_remote_code)
            model, report = model_class.from_pretrained(
                None,
                config=config,
                generation_config=_generation_config(checkpoint),
                state_dict=stream.weights,
                dtype=dtype,
                device_map={"": place},
                output_loading_info=True,
                # they are refused below, by name
                ignore_mismatched_sizes=True,
                local_files_only=True,
                **_experts_for(place),
            )
        except torch.OutOfMemoryError:
            raise too_large from None
        except _LOAD_ERRORS as error:
            if is_out_of_memory(text):
                raise too_large from None
            reason = conversion_failure(text) or _first_line(error)
            raise CheckpointError(f"cannot load {checkpoint.path}: {reason}") from error
        _check_complete(checkpoint, type(model).__name__, report)
        stream.finish()
    if place.type == "cuda":
        torch.cuda.empty_cache()  # of experts that are merged by now
    model.eval().requires_grad_(False)
    return model  # type: ignore[no-any-return]


def load_tokenizer(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer that lies beside the checkpoint.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(
            checkpoint.path, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(
            f"no usable tokenizer in {checkpoint.path}: {_first_line(error)}; "
            "put tokenizer.json and tokenizer_config.json there"
        ) from error


def pad_token_id(tokenizer: Any) -> int:
    """Return a token id to pad with: the tokenizer's own, else its end of sequence, else 0."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def _model_class(
    config: PretrainedConfig, checkpoint: Checkpoint, trust_remote_code: bool
) -> type[PreTrainedModel]:
    """Return the class itself: the automatic classes do not take weights that were decoded before."""
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if type(config) in mapping:
            return mapping[type(config)]  # type: ignore[no-any-return]
    remote = getattr(config, "auto_map", None) or {}
    if trust_remote_code and "AutoModelForCausalLM" in remote:
        return get_class_from_dynamic_module(  # type: ignore[no-any-return]
            remote["AutoModelForCausalLM"], str(checkpoint.path)
        )
    raise UnsupportedModelError(
        f"transformers has no language model for {type(config).__name__} ({checkpoint.path})"
    )


def _generation_config(checkpoint: Checkpoint) -> GenerationConfig | None:
    """Return what lies beside the weights, None where nothing legible does: transformers then asks the configuration."""
    try:
        return GenerationConfig.from_pretrained(checkpoint.path, local_files_only=True)
    except OSError:
        return None


@contextmanager
def _no_warm_up() -> Iterator[None]:
    """Keep transformers from taking the memory of the whole model as one block first.

    The block would be left full of holes where experts were before they were merged, and none of it could be given
    back to the GPU for the KV cache.
    """
    warm_up = modeling_utils.caching_allocator_warmup
    modeling_utils.caching_allocator_warmup = lambda *_arguments: None
    try:
        yield
    finally:
        modeling_utils.caching_allocator_warmup = warm_up


def _check_complete(checkpoint: Checkpoint, name: str, report: dict[str, Any]) -> None:
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        weight, found, expected = mismatched[0]
        raise CheckpointError(
            f"{len(mismatched)} weights of {checkpoint.path} have other shapes than {name} needs, first {weight!r}: "
            f"{list(found)} instead of {list(expected)}; are config.json and weights of one model?"
        )
    missing = sorted(str(key) for key in report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{checkpoint.path} lacks {len(missing)} weights that {name} needs, first {missing[0]!r}: "
            "is the download complete?"
        )


def _experts_for(device: torch.device) -> dict[str, str]:
    # On a CPU the plain loop over experts is the fastest of transformers' implementations; a GPU keeps the
    # default, one grouped multiplication.
    return {"experts_implementation": "eager"} if device.type == "cpu" else {}


def _restore_partial_rotary(config: PretrainedConfig) -> None:
    rotary_dim = getattr(config, "rotary_dim", None)
    if config.model_type != "minimax_m2" or not rotary_dim:
        return
    config.rope_parameters.setdefault("partial_rotary_factor", rotary_dim / config.head_dim)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    if not text or isinstance(error, KeyError):
        return f"{type(error).__name__} {text}".strip()
    return text.splitlines()[0]
