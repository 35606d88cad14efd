"""Load a checkpoint into an unmodified transformers model, whatever its weights are stored in.

Transformers cannot read every base that fp8kv meets (FP8 blocks of ragged height, ``kimi_k2``), and reads one
wrongly (MiniMax-M2 before 5.18), so weights are decoded here and configurations are corrected here.
"""

from __future__ import annotations

import logging
import re
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
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config

from fp8kv.calibrate.formats.checkpoint import Checkpoint
from fp8kv.calibrate.formats.weights import is_quantised, plain_state_dict
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
) -> nn.Module:
    """Return the model in evaluation mode, weights decoded to ``dtype``, on ``device``.

    Peak memory: the weights once in ``dtype`` on ``device``; for a quantised checkpoint that is decoded on the
    host, ``decoded bytes`` of host memory besides.

    Raises:
        UnsupportedModelError: the architecture or the quantisation is unknown.
        CheckpointError: the checkpoint lacks weights that the architecture needs, or their shapes differ.
        CalibrationError: the device has too little memory.
    """
    config = load_config(checkpoint, trust_remote_code=trust_remote_code)
    decoded = is_quantised(checkpoint)
    with _load_report() as text:
        try:
            model_class = _model_class(config, checkpoint, trust_remote_code)
            model, report = model_class.from_pretrained(
                None if decoded else checkpoint.path,
                config=config,
                state_dict=plain_state_dict(checkpoint, dtype) if decoded else None,
                dtype=dtype,
                output_loading_info=True,
                # they are refused below, by name
                ignore_mismatched_sizes=True,
                local_files_only=True,
                **_experts_for(torch.device(device)),
            )
        except _LOAD_ERRORS as error:
            reason = _conversion_failure(text) or _first_line(error)
            raise CheckpointError(f"cannot load {checkpoint.path}: {reason}") from error
    _check_complete(checkpoint, type(model).__name__, report)
    model.eval().requires_grad_(False)
    try:
        return model.to(device)  # type: ignore[no-any-return]
    except torch.OutOfMemoryError:
        raise CalibrationError(
            f"the weights of {checkpoint.path} in {str(dtype).removeprefix('torch.')} do not fit into the memory of "
            f"{device}: use --device cpu or a larger GPU"
        ) from None


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


@contextmanager
def _load_report() -> Iterator[list[str]]:
    """Keep transformers' report on a load, tables and tracebacks, from the log, and give it as text."""
    text: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        text.append(record.getMessage())
        return False

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(keep)
    try:
        yield text
    finally:
        logger.removeFilter(keep)


def _conversion_failure(report: list[str]) -> str | None:
    """Name the weight that transformers could not put together from several tensors."""
    match = re.search(r"tensors destined for (\S+)\.\s", "\n".join(report))
    if match is None:
        return None
    return f"the tensors that make up {match[1]} do not fit together or are not all there; is the download complete?"


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
