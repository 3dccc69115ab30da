"""Ensembles: M members of an agent that learn apart, and act together.

Members differ in their initial parameters, and, with a mask, in the rows they learn from (Osband et al., 2016). Their
values are aggregated for acting only: by mean, by majority vote (Wiering and van Hasselt, 2008) or by ownership of the
state. Each bootstraps from its own target, unlike Ensemble-DQN (Anschel et al., 2017), whose target is the mean too.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from jaxdqn import td
from jaxdqn.agents.declaration import Around, Declaration
from jaxdqn.agents.dqn import dqn, epsilon_greedy_policy
from jaxdqn.agents.multi import stacked
from jaxdqn.agents.multi.ownership import Owner
from jaxdqn.agents.multi.partitioned import merge
from jaxdqn.base import Agent, Array, Batch, Key, LearnerState, LossOutput, Network, PyTree
from jaxdqn.config import HParams
from jaxdqn.errors import UserError
from jaxdqn.learning import Optimizer
from jaxdqn.td import Penalty

Aggregate = Callable[[Array, Array], Array]
"""aggregate(q [M, N, A], observation [N, *O]) -> scores [N, A], the greedy action being the highest score's."""


def mean(q: Array, observation: Array) -> Array:
    """The mean of the members' values."""
    del observation
    # Around the first member: equal members then give exactly their value, whatever M is.
    return q[0] + jnp.mean(q - q[0], axis=0)


def vote(q: Array, observation: Array) -> Array:
    """The action that most members find greedy; of actions with equally many votes the one with the highest mean value.

    Scores are the mean values of the actions with most votes, -inf for the rest; of equal ones the first is taken.
    """
    votes = jnp.sum(jax.nn.one_hot(jnp.argmax(q, axis=-1), q.shape[-1]), axis=0)
    return jnp.where(votes == jnp.max(votes, axis=-1, keepdims=True), mean(q, observation), -jnp.inf)


def ownership(owner: Owner) -> Aggregate:
    """The member that owns the state decides: sum_k 1[owner(s) = k] Q_k(s)."""
    return lambda q, observation: merge(q, jax.vmap(owner)(observation))


AGGREGATES: dict[str, Aggregate] = {"mean": mean, "vote": vote}


def ensemble(member: Agent, size: int, aggregate: Aggregate = mean, keep_probability: float = 1.0) -> Agent:
    """`size` members like `member`, any agent with `values`: params [M, ...], each with a loss, target, optimizer and
    bound on its gradient of its own.

    Below 1, `keep_probability` gives each its own random part of every batch; drawn anew for every batch, where Osband
    et al. (2016) fix it for each transition. Loss, priorities and metrics are the members' means, the distribution of
    the return is their mixture, and the gradient norm is that of all. A member that is not finite stops all.
    """
    assert member.values is not None
    values, return_distribution = member.values, member.distribution

    def init(key: Key, hparams: HParams) -> LearnerState:
        return _together(jax.vmap(member.init, (0, None))(stacked.keys(key, size), hparams))

    def gradient(learner: LearnerState, batch: Batch, key: Key, hparams: HParams) -> tuple[PyTree, LossOutput]:
        def one(learner: LearnerState, key: Key) -> tuple[PyTree, LossOutput]:
            if keep_probability == 1.0:
                return member.gradient(learner, batch, key, hparams)
            mask_key, key = jax.random.split(key)
            kept = jax.random.bernoulli(mask_key, keep_probability, batch.weights.shape)
            return member.gradient(learner, batch._replace(weights=batch.weights * kept), key, hparams)

        gradients, outputs = stacked.over_stack(one)(_apart(learner, size), jax.random.split(key, size))
        return gradients, jax.tree.map(lambda x: jnp.mean(x, axis=0), outputs)

    def apply(learner: LearnerState, gradients: PyTree, loss: Array, hparams: HParams) -> tuple[LearnerState, Array]:
        def one(learner: LearnerState, gradient: PyTree) -> tuple[LearnerState, Array]:
            return member.apply(learner, gradient, loss, hparams)

        each, norms = stacked.over_stack(one)(_apart(learner, size), gradients)
        moved = _together(each)
        healthy = moved.first_bad_update < 0
        params, target_params = jax.tree.map(
            lambda new, old: jnp.where(healthy, new, old),
            (moved.params, moved.target_params),
            (learner.params, learner.target_params),
        )
        return moved._replace(params=params, target_params=target_params), optax.global_norm(norms)

    def scores(params: PyTree, observation: PyTree, key: Key | None = None) -> Array:
        return aggregate(stacked.over_stack(lambda one: values(one, observation, key))(params), observation)

    def mixture(params: PyTree, observation: PyTree, hparams: HParams) -> tuple[Array, Array]:
        assert return_distribution is not None
        one = functools.partial(return_distribution, observation=observation, hparams=hparams)
        returns, probabilities = stacked.over_stack(one)(params)
        return jnp.concatenate(list(returns), axis=-1), jnp.concatenate(list(probabilities), axis=-1) / size

    act, greedy, _ = epsilon_greedy_policy(scores)
    return member._replace(
        init=init,
        act=act,
        greedy=greedy,
        gradient=gradient,
        apply=apply,
        distribution=return_distribution and mixture,
        values=scores,
        features=None,
    )


def _apart(learner: LearnerState, size: int) -> LearnerState:
    """The learners of the members: what they count together as one each."""
    counts = (jnp.broadcast_to(x, (size,)) for x in (learner.updates, learner.first_bad_update))
    return LearnerState(*learner[:3], *counts)


def _together(learner: LearnerState) -> LearnerState:
    """The inverse: all have done as many updates, and are bad where one is."""
    return learner._replace(updates=learner.updates[0], first_bad_update=jnp.max(learner.first_bad_update))


def ensemble_dqn(
    network: Network, optimizer: Optimizer, penalty: Penalty = td.squared, *, size: int, aggregate: str = "mean"
) -> Agent:
    """An ensemble of DQNs; `aggregate` is a name in `AGGREGATES`."""
    return ensemble(dqn(network, optimizer, penalty), size, AGGREGATES[aggregate])


@dataclasses.dataclass(frozen=True)
class Settings:
    """How many networks, and how they act together."""

    ensemble_size: int = 5
    """Networks of an ensemble."""
    ensemble_act: Literal["mean", "vote"] = "mean"
    """How an ensemble acts: by the mean of its members' values, or by their majority vote."""


def ensemble_of(name: str, declared: Declaration) -> Declaration:
    """The declaration of an ensemble of the agent called `name`, with the settings of both. Raises `UserError` where
    its members could not learn apart."""
    refused = UserError(
        f"agent 'ensemble_{name}': ensembles are of agents that act by the values of one network and learn from single "
        f"transitions of any policy, such as 'ensemble_dqn' or 'ensemble_c51'; {name!r} is not one."
    )
    if declared.batch is not Batch or declared.on_policy or declared.stacked:
        raise refused

    def make(around: Around) -> Agent:
        own, member = around.settings, declared.make(around)
        if member.values is None:
            raise refused
        return ensemble(member, own.ensemble_size, AGGREGATES[own.ensemble_act])

    settings = dataclasses.make_dataclass("EnsembleSettings", (), bases=(Settings, declared.settings), frozen=True)
    return declared._replace(make=make, settings=settings, stacked=True)
