"""The two ways through the up-projection of multi-head latent attention: absorbed into the query, or expanded.

``kv_b_proj`` takes the latent to the K (its part without RoPE) and the V of every head. Either the new tokens' rows
go through it, or the query goes through its transpose and attends to the latents themselves, and what comes out goes
through the V part (DeepSeek-V2, arXiv 2405.04434, section 2.1.2). The numbers are the same up to rounding.
"""

from __future__ import annotations

import types
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LatentProjection:
    """The up-projection of one layer.

    Attributes:
        weight: [heads, nope_dim + v_dim, latent_dim].
        nope_dim: width of a K head's part without RoPE.
    """

    weight: Tensor
    nope_dim: int

    @classmethod
    def of(cls, module: nn.Module, num_heads: int) -> LatentProjection:
        """Return the projection of a transformers MLA module; it shares the module's memory."""
        mla: Any = module
        weight = mla.kv_b_proj.weight.view(num_heads, -1, mla.kv_lora_rank)
        return cls(weight, mla.qk_nope_head_dim)

    @property
    def latent_dim(self) -> int:
        """Width of a latent."""
        return self.weight.shape[2]

    @property
    def v_dim(self) -> int:
        """Width of a V head."""
        return self.weight.shape[1] - self.nope_dim

    def of_heads(self, heads: slice) -> LatentProjection:
        """Return the projection of some heads; it shares the memory of this one."""
        return LatentProjection(self.weight[heads], self.nope_dim)

    def absorb(self, query: Tensor) -> Tensor:
        """Carry ``query [tokens, heads, nope_dim + rope_dim]`` over: ``[tokens, heads, latent_dim + rope_dim]``."""
        by_head = query[..., : self.nope_dim].transpose(0, 1) @ self.weight[:, : self.nope_dim]
        return torch.cat((by_head.transpose(0, 1), query[..., self.nope_dim :]), dim=-1)

    def to_values(self, latents: Tensor) -> Tensor:
        """Carry attended ``latents [tokens, heads, latent_dim]`` to V: ``[tokens, heads, v_dim]``."""
        by_head = latents.transpose(0, 1) @ self.weight[:, self.nope_dim :].transpose(1, 2)
        return by_head.transpose(0, 1)

    def expand(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Expand ``rows [tokens, latent_dim + rope_dim]`` of the cache to the K and V of every head.

        Returns:
            K [tokens, heads, nope_dim + rope_dim] and V [tokens, heads, v_dim], a view.
        """
        heads, width, latent_dim = self.weight.shape
        both = nn.functional.linear(rows[:, :latent_dim], self.weight.flatten(0, 1))
        both = both.view(-1, heads, width)
        rope = rows[:, None, latent_dim:].expand(-1, heads, -1)
        return torch.cat((both[..., : self.nope_dim], rope), dim=-1), both[..., self.nope_dim :]


def hand_latent_through(module: nn.Module, stack: ExitStack) -> None:
    """Have an MLA module give its attention function the latent, not K and V expanded from it, until ``stack`` closes."""
    # an instance attribute shadows the method; deleting it brings the method back
    module.expand_kv = types.MethodType(_hand_through, module)  # type: ignore[assignment]
    stack.callback(delattr, module, "expand_kv")


def _hand_through(_module: nn.Module, latent: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
    return latent, rope
