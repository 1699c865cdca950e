"""Tiny sets of real shards, and a web server for them."""

import io
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image

from dist_vlcl.data.files import Found
from dist_vlcl.data.sets import RawSet
from dist_vlcl.data.settings import DataConfig
from dist_vlcl.data.shards import Index, write_shards
from dist_vlcl.data.tasks import generator


def png(size: int, *seeds: object) -> bytes:
    """A PNG of noise on one colour, a function of the seeds."""
    rng = np.random.default_rng(generator(*seeds).getrandbits(64))
    pixels = rng.integers(0, 200, size=3) + rng.integers(0, 56, size=(size, size, 3))
    stream = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(stream, format="PNG")
    return stream.getvalue()


def raw_set(num_classes: int = 4, train: int = 7, test: int = 3, size: int = 32) -> RawSet:
    """Every class has the same number of images; keys are `class2/train_05`."""
    samples = [
        Found(split, folder, f"{folder}/{split}_{number:02d}.png", partial(png, size, split, class_id, number), class_id)
        for class_id, folder in enumerate(f"class{number}" for number in range(num_classes))
        for split, count in (("train", train), ("test", test))
        for number in range(count)
    ]
    return RawSet([f"class {class_id}" for class_id in range(num_classes)], samples)


def make_index(
    tmp_path: Path,
    num_classes: int = 4,
    train: int = 7,
    test: int = 3,
    size: int = 32,
    samples_per_shard: int = 3,
    name: str = "tiny",
    pixels: bool = False,
) -> Index:
    """Write a tiny set's shards into tmp_path/name."""
    raw = raw_set(num_classes, train, test, size)
    encoding = "pixels" if pixels else "original"
    options = {"samples_per_shard": samples_per_shard, "encoding": encoding}
    return write_shards(raw, DataConfig(name=name, reader="folder", root=str(tmp_path), **options))


@contextmanager
def served(
    folder: Path, handler: type[SimpleHTTPRequestHandler] | None = None, port: int = 0, tls: ssl.SSLContext | None = None
) -> Iterator[str]:
    """The address of an http server on the loopback that serves a folder; of an https server with `tls`."""
    with ThreadingHTTPServer(("127.0.0.1", port), partial(handler or Quiet, directory=str(folder))) as server:
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http{'s' if tls else ''}://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass
