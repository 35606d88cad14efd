"""Request bodies that take nothing in silence: what is not known or not supported is refused by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

Neutral = Mapping[str, tuple[object, ...]]
"""Parameters that are not supported, with the values that ask for what is done anyway."""

_ALIKE: Neutral = {
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
}

COMPLETION_NEUTRAL: Neutral = {**_ALIKE, "suffix": (None,)}
"""Of OpenAI's completions."""

CHAT_NEUTRAL: Neutral = {
    **_ALIKE,
    "audio": (None,),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "metadata": (None, {}),
    "modalities": (None, ["text"]),
    "moderation": (None,),
    "parallel_tool_calls": (None, False, True),
    "prediction": (None,),
    "prompt_cache_key": (None,),
    "prompt_cache_options": (None,),
    "prompt_cache_retention": (None,),
    "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}),
    "safety_identifier": (None,),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "verbosity": (None,),
    "web_search_options": (None,),
}
"""Of OpenAI's chat completions."""

MESSAGE_NEUTRAL: Neutral = {
    "annotations": (None, []),
    "audio": (None,),
    "function_call": (None,),
    "refusal": (None,),
    "tool_calls": (None, []),
}
"""Of a message: the ``openai`` client sends back what it received."""


class StrictModel(BaseModel):
    """Takes what is named, of the type that is named.

    Attributes:
        neutral: parameters that are refused, unless they have one of these values.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    neutral: ClassVar[Neutral] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise PydanticCustomError("no_object", "give a JSON object")
        for name in cls.neutral.keys() & data.keys():
            if data[name] not in cls.neutral[name]:
                raise unsupported(name)
        return {name: value for name, value in data.items() if name not in cls.neutral}


def unsupported(name: str) -> PydanticCustomError:
    """Return the error that refuses the parameter ``name``."""
    return PydanticCustomError(
        "unsupported",
        "{parameter} is not supported by this server: leave it out",
        {"parameter": name},
    )
