"""Settings that must be in place before the JAX backend starts."""

import os
import pathlib
import tempfile

# Whoever wants the GPU says so: JAX_PLATFORMS=cuda pytest ...
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jaxlib

# Compiling is the largest part of the time of tests, and XLA's older generators of CPU code, with fewer of LLVM's
# passes, do it in half the time. What tests compare is all compiled so. Whoever wants what users get says so:
# XLA_FLAGS= pytest ... XLA ends where it does not know a flag: these are for the versions in which they were tried.
# Level 0 and parallel_codegen_split_count=1 would save a third once more, but with either, programs that should agree
# in every bit (one worker and the fused loop) differ in the last.
if jaxlib.__version__.startswith("0.10."):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=1")

import hypothesis
import jax
import pytest

from jaxdqn.parallel.compiled import memory

NUM_CPU_DEVICES = 8

jax.config.update("jax_num_cpu_devices", NUM_CPU_DEVICES)
# One directory for all workers of pytest-xdist and for the next run. By user, as the temporary directory is shared.
jax.config.update(
    "jax_compilation_cache_dir", str(pathlib.Path(tempfile.gettempdir()) / f"jaxdqn-test-cache-{os.getuid()}")
)
# Single operations too: there are thousands, and each module begins without any.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

hypothesis.settings.register_profile("jaxdqn", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("jaxdqn")


@pytest.fixture(scope="module", autouse=True)
def no_programs_of_other_modules():
    """A process that runs the whole suite would hold gigabytes of compiled programs."""
    yield
    memory.forget_programs(most=0)
