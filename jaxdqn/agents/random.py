"""Uniformly random actions: the baseline every curve should be compared with."""

import jax
import jax.numpy as jnp

from jaxdqn import masks
from jaxdqn.agents.declaration import Declaration
from jaxdqn.base import Agent, Array, Key, LearnerState, LossOutput, Network, PyTree
from jaxdqn.config import HParams


def random(network: Network, *_: object) -> Agent:
    """Acts uniformly at random, also when evaluated; its network is only asked how many actions there are."""

    def init(key: Key, hparams: HParams) -> LearnerState:
        del key, hparams
        return LearnerState((), (), (), jnp.int32(0), jnp.int32(-1))

    def act(
        params: PyTree, carry: PyTree, observation: PyTree, key: Key, exploration: Array | None = None
    ) -> tuple[Array, PyTree, PyTree]:
        del params, exploration
        q = jax.eval_shape(lambda k: network.apply(network.init(k), observation), key)
        legal = masks.legal_of(observation)
        index = jax.random.randint(key, q.shape[:1], 0, masks.count(q.shape[1], legal))
        return masks.nth(index, legal), carry, ()

    def gradient(learner: LearnerState, batch: PyTree, key: Key, hparams: HParams) -> tuple[PyTree, LossOutput]:
        del learner, key, hparams
        zeros = jnp.zeros_like(batch.return_m)
        return (), LossOutput(jnp.float32(0), zeros, {})

    def apply(learner: LearnerState, gradients: PyTree, loss: Array, hparams: HParams) -> tuple[LearnerState, Array]:
        del gradients, loss, hparams
        return learner._replace(updates=learner.updates + 1), jnp.float32(0)

    return Agent(init, lambda num_envs: (), act, act, gradient, apply)


RANDOM = Declaration(lambda around: random(around.network))
