"""Secrets leave no trace: what looks like one is hidden before a text is written or printed."""

import re
from typing import Any

HIDDEN = "***"
PATTERNS = (
    (re.compile(r"([^\s&?]*(?:key|token|secret|password|credential|signature)[^\s=&]*)=[^\s&'\"]+", re.IGNORECASE), rf"\1={HIDDEN}"),
    (re.compile(r"://[^/@\s]+@"), f"://{HIDDEN}@"),  # user:password@host
    (re.compile(r"\b(Bearer|Basic) +[^\s'\"]+", re.IGNORECASE), rf"\1 {HIDDEN}"),
    (re.compile(r"(\s(?:-u|--user|--\S*(?:key|token|secret|password)))[ =]+[^\s'\"]+"), rf"\1 {HIDDEN}"),
)


def masked(text: str) -> str:
    """The text without the values of `...key=`, `...token=` and the like, of authorisation headers, and of user:password@ in addresses."""
    for pattern, replacement in PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def masked_values(value: Any) -> Any:
    """A nested value with every text in it masked."""
    if isinstance(value, dict):
        return {key: masked_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [masked_values(item) for item in value]
    return masked(value) if isinstance(value, str) else value
