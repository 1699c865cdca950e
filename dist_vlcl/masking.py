"""Hides secrets: every text that is written or printed passes through here first.

A telling name contains a word such as token or password. The value of an environment variable with such a
name is a secret. So is a value that follows such a name in a text.
tests/test_masking.py lists the forms that are found. No other form is promised.
"""

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

HIDDEN = "***"
NAME = r"(?:key|token(?!iz)|secret|password|passwd|passphrase|credential|signature)"
MIN_LENGTH = 8  # of a value in the environment: a shorter one may be an ordinary word
VALUE = r"""(?:'[^']*'|"[^"]*"|[^\s&'"]+)"""
PATTERNS = (
    (re.compile(rf"([^\s&?='\"]*{NAME}[^\s=&'\"]*)={VALUE}", re.IGNORECASE), rf"\1={HIDDEN}"),
    (re.compile(rf"(?<![a-z0-9])((?:sig|pwd|pass|auth)=){VALUE}", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(rf"(['\"][\w-]*{NAME}[\w-]*['\"] *: *){VALUE}", re.IGNORECASE), rf"\1{HIDDEN}"),  # JSON
    (re.compile(rf"((?:[\w-]*-{NAME}|Authorization): +)[^'\"\n]+", re.IGNORECASE), rf"\1{HIDDEN}"),  # headers, such as X-Api-Key
    (re.compile(r"://[^\s'\"]*@"), f"://{HIDDEN}@"),  # user:password@host; a password may contain / and @
    (re.compile(r"\b((?i:Bearer)) +[^\s'\"]+|\b((?i:Basic)) +(?=\S*[A-Z0-9])[A-Za-z0-9+/]{8,}={0,2}"), rf"\1\2 {HIDDEN}"),
    (re.compile(r"((?:-H|--header)[ =]*['\"]?[\w-]+: *)[^'\"\n]+"), rf"\1{HIDDEN}"),  # options of curl and wget
    (re.compile(r"(\s-u|\s--user|\s--proxy-user)[ =]*[^\s'\":]+:[^\s'\"]+"), rf"\1 {HIDDEN}"),
    (re.compile(rf"(\s--\S*{NAME})[ =]+{VALUE}", re.IGNORECASE), rf"\1 {HIDDEN}"),
)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # escape codes, and marks that turn text around


def masked(text: str) -> str:
    """Return the text without secrets, and with control characters as `\\x1b`: a name must not steer the terminal that shows it."""
    secrets = [value for name, value in os.environ.items() if re.search(NAME, name, re.IGNORECASE) and len(value) >= MIN_LENGTH]
    for value in sorted(secrets, key=len, reverse=True):  # one may be a part of another
        text = text.replace(value, HIDDEN)
    for pattern, replacement in PATTERNS:
        text = pattern.sub(replacement, text)
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


@contextmanager
def explained(before: object, after: str = "", kinds: Any = ValueError, to: type[Exception] = ValueError) -> Iterator[None]:
    """Turn an error of these kinds into one of type `to`, with a text before its own message and one after it, in one masked line.

    kinds: a type of exceptions, or a tuple of types.
    """
    try:
        yield
    except kinds as error:
        reason = " ".join(masked(str(error)).split())[:1000]
        raise to(f"{masked(str(before))}: {reason}{after and f'; {masked(after)}'}") from error


def masked_command(words: Sequence[str]) -> str:
    """Return a command line, quoted for a shell, without secrets."""
    # Each word first, since quotes within quotes hide a secret; then the line, for "--token" followed by its value.
    return masked(shlex.join([masked(word) for word in words]))


def masked_values(value: Any) -> Any:
    """Return a nested value in which every text is masked, and every text under a telling name is hidden."""
    if isinstance(value, dict):
        is_secret = {key: isinstance(item, str) and re.search(NAME, str(key), re.IGNORECASE) for key, item in value.items()}
        return {key: HIDDEN if is_secret[key] else masked_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [masked_values(item) for item in value]
    return masked(value) if isinstance(value, str) else value
