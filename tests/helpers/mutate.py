"""Damage to files, as small pure functions: for tests, and for a fuzzer.

A mutator of bytes is `(content, draw) -> content`, one of JSON `(value, draw) -> value`. Equal seeds of `draw` give equal damage.
"""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

import yaml

from dist_vlcl.reading import seal

BLOCK = 512  # of a tar

Mutator = Callable[[bytes, random.Random], bytes]


def flip_bit(content: bytes, number: int) -> bytes:
    """Flip one bit; `number` counts the bits of the file."""
    at, bit = divmod(number, 8)
    return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]


def flipped(content: bytes, draw: random.Random) -> bytes:
    return flip_bit(content, draw.randrange(8 * len(content))) if content else content


def truncated(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))] if content else content


def extended(content: bytes, draw: random.Random) -> bytes:
    return content + draw.randbytes(draw.choice((1, BLOCK, 3000)))


def overwritten(content: bytes, draw: random.Random) -> bytes:
    """Replace some bytes, most likely near the beginning, where headers are."""
    at = min(len(content), int(draw.expovariate(8 / (len(content) + 1))))
    count = draw.choice((1, 2, 4, 8, 100))
    value = draw.choice((bytes(count), b"\xff" * count, b"9" * count, draw.randbytes(count)))
    return content[:at] + value + content[at + count :]


def block_moved(content: bytes, draw: random.Random) -> bytes:
    """Zero a block, repeat it, leave it out, or exchange it with another."""
    blocks = [content[at : at + BLOCK] for at in range(0, len(content), BLOCK)] or [b""]
    a, b = draw.randrange(len(blocks)), draw.randrange(len(blocks))
    kind = draw.choice(("zero", "repeat", "drop", "swap"))
    if kind == "swap":
        blocks[a], blocks[b] = blocks[b], blocks[a]
    blocks[a] = {"zero": bytes(len(blocks[a])), "repeat": blocks[a] * 2, "drop": b"", "swap": blocks[a]}[kind]
    return b"".join(blocks)


def dropped(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content) + 1)
    return content[:at] + content[at + draw.choice((1, 7, BLOCK)) :]


def inserted(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content) + 1)
    return content[:at] + draw.choice((draw.randbytes(8), bytes(BLOCK), content[at : at + 200])) + content[at:]


