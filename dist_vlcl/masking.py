"""Hides secrets: every text that is written or printed passes through here first."""

import re
import shlex
from collections.abc import Sequence
from typing import Any

HIDDEN = "***"
VALUE = r"""(?:'[^']*'|"[^"]*"|[^\s&'"]+)"""
PATTERNS = (
    (
        re.compile(rf"([^\s&?='\"]*(?:key|token|secret|password|passwd|credential|signature)[^\s=&'\"]*)={VALUE}", re.IGNORECASE),
        rf"\1={HIDDEN}",
    ),
    (re.compile(rf"(?<![a-z0-9])((?:sig|pwd|pass|auth)=){VALUE}", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"://[^\s'\"]*@"), f"://{HIDDEN}@"),  # user:password@host; a password may contain / and @
    (re.compile(r"\b(Bearer|Basic) +[^\s'\"]+", re.IGNORECASE), rf"\1 {HIDDEN}"),
    (re.compile(r"((?:-H|--header)[ =]*['\"]?[\w-]+: *)[^'\"\n]+"), rf"\1{HIDDEN}"),  # options of curl and wget
    (re.compile(r"(\s-u|\s--user)[ =]*[^\s'\":]+:[^\s'\"]+"), rf"\1 {HIDDEN}"),
    (re.compile(rf"(\s--\S*(?:key|token|secret|password))[ =]+{VALUE}"), rf"\1 {HIDDEN}"),
)


def masked(text: str) -> str:
    """Return the text without secrets: values of `...key=`, `...token=` and similar, authorisation headers, user:password@ in addresses."""
    for pattern, replacement in PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def masked_command(words: Sequence[str]) -> str:
    """Return a command line, quoted for a shell, without secrets."""
    # Each word first, since quotes within quotes hide a secret; then the line, for "--token" followed by its value.
    return masked(shlex.join([masked(word) for word in words]))


def masked_values(value: Any) -> Any:
    """Return a nested value in which every text is masked."""
    if isinstance(value, dict):
        return {key: masked_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [masked_values(item) for item in value]
    return masked(value) if isinstance(value, str) else value
