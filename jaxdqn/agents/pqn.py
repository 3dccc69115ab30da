"""PQN, the parallelised Q-network (Gallici et al., 2025): Q(lambda) without replay and without a target network.

Many environments and LayerNorm (`Config.layer_norm`) stand in for both. It learns from the block just acted, in several
epochs of shuffled minibatches (`replay/latest.py`): batch_size is that of a minibatch, updates_per_iteration is epochs
times minibatches.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from jaxdqn import td
from jaxdqn.agents.declaration import Declaration
from jaxdqn.agents.dqn import epsilon_greedy_policy, value_loss
from jaxdqn.base import Agent, Key, LossOutput, Network, PyTree, TargetBatch, Transition
from jaxdqn.config import FRACTION, HParams
from jaxdqn.learning import Optimizer, sgd_agent
from jaxdqn.replay.latest import Targets
from jaxdqn.td import Penalty


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trace:
    """Of the returns."""

    td_lambda: Annotated[float, FRACTION] = 0.65
    """Lambda of PQN's returns: 0 bootstraps after one step, 1 at the end of the episode or of the block."""


def pqn(network: Network, optimizer: Optimizer, penalty: Penalty = td.squared) -> Agent:
    """Descends (G_t - Q(s_t, a_t))^2, or another penalty, epsilon-greedily. Its target network is carried but unused.

    G_t = r_t + gamma discount_t ((1 - lambda) max_a Q(s_{t+1}, a) + lambda G_{t+1}), computed once for each block, with
    the parameters that acted; the step's own final observation is s_{t+1}, and a time limit or the end of the block
    bootstraps on it alone. Gallici et al. (2025), algorithm 1.
    """

    def prepare(params: PyTree, block: Transition, key: Key, hparams: HParams) -> Transition:
        shape, (noise_key, order_key) = block.reward.shape, jax.random.split(key)
        produced = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), block.next_observation)
        v_t = jnp.max(network.apply(params, produced, noise_key), axis=-1).reshape(shape)
        lambda_t = jnp.where(block.episode_end, 0.0, hparams.own.td_lambda)
        target = jax.vmap(td.lambda_returns, in_axes=1, out_axes=1)(
            hparams.reward_scale * block.reward, hparams.gamma * block.discount, v_t, lambda_t
        )
        order = jax.random.permutation(order_key, block.reward.size).reshape(shape)
        return block._replace(extras=Targets(target, order))

    def loss(params: PyTree, target_params: PyTree, batch: TargetBatch, key: Key, hparams: HParams) -> LossOutput:
        del target_params
        q_tm1 = network.apply(params, batch.observation, key)
        chosen = jnp.take_along_axis(q_tm1, batch.action[:, None], axis=1)[:, 0]
        return value_loss(batch.target - chosen, q_tm1, batch, penalty, hparams)

    agent = sgd_agent(network, loss, epsilon_greedy_policy(network.apply), optimizer, own=Trace())
    return agent._replace(prepare=prepare)


PQN = Declaration(
    lambda around: pqn(around.network, around.optimizer, around.penalty),
    replay="minibatches",
    hparams=Trace,
    batch=TargetBatch,
    on_policy=True,
)
