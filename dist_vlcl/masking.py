"""Secrets leave no trace: what looks like one is hidden before a text is written or printed."""

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
    (re.compile(r"://[^\s'\"]*@"), f"://{HIDDEN}@"),  # user:password@host; a password may hold / and @
    (re.compile(r"\b(Bearer|Basic) +[^\s'\"]+", re.IGNORECASE), rf"\1 {HIDDEN}"),
    (re.compile(r"((?:-H|--header)[ =]*['\"]?[\w-]+: *)[^'\"\n]+"), rf"\1{HIDDEN}"),  # of curl and wget
    (re.compile(r"(\s-u|\s--user)[ =]*[^\s'\":]+:[^\s'\"]+"), rf"\1 {HIDDEN}"),
    (re.compile(rf"(\s--\S*(?:key|token|secret|password))[ =]+{VALUE}"), rf"\1 {HIDDEN}"),
)


def masked(text: str) -> str:
    """The text without the values of `...key=`, `...token=` and the like, of authorisation headers, and of user:password@ in addresses."""
    for pattern, replacement in PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def masked_command(words: Sequence[str]) -> str:
    """A command line, quoted as a shell wants it, with the secrets in its words masked."""
    return masked(shlex.join([masked(word) for word in words]))  # by word, since quotes within quotes hide one; then "--token" "word"


def masked_values(value: Any) -> Any:
    """A nested value with every text in it masked."""
    if isinstance(value, dict):
        return {key: masked_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [masked_values(item) for item in value]
    return masked(value) if isinstance(value, str) else value
