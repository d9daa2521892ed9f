"""JAX, set up once per process: compiled programs kept on disk, full-precision products."""

from __future__ import annotations

import os

from poisonbench._files import cache_folder


def setup() -> None:
    """Use the persistent compilation cache, and float32 products that are float32.

    Metagradients need full precision: half precision breaks them, and some devices would use
    less than float32 by default.
    """
    # XLA's notes on reloading its own compiled programs are of no use to ours.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import jax

    jax.config.update("jax_compilation_cache_dir", str(cache_folder("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    jax.config.update("jax_default_matmul_precision", "highest")
