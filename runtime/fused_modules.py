"""Run parts of an unmodified transformers model in fewer kernels, by other ``forward`` methods on its instances.

A decode step of a few rows is bound by the bytes of the weights and by the number of kernels. So

* an RMS norm, seven operations in transformers, becomes one kernel;
* the projections of one input (Q, K and V; the two of MLA that narrow it; gate and up) become one matrix product, whose
  weight holds theirs one below the other; they stay the model's parameters, as views of it;
* the gated activation between them becomes one kernel.

What a module computes is tried and not read off its name: one that differs from what would stand for it stays as it is.
Results are the same up to rounding in the model's type. Where models are compared with transformers to the last bit,
leave them unfused.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

_PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("q_proj", "kv_a_proj_with_mqa"),
)
_MLP = ("gate_proj", "up_proj", "down_proj")
_TOLERANCE = 2.0**-6


class Fused(NamedTuple):
    """How many modules were fused.

    Attributes:
        norms: RMS norms.
        projections: groups of projections that became one.
        mlps: gated MLPs.
    """

    norms: int
    projections: int
    mlps: int


@torch.no_grad()
def fuse_modules(model: nn.Module, stack: ExitStack) -> Fused:
    """Fuse what can be fused in ``model`` until ``stack`` closes; needs Triton, and a GPU to be of use.

    Peak memory: the weights of one group of projections twice.

    Args:
        model: a transformers model in evaluation mode.
        stack: what is changed is taken back when it closes.
    """
    # not at the top: without Triton, which only some platforms have, this module must still be there
    kernels = importlib.import_module("fp8kv.kernels.pointwise")
    norms = projections = mlps = 0
    for module in list(model.modules()):
        norms += _fuse_norm(module, kernels.rms_norm, stack)
        projections += _fuse_projections(module, stack)
        mlps += _fuse_mlp(module, kernels.silu_mul, stack)
    return Fused(norms, projections, mlps)


def _fuse_norm(module: nn.Module, rms_norm: Callable[..., Tensor], stack: ExitStack) -> bool:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    is_norm = type(module).__name__.endswith("RMSNorm") and len(list(module.parameters())) == 1
    if not is_norm or not isinstance(weight, Tensor) or not isinstance(eps, float):
        return False
    if weight.dim() != 1 or len(inspect.signature(module.forward).parameters) != 1:
        return False

    def forward(x: Tensor, *, offset: bool) -> Tensor:
        if x.dtype != weight.dtype or x.stride(-1) != 1:
            return original(x)
        heads = x.shape[-2] if x.dim() > 3 else 1
        rows = x.reshape(-1, heads, x.shape[-1])
        return rms_norm(rows, weight, eps, offset=offset).view(x.shape)

    original: Callable[[Tensor], Tensor] = module.forward
    sample = _sample(weight, weight.shape[0])
    for offset in (False, True):
        candidate = partial(forward, offset=offset)
        if _agree(original(sample), candidate(sample)):
            _override(module, candidate, stack)
            return True
    return False


def _fuse_projections(module: nn.Module, stack: ExitStack) -> bool:
    for names in _PROJECTIONS:
        linears = _linears(module, names)
        if linears:
            _JointProjection(linears, stack)
            return True
    return False


class _JointProjection:
    """One matrix product for several projections of one input: the first computes it, the others take their columns."""

    def __init__(self, linears: Sequence[nn.Linear], stack: ExitStack) -> None:
        self._weight, self._bias = _join(linears, stack)
        self._widths = [linear.out_features for linear in linears]
        self._input: Tensor | None = None
        self._left: dict[int, Tensor] = {}
        _override(linears[0], self._first, stack)
        for number, linear in enumerate(linears[1:], start=1):
            _override(linear, partial(self._other, number, linear.forward), stack)

    def _first(self, x: Tensor) -> Tensor:
        product = functional.linear(x, self._weight, self._bias)
        first, *others = torch.split(product, self._widths, dim=-1)
        self._input, self._left = x, dict(enumerate(others, start=1))
        return first

    def _other(self, number: int, original: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if x is not self._input or number not in self._left:
            return original(x)
        result = self._left.pop(number)
        if not self._left:
            # activations are not to live until the next forward pass
            self._input = None
        return result


def _fuse_mlp(module: nn.Module, silu_mul: Callable[..., Tensor], stack: ExitStack) -> bool:
    if set(dict(module.named_children())) != {*_MLP, "act_fn"}:
        return False
    linears: list[nn.Linear] = _linears(module, _MLP[:2])
    if not linears or linears[0].out_features != linears[1].out_features:
        return False
    activation: Any = module.act_fn
    down: Any = module.down_proj
    # where gates differ most from each other: the whole module may hide it
    gates = torch.linspace(
        -3, 3, 64, dtype=linears[0].weight.dtype, device=linears[0].weight.device
    )
    if not _agree(functional.silu(gates), activation(gates)):
        return False
    sample = _sample(linears[0].weight, linears[0].in_features)
    expected = module.forward(sample)
    with ExitStack() as undo:
        weight, bias = _join(linears, undo)

        def forward(x: Tensor) -> Tensor:
            gate_up = functional.linear(x, weight, bias)
            active = silu_mul(gate_up.flatten(0, -2))
            return down(active.view(*x.shape[:-1], -1))  # type: ignore[no-any-return]

        if not _agree(expected, forward(sample)):
            return False
        _override(module, forward, undo)
        stack.push(undo.pop_all())
    return True


def _linears(module: nn.Module, names: Sequence[str]) -> list[nn.Linear]:
    """Return the module's plain linear layers of these names, none where they cannot be one product."""
    found = [getattr(module, name, None) for name in names]
    # a forward of its own is somebody's hook, accelerate's for instance
    linears = [one for one in found if type(one) is nn.Linear and "forward" not in vars(one)]
    kinds = {
        (one.in_features, one.bias is None, one.weight.dtype, one.weight.device) for one in linears
    }
    return linears if len(linears) == len(names) and len(kinds) == 1 else []


def _join(linears: Sequence[nn.Linear], stack: ExitStack) -> tuple[Tensor, Tensor | None]:
    """Return one weight and bias for all; the layers' own weights become views of it until ``stack`` closes."""
    weight = torch.cat([linear.weight for linear in linears])
    parts = torch.split(weight, [linear.out_features for linear in linears])
    for linear, part in zip(linears, parts, strict=True):
        linear.weight.data = part
        stack.callback(_part, linear)
    biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
    return weight, torch.cat(biases) if biases else None


def _part(linear: nn.Linear) -> None:
    linear.weight.data = linear.weight.data.clone()


def _override(module: nn.Module, forward: Callable[..., Tensor], stack: ExitStack) -> None:
    # an instance attribute shadows the method; deleting it brings the method back
    setattr(module, "forward", forward)  # noqa: B010
    stack.callback(delattr, module, "forward")


def _sample(weight: Tensor, width: int) -> Tensor:
    """Return [1, 2, width]: a row so small that a norm's epsilon shows, and one so large that a limit would."""
    small = torch.linspace(-1e-3, 2e-3, width, dtype=weight.dtype, device=weight.device)
    return torch.stack((small, small.flip(0) * 1e4))[None]


def _agree(expected: Tensor, found: Tensor) -> bool:
    """Say whether two results are the same up to rounding, row by row."""
    if expected.dtype != found.dtype or expected.shape != found.shape:
        return False
    difference = (expected.float() - found.float()).abs().amax(-1)
    return bool((difference <= _TOLERANCE * expected.float().abs().amax(-1)).all())
