"""Digests that say whether two runs had the same input."""

from __future__ import annotations

import hashlib
import json


def json_digest(content: object) -> str:
    """Return the SHA-256, in hexadecimal digits, of numbers, texts and sequences of them, as JSON."""
    return hashlib.sha256(json.dumps(content).encode("ascii")).hexdigest()
