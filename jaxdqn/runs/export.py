"""A greedy policy as one serialised JAX function, `jax.export`."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from jaxdqn.base import Array
from jaxdqn.files.paths import write_atomically
from jaxdqn.runs import results

NUM_CHECKED = 256


def export_policy(run: pathlib.Path, member: int, path: pathlib.Path) -> int:
    """Writes member's greedy policy, observation [B, *O] -> action [B] for any B, and returns how many actions of the
    reloaded file were found equal to the run's.

    Works on CPU and CUDA. Raises `UserError` for a run or member that is not there.
    """
    result = results.load(run)
    params = results.member_params(result.params, member)
    agent, spec = result.components.agent, result.components.environment.spec

    def policy(observation: Array) -> Array:
        return agent.greedy(params, agent.initial_carry(observation.shape[0]), observation, jax.random.key(0))[0]

    (batch,) = export.symbolic_shape("b")
    example = jax.ShapeDtypeStruct((batch, *spec.observation.shape), spec.observation.dtype)
    exported = export.export(jax.jit(policy), platforms=("cpu", "cuda"))(example)
    write_atomically(path, lambda temporary: temporary.write_bytes(exported.serialize()))
    reloaded = export.deserialize(bytearray(path.read_bytes()))
    observations = results.watch(result, member, seed=0)[:NUM_CHECKED]
    native, again = np.asarray(policy(jnp.asarray(observations))), np.asarray(reloaded.call(observations))
    if not np.array_equal(native, again):
        raise AssertionError("the exported policy chooses other actions than the run's.")
    return len(native)
