"""A greedy policy as one serialised JAX function, `jax.export`."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from jaxdqn.base import PyTree
from jaxdqn.errors import UserError
from jaxdqn.files.paths import write_atomically
from jaxdqn.masks import Masked
from jaxdqn.runs import results

NUM_CHECKED = 256


def export_policy(run: pathlib.Path, member: int, path: pathlib.Path) -> int:
    """Writes member's greedy policy, and returns how many actions of the reloaded file were found equal to the run's.

    The policy is observation [B, *O] -> action [B] for any B; of a recurrent agent (observation, state [B, ...]) ->
    (action, state), where the state at an episode's start is zeros. Where the environment has a mask of legal actions,
    observation is the tuple (observation, legal [B, A]). Works on CPU and CUDA. Raises `UserError` for a run or member
    that is not there, an agent without parameters, and observations of a class that `jax.export` does not know.
    """
    result = results.load(run)
    params = results.member_params(result, member)
    if not jax.tree.leaves(params):
        raise UserError(f"agent {result.config.agent!r} has learned nothing that could be exported.")
    agent, spec = result.components.agent, result.components.environment.spec
    recurrent = bool(jax.tree.leaves(agent.initial_carry(1)))

    has_mask = isinstance(spec.observation, Masked)

    def given(observation: PyTree) -> PyTree:
        return tuple(observation) if has_mask else observation  # whoever calls the file need not know our class

    def policy(observation: PyTree, *state: PyTree) -> Any:
        carry = state[0] if recurrent else agent.initial_carry(jax.tree.leaves(observation)[0].shape[0])
        observation = Masked(*observation) if has_mask else observation
        action, carry, _ = agent.greedy(params, carry, observation, jax.random.key(0))
        return (action, carry) if recurrent else action

    (batch,) = export.symbolic_shape("b")

    def example(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, *leaf.shape), leaf.dtype)

    state = (jax.tree.map(lambda leaf: example(leaf[0]), agent.initial_carry(1)),) if recurrent else ()
    shapes = given(jax.tree.map(example, spec.observation))
    exported = export.export(jax.jit(policy), platforms=("cpu", "cuda"))(shapes, *state)
    try:
        content = exported.serialize()
    except ValueError as error:  # a class of observations that jax.export does not know
        raise UserError(f"the observations of {result.config.env!r} cannot be exported: {error}") from error
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
    reloaded = export.deserialize(bytearray(path.read_bytes()))
    observations = jax.tree.map(lambda x: jnp.asarray(x[:NUM_CHECKED]), given(results.watch(result, member, seed=0)))
    start = (agent.initial_carry(len(jax.tree.leaves(observations)[0])),) if recurrent else ()
    native, again = (jax.tree.leaves(f(observations, *start))[0] for f in (policy, reloaded.call))
    if not np.array_equal(native, again):
        raise AssertionError("the exported policy chooses other actions than the run's.")
    return len(native)
