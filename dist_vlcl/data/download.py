"""Read a whole file from a folder, a web server or, if allowed, the output of a command. Network reads end within a given time."""

import logging
import math
import os
import signal
import ssl
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlparse
from urllib.request import url2pathname

from dist_vlcl.masking import masked

COMMAND_ATTEMPTS = 3  # each has a third of the time
SILENCE = 1 / 10  # part of the time after which a server that sends nothing is asked again
TRY_AGAIN = (408, 429, *range(500, 600))  # HTTP statuses: too slow, too many requests, an error of the server

log = logging.getLogger(__name__)


def read_bytes(url: str, allow_pipe: bool = False, limit: int | None = None, *, timeout_s: float) -> bytes:
    """Return the content of a local file or an http(s) address, or the output of a `pipe:` command; at most `limit` bytes.

    Raises OSError if it cannot be read, from http(s) and a `pipe:` within `timeout_s` seconds, and ValueError as `check_scheme` does.
    """
    parts = urlparse(url)
    check_scheme(url, allow_pipe)
    if parts.scheme in ("http", "https"):
        return _with_retries(lambda deadline: _get(url, limit, timeout_s * SILENCE, deadline), url, timeout_s)
    if parts.scheme in ("", "file"):
        path = Path(url2pathname(parts.path) if parts.scheme else url)
        if path.exists() and not path.is_file():
            raise OSError(f"{path} is not a regular file")  # reading a pipe could wait without end
        with path.open("rb") as file:
            return file.read(limit)
    return _with_retries(lambda _: _run(url.removeprefix("pipe:"), limit, timeout_s / COMMAND_ATTEMPTS), url, timeout_s, COMMAND_ATTEMPTS)


def check_scheme(url: str, allow_pipe: bool) -> None:
    """Raise ValueError for a kind of address that cannot be read, and for a command that `allow_pipe` does not allow."""
    scheme = urlparse(url).scheme
    if scheme not in ("", "file", "http", "https", "pipe"):
        raise ValueError(f"data.url={masked(url)!r}: give a folder, an http(s) address or a `pipe:` command")
    if scheme == "pipe" and not allow_pipe:
        raise ValueError(f"data.url={masked(url)!r}: reading this runs a command; set data.allow_pipe=true to allow it")


def _with_retries(read: Callable[[float], bytes], url: str, timeout_s: float, attempts: float = math.inf) -> bytes:
    """Return `read(deadline)`, tried again with growing pauses while there is time. Raises the last OSError."""
    deadline, pause_s, failures = time.monotonic() + timeout_s, 0.25, 0
    while True:
        try:
            return read(deadline)
        except OSError as error:
            failures += 1
            is_late = time.monotonic() + pause_s > deadline - timeout_s * SILENCE
            if is_late or failures == attempts or _is_final(error):
                raise
            log.warning("%s: attempt %d failed: %s", masked(url), failures, masked(str(error)))  # warnings would show it once
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 5)


def _is_final(error: OSError) -> bool:
    """Return whether another attempt would end the same way."""
    response = getattr(error, "response", None)
    is_refused = response is not None and response.status_code not in TRY_AGAIN
    # requests' errors about the address itself are ValueErrors too
    return is_refused or isinstance(error, ValueError) or "CERTIFICATE_VERIFY_FAILED" in str(error)


def _get(url: str, limit: int | None, silence_s: float, deadline: float) -> bytes:
    """Return what a web server sends, in one attempt. Raises OSError, before the deadline."""
    import requests  # late: only remote shards need it
    from urllib3.exceptions import HTTPError

    # One attempt waits for a connection, for the headers, then for each part of the content.
    wait_s = min(silence_s, (deadline - time.monotonic()) / 3)
    content = bytearray()
    with requests.Session() as session:
        certificates = ssl.get_default_verify_paths()
        session.verify = certificates.cafile or certificates.capath or True  # the system's or SSL_CERT_FILE, not only those of requests
        session.hooks["response"].append(_refuse_other_host)
        with session.get(url, stream=True, timeout=wait_s, headers={"Accept-Encoding": "identity"}) as response:
            response.raise_for_status()
            while limit is None or len(content) < limit:
                if time.monotonic() + wait_s > deadline:
                    raise TimeoutError(f"only {len(content):,} bytes arrived in time")
                try:
                    # `iter_content` would wait for a whole chunk, however slowly it arrives. `read1` returns what is there.
                    piece = response.raw.read1(1 << 16)
                except HTTPError as error:
                    raise OSError(str(error.args[0])) from error
                if not piece:
                    break
                content += piece
    return bytes(content[:limit])


def _refuse_other_host(response: Any, **_: Any) -> None:
    """Raise InvalidURL, which no other attempt follows, for a redirect to another host or from https to http."""
    from requests.exceptions import InvalidURL

    to, of = urlparse(urljoin(response.url, response.headers.get("Location", ""))), urlparse(response.url)
    is_same = (to.scheme, to.netloc) == (of.scheme, of.netloc) or (to.scheme == "https" and to.hostname == of.hostname)
    if response.is_redirect and not is_same:
        raise InvalidURL(f"redirects to {to.scheme}://{to.hostname}; give that address as data.url, or use 'pipe:curl -L ADDRESS'")


def _run(command: str, limit: int | None, timeout_s: float) -> bytes:
    """Return the output of a shell command. Raises OSError if it fails or takes longer than `timeout_s` seconds."""
    process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, start_new_session=True)
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"the command took longer than {timeout_s:.0f} s") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # also its children, which hold the pipe open
            process.wait()
    if process.returncode:
        raise OSError(f"the command ended with exit status {process.returncode}")
    return output[:limit]
