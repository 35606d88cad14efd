"""Calibration samples: token ids, the hash that names them, and the fold that it puts them in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from fp8kv.calibrate.folds import CALIBRATION_FOLDS, HELD_OUT_FOLD, NUM_FOLDS


@dataclass(frozen=True)
class Sample:
    """One token sequence to run through the model. Samples are equal when their token ids are.

    Attributes:
        token_ids: [tokens] int32, on the CPU.
        digest: sha256 of the token ids, as :func:`token_digest` forms it.
        fold: 0 to ``NUM_FOLDS - 1``.
    """

    token_ids: torch.Tensor = field(compare=False, repr=False)
    digest: str
    fold: int

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""
        return self.token_ids.shape[0]


def token_digest(token_ids: torch.Tensor) -> str:
    """Return the sha256, in hexadecimal, of ``token_ids`` [tokens] as little-endian int32."""
    return hashlib.sha256(token_ids.numpy().astype("<i4").tobytes()).hexdigest()


def samples_digest(digests: Iterable[str]) -> str:
    """Return one sha256 for a set of samples, whatever their order, from their own digests."""
    return hashlib.sha256("".join(sorted(digests)).encode("ascii")).hexdigest()


def assign_folds(digests: Iterable[str]) -> Mapping[str, int]:
    """Return the fold of each sample by its digest, whatever the order of the samples.

    The digest alone decides, so a sample is in the same fold in every run and on every machine, and
    the statistics of several runs merge without a sample being both calibrated on and held out.
    Only a set so small that one side would be empty is treated as a whole: of two or more samples
    the one with the largest digest is then held out, and the others are calibrated on. A single
    sample is calibrated on; there is no held-out check then.
    """
    unique = sorted(set(digests))
    folds = {digest: int(digest, 16) % NUM_FOLDS for digest in unique}
    held_out = sum(fold == HELD_OUT_FOLD for fold in folds.values())
    if 0 < held_out < len(unique):
        return folds
    folds = {
        digest: int(digest, 16) % len(CALIBRATION_FOLDS) if fold == HELD_OUT_FOLD else fold
        for digest, fold in folds.items()
    }
    if len(unique) >= 2:
        folds[unique[-1]] = HELD_OUT_FOLD
    return folds
