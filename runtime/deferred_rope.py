"""RoPE taken out of an unmodified attention module, so that one kernel can rotate, quantise and write.

Transformers rotates Q and K in some ten kernels before K goes to the cache. Here a module gets its class's ``forward``
once more, the same code, in which the name ``apply_rotary_pos_emb`` stands for a function that hands Q and K through
and keeps the angles. Nothing but the module changes: neither its class nor transformers' own function.

A module is taken only where that is the whole of it, which is tried and not read off its source: transformers'
function must rotate as :class:`~fp8kv.runtime.backends.base.Rope` says, and in a forward pass the very tensors that it
returned must arrive at the cache and at the attention function. So what is normalised or scaled after RoPE, rotated in
another arrangement, or not rotated at all stays as it is.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from fp8kv.calibrate.modeling.tap import AttentionModule, tap
from fp8kv.kernels.rope import rotate, split_columns
from fp8kv.recipes.errors import UnsupportedModelError
from fp8kv.runtime.backends import Rope

_FUNCTION = "apply_rotary_pos_emb"
_PROBE = "fp8kv_rope_probe"
_PROBED_POSITION = 7
"""Any but 0, where nothing turns."""


class DeferredRope:
    """What one module left unrotated in the forward pass under way."""

    def __init__(self, module: nn.Module) -> None:
        """Stand in for the rotation of ``module``, of which nothing is changed yet."""
        self._module = module
        self._left: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def __call__(
        self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stand in for ``apply_rotary_pos_emb``, which is called as ever where more is asked of it.

        Args:
            query: [1, q_heads, tokens, dim].
            key: [1, kv_heads, tokens, dim].
            cos: [1, tokens, rope_dim].
            sin: likewise.
            *args: another arrangement of the dimensions.
            **kwargs: likewise.
        """
        if args or kwargs:
            return _function_of(self._module)(query, key, cos, sin, *args, **kwargs)
        self._left = query, key, cos, sin
        return query, key

    def take(self, query: Tensor, key: Tensor) -> Rope | None:
        """Return the rotation that is due of what arrived at attention, once; None where the module asked for none.

        Raises:
            UnsupportedModelError: these are not the tensors that were left unrotated.
        """
        if self._left is None:
            return None
        left_query, left_key, cos, sin = self._left
        self._left = None
        if query is not left_query or key is not left_key:
            raise UnsupportedModelError(
                f"{type(self._module).__name__} changes what RoPE gave it, which it did not do when it was tried: "
                "the runtime cannot drive it with the Triton backend, but with backend 'reference'"
            )
        return Rope(cos[0], sin[0])

    def install(self, stack: ExitStack) -> None:
        """Give the module a forward of its own until ``stack`` closes."""
        forward = type(self._module).forward
        copy = types.FunctionType(
            forward.__code__,
            {**forward.__globals__, _FUNCTION: self},
            forward.__name__,
            forward.__defaults__,
            forward.__closure__,
        )
        copy.__kwdefaults__ = forward.__kwdefaults__
        # an instance attribute shadows the class's method; deleting it brings the method back
        self._module.forward = types.MethodType(copy, self._module)
        stack.callback(delattr, self._module, "forward")

    def was_whole(self, query: Tensor, keys: Tensor) -> bool:
        """Say whether what arrived at attention and cache was what was left unrotated, to be rotated as Rope says."""
        if self._left is None:
            return False
        left_query, left_key, cos, sin = self._left
        self._left = None
        half = cos.shape[-1] // 2
        return (
            query is left_query
            and keys is left_key
            and torch.equal(cos[..., :half], cos[..., half:])
            and torch.equal(sin[..., :half], sin[..., half:])
            and _rotates_halves(_function_of(self._module), left_query, left_key, cos.shape[-1])
        )