MUTATORS: tuple[Mutator, ...] = (flipped, truncated, extended, overwritten, block_moved, dropped, inserted)


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Apply one mutator, chosen by `draw`."""
    return draw.choice(MUTATORS)(content, draw)


def digit_changed(content: bytes, draw: random.Random) -> bytes:
    places = [at for at, byte in enumerate(content) if 48 <= byte <= 57]
    at = draw.choice(places) if places else 0
    return content[:at] + b"%d" % draw.randrange(10) + content[at + 1 :]


def line_moved(content: bytes, draw: random.Random) -> bytes:
    """Leave out a line, repeat one elsewhere, or exchange two."""
    lines = content.splitlines(keepends=True) or [b""]
    a, b = draw.randrange(len(lines)), draw.randrange(len(lines))
    kind = draw.choice(("drop", "repeat", "swap"))
    if kind == "drop":
        del lines[a]
    elif kind == "repeat":
        lines.insert(b, lines[a])
    else:
        lines[a], lines[b] = lines[b], lines[a]
    return b"".join(lines)


def text_mutated(content: bytes, draw: random.Random) -> bytes:
    return draw.choice((digit_changed, line_moved, mutated, lambda *_: draw.choice(STRANGE_TEXTS)))(content, draw)


def tar_header_mutated(content: bytes, draw: random.Random) -> bytes:
    """Change a field of a header of a tar and mend its checksum, as a hostile author does."""
    headers = [at for at in range(0, len(content), BLOCK) if content[at + 257 : at + 262] == b"ustar"]
    if not headers:
        return content
    header = bytearray(content[(at := draw.choice(headers)) : at + BLOCK])
    first, last, values = draw.choice(
        (
            (0, 100, (b"../up.png", b"/etc/a.png", b"a.pkl", b"b.cls", b"\xff", bytes(100), b"x" * 100)),  # name
            (124, 136, (b"77777777777\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"00000000000\0", b"-1")),  # size
            (156, 157, (b"1", b"2", b"3", b"5", b"6", b"L", b"S", b"g", b"x", b"Z")),  # type
            (157, 257, (b"/etc/passwd", b"../x")),  # target of a link
            (345, 500, (b"../..", b"/")),  # prefix of the name
        )
    )
    value = draw.choice(values)
    header[first : first + len(value)] = value[: last - first]
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return content[:at] + bytes(header) + content[at + BLOCK :]


HOSTILE = ("${oc.env:CANARY}", "pipe:touch hacked; cat {}", "![x](&#47;etc&#47;passwd)", "/etc/passwd", "antigravity:Class", "$\\frac{")
STRANGE: tuple[Any, ...] = (None, True, -1, 0, 10**9, 1 << 70, 1.5, float("nan"), "", "../x", "\x1b[2J", "\ud800", [], {}, [[]], "0" * 64)
STRANGE_TEXTS = (b"", b"null", b"[]", b"{}", b"[" * 30000, b"9" * 9000, b"\x1b]0;x\x07", b"\x00\x01\xff\xfe", b'{"a": 1e400}\n' * 3)


def json_mutated(value: Any, draw: random.Random) -> Any:
    """Return a copy of a JSON value in which one part is replaced, removed, repeated or exchanged with a sibling."""
    root = [copy.deepcopy(value)]
    holder: Any = root
    key: Any = 0
    while isinstance(holder[key], dict | list) and holder[key] and draw.random() < 0.9:
        holder = holder[key]
        key = draw.choice(list(holder)) if isinstance(holder, dict) else draw.randrange(len(holder))
    kind = draw.choice(("replace", "remove", "repeat", "swap"))
    keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    if kind == "remove" and holder is not root:
        del holder[key]
    elif kind == "repeat" and isinstance(holder, list) and holder is not root:
        holder.insert(key, copy.deepcopy(holder[key]))
    elif kind == "swap" and len(keys) > 1:
        other = draw.choice(keys)
        holder[key], holder[other] = holder[other], holder[key]
    else:
        holder[key] = copy.deepcopy(draw.choice((*STRANGE, *HOSTILE)))
    return root[0]


def json_text_mutated(content: bytes, draw: random.Random) -> bytes:
    """Mutate a JSON file: in most cases its value, otherwise its bytes."""
    if draw.random() < 0.2:
        return mutated(content, draw)
    return json.dumps(json_mutated(json.loads(content), draw), indent=1, sort_keys=True).encode()


def json_line_mutated(content: bytes, draw: random.Random) -> bytes:
    """Mutate the value of one line of a file with one JSON object per line."""
    lines = content.splitlines()
    at = draw.randrange(len(lines))
    return b"\n".join([*lines[:at], json.dumps(json_mutated(json.loads(lines[at]), draw)).encode(), *lines[at + 1 :]]) + b"\n"


def resealed(content: bytes, draw: random.Random) -> bytes:
    """Mutate a sealed JSON object, or one line of many, and mend its checksum, as a hostile author does."""
    is_lines = len(lines := content.splitlines()) > 1 and lines[0].endswith(b"}")
    lines = lines if is_lines else [content]
    at = draw.randrange(len(lines))
    value = json_mutated(json.loads(lines[at]), draw)
    records = [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, dict) and "crc" in one]
    for record in records:
        record.update(seal({key: item for key, item in record.items() if key != "crc"}))
    return b"\n".join([*lines[:at], json.dumps(value).encode(), *lines[at + 1 :]]) + b"\n"


def yaml_mutated(content: bytes, draw: random.Random) -> bytes:
    return yaml.safe_dump(json_mutated(yaml.safe_load(content), draw), sort_keys=False).encode()
