"""PQN, the parallelised Q-network (Gallici et al., 2025): Q(lambda) without replay and without a target network.

Many environments and LayerNorm (`Config.layer_norm`) stand in for both. It learns from the block just acted in shuffled
minibatches of batch_size (`replay/latest.py`); updates_per_iteration is epochs times minibatches.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from jaxdqn import masks, td
from jaxdqn.agents.declaration import Declaration
from jaxdqn.agents.dqn import NOISE, epsilon_greedy_policy, value_loss
from jaxdqn.base import Agent, Array, Key, LossOutput, Network, PyTree, TargetBatch, Transition
from jaxdqn.config import FRACTION, HParams
from jaxdqn.exploration import epsilon_greedy
from jaxdqn.learning import Optimizer, sgd_agent
from jaxdqn.replay.latest import Targets


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trace:
    """Of the returns."""

    td_lambda: Annotated[float, FRACTION] = 0.65
    """Lambda of PQN's returns: 0 bootstraps after one step, 1 at the end of the episode or of the block."""


def pqn(network: Network, optimizer: Optimizer, penalty: td.Penalty = td.squared) -> Agent:
    """Descends (G_t - Q(s_t, a_t))^2, or another penalty, epsilon-greedily. Its target network is carried but unused.

    G_t = r_t + gamma discount_t ((1 - lambda) max_a Q(s_{t+1}, a) + lambda G_{t+1}), once for each block; a time limit
    and the block's end bootstrap on what their own step produced. Gallici et al. (2025), algorithm 1.
    """

    def act(
        params: PyTree, carry: PyTree, observation: PyTree, key: Key, exploration: Array
    ) -> tuple[Array, PyTree, PyTree]:
        q = network.apply(params, observation, jax.random.fold_in(key, NOISE))
        return epsilon_greedy(key, q, exploration, masks.legal_of(observation)), carry, jnp.max(q, axis=-1)

    def prepare(params: PyTree, block: Transition, key: Key, hparams: HParams) -> Transition:
        noise_key, order_key = jax.random.split(key)
        # Acting has valued what the next row began with. Time limits, and the last row, produced something else.
        wanted = (block.episode_end & (block.discount > 0)).at[-1].set(True)

        def value_row(carry: tuple[Array, Array]) -> tuple[Array, Array]:
            v_t, rows = carry
            row = jnp.argmax(rows)
            q = network.apply(params, jax.tree.map(lambda x: x[row], block.next_observation), noise_key)
            return v_t.at[row].set(jnp.where(wanted[row], jnp.max(q, axis=-1), v_t[row])), rows.at[row].set(False)

        acted = jnp.roll(block.extras, -1, axis=0), jnp.any(wanted, axis=1)
        v_t, _ = jax.lax.while_loop(lambda carry: jnp.any(carry[1]), value_row, acted)
        lambda_t = jnp.where(block.episode_end, 0.0, hparams.own.td_lambda)
        returns = jax.vmap(td.lambda_returns, in_axes=1, out_axes=1)
        target = returns(hparams.reward_scale * block.reward, hparams.gamma * block.discount, v_t, lambda_t)
        order = jax.random.permutation(order_key, block.reward.size).reshape(block.reward.shape)
        return block._replace(extras=Targets(target, order))

    def loss(params: PyTree, target_params: PyTree, batch: TargetBatch, key: Key, hparams: HParams) -> LossOutput:
        del target_params
        q_tm1 = network.apply(params, batch.observation, key)
        errors = batch.target - jnp.take_along_axis(q_tm1, batch.action[:, None], axis=1)[:, 0]
        return value_loss(errors, q_tm1, batch, penalty, hparams)

    policy = epsilon_greedy_policy(network.apply)._replace(act=act)
    return sgd_agent(network, loss, policy, optimizer, own=Trace())._replace(prepare=prepare)


PQN = Declaration(
    lambda around: pqn(around.network, around.optimizer, around.penalty),
    replay="minibatches",
    hparams=Trace,
    batch=TargetBatch,
    on_policy=True,
)