def defer_rope(
    model: nn.Module, modules: Mapping[str, AttentionModule], stack: ExitStack
) -> dict[str, DeferredRope]:
    """Take RoPE out of the modules that allow it until ``stack`` closes; one token runs through the model to tell.

    Args:
        model: a transformers model in evaluation mode.
        modules: those to try, by name; all of them attend through transformers' attention interface.
        stack: brings the modules back.

    Returns:
        By name, what the changed modules leave unrotated. Whoever runs the model rotates it.
    """
    candidates = {
        name: DeferredRope(attention.module)
        for name, attention in modules.items()
        if _is_plain(attention.module)
    }
    if not candidates:
        return {}
    whole = _probe(model, {name: modules[name] for name in candidates}, candidates)
    for name in whole:
        candidates[name].install(stack)
    return {name: candidates[name] for name in candidates if name in whole}


def _is_plain(module: nn.Module) -> bool:
    """Say whether the module's forward is its class's, a function that can be copied, and rotates."""
    forward = type(module).forward
    return (
        "forward" not in vars(module)
        and isinstance(forward, types.FunctionType)
        and not hasattr(forward, "__wrapped__")
        and _FUNCTION in forward.__code__.co_names
        and _FUNCTION in forward.__globals__
    )


def _function_of(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return transformers' function that rotates in ``module``."""
    function: Callable[..., tuple[Tensor, Tensor]] = type(module).forward.__globals__[_FUNCTION]
    return function


def _probe(
    model: nn.Module,
    modules: Mapping[str, AttentionModule],
    candidates: Mapping[str, DeferredRope],
) -> set[str]:
    """Run one token with all candidates installed, and return those that rotate nothing else and nothing less."""
    queries: dict[str, list[Tensor]] = {name: [] for name in modules}
    keys: dict[str, list[Tensor]] = {name: [] for name in modules}
    place = next(model.parameters()).device
    AttentionInterface.register(_PROBE, _attend_nothing)
    with ExitStack() as probing, torch.no_grad():
        for name, attention in modules.items():
            module: Any = attention.module
            candidates[name].install(probing)
            setattr(module, _PROBE, queries[name])
            probing.callback(delattr, module, _PROBE)
            before = module.config._attn_implementation
            probing.callback(setattr, module.config, "_attn_implementation", before)
            module.config._attn_implementation = _PROBE
        probing.enter_context(
            tap(modules, lambda write: keys[write.attention.name].append(write.keys))
        )
        model(
            input_ids=torch.zeros(1, 1, dtype=torch.int64, device=place),
            position_ids=torch.full((1, 1), _PROBED_POSITION, device=place),
            use_cache=False,
        )
    return {
        name
        for name, candidate in candidates.items()
        if len(queries[name]) == len(keys[name]) == 1
        and candidate.was_whole(queries[name][0], keys[name][0])
    }


def _attend_nothing(
    module: nn.Module, query: Tensor, _key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """Keep ``query [1, heads, tokens, dim]``, and return zeros where attention's result would be."""
    queries: list[Tensor] = getattr(module, _PROBE, [])
    queries.append(query)
    return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1]), None


def _rotates_halves(
    function: Callable[..., tuple[Tensor, Tensor]], query: Tensor, key: Tensor, rope_dim: int
) -> bool:
    """Try ``function`` on random numbers of the heads' shapes against the rotation that :class:`Rope` describes."""
    generator = torch.Generator().manual_seed(0)
    tokens = 3
    angles = torch.rand(tokens, rope_dim // 2, generator=generator) * 6
    twice = torch.cat((angles, angles), dim=-1)[None]
    wanted, given = [], []
    for heads in (query, key):
        shape = (heads.shape[1], tokens, heads.shape[3])
        sample = torch.randn(shape, generator=generator)
        rest, turned = split_columns(sample.transpose(0, 1), rope_dim, rope_last=False)
        table = torch.cat((angles.cos(), angles.sin()), dim=-1)
        turned = rotate(turned, torch.arange(tokens), table, interleaved=False)
        given.append(sample[None])
        wanted.append(torch.cat((turned, rest), dim=-1).transpose(0, 1)[None])
    found = function(*given, twice.cos(), twice.sin())
    return all(torch.allclose(*pair, atol=1e-5) for pair in zip(found, wanted, strict=True))
