"""Keep the metadata of installed packages in memory.

At every step, accelerate reads the metadata of several packages from the disk. In a training of a few steps of a tiny
model, this is up to a third of the time.
"""

import functools
import importlib.metadata

importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)
