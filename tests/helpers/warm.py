"""What the ranks of tests/helpers/ranks.py are forked from: all that a run imports, and open_clip's table of words.

The collector leaves that alone, which would look through a million objects at the end of every task, and copy their pages.
"""

import functools
import gc

import dist_vlcl

# isort: split
import accelerate  # noqa: F401
import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import open_clip.factory
import pandas  # noqa: F401
import pyarrow.parquet  # noqa: F401
import sklearn.datasets  # noqa: F401

import dist_vlcl.train  # noqa: F401
from dist_vlcl.run.environment import installed_packages

open_clip.factory.SimpleTokenizer = functools.cache(open_clip.factory.SimpleTokenizer)
open_clip.factory.SimpleTokenizer(context_length=77)

installed_packages()
gc.collect()
gc.freeze()
