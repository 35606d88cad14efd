"""Which elements of a head form the pairs that rotary position embedding turns."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Pairing = Literal["halves", "neighbours"]


@dataclass(frozen=True)
class RotaryLayout:
    """How a head is rotated.

    Attributes:
        width: leading elements of the head that are rotated; the rest stays as it is.
        pairing: ``halves`` turns element i with i + width / 2, ``neighbours`` 2i with 2i + 1.
    """

    width: int
    pairing: Pairing

    def pair_norms(self, rows: Tensor) -> Tensor:
        """Return the largest Euclidean norm of a rotated pair, or magnitude of an unrotated element, per head.

        Args:
            rows: ``[batch, heads, tokens, head_dim]``.

        Returns:
            ``[heads]`` float32.
        """
        rotated = rows[..., : self.width].float()
        if self.pairing == "halves":
            first, second = rotated.chunk(2, dim=-1)
        else:
            first, second = rotated[..., 0::2], rotated[..., 1::2]
        squared = torch.addcmul(first.square(), second, second).amax(dim=(0, 2, 3))
        if self.width < rows.shape[-1]:
            rest = rows[..., self.width :].abs().amax(dim=(0, 2, 3)).float()
            squared = torch.maximum(squared, rest.square())
        return squared.sqrt()


def rotary_layout(module: nn.Module, position_embeddings: Any, head_dim: int) -> RotaryLayout:
    """Find the layout from the module's own code and from the embeddings that it is given.

    Args:
        module: an attention module of a transformers model.
        position_embeddings: its argument of that name: a pair (cos, sin), complex rotations, or None.
        head_dim: width of what is cached; for MLA of the rope part.

    Returns:
        The layout; without position embeddings every element counts as its own pair's half, the safe reading.
    """
    code = sys.modules.get(type(module).__module__)
    turn = getattr(code, "rotate_half", None)
    if isinstance(position_embeddings, Tensor):
        width = position_embeddings.shape[-1] * (2 if position_embeddings.is_complex() else 1)
        return RotaryLayout(min(width, head_dim), "neighbours")
    width = head_dim
    if isinstance(position_embeddings, tuple | list) and isinstance(position_embeddings[0], Tensor):
        width = position_embeddings[0].shape[-1]
        if turn is None:
            # without rotate_half the cosines are given once per pair (gpt-oss)
            width *= 2
    if turn is None:
        return RotaryLayout(min(width, head_dim), "halves")
    probe = turn(torch.arange(1.0, 9.0).view(1, 1, 1, 8)).flatten()
    return RotaryLayout(min(width, head_dim), "neighbours" if probe[0] == -2 else "halves")
