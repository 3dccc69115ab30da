"""State-partitioned DQN as K separate nodes, which never see one another's experience.

    node k:  own transitions -> gradient -> own parameters -> own target -.
    node j:  ...  <- targets of all owners <- Message(parameters) --------'

The algorithm of `jaxdqn/agents/multi/partitioned.py`, which computes all owners at once; a test holds the two equal.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdqn import td
from jaxdqn.agents.dqn import epsilon_greedy_policy, value_loss
from jaxdqn.agents.multi import stacked
from jaxdqn.agents.multi.ownership import Owner
from jaxdqn.agents.multi.partitioned import partitioned
from jaxdqn.base import Agent, Batch, Key, LossOutput, Network, PyTree
from jaxdqn.learning import Optimizer, sgd_agent
from jaxdqn.td import Penalty


class Message(NamedTuple):
    """All that leaves a node: one owner's parameters, or a gradient with respect to them."""

    sender: int
    content: PyTree


def node_message(sender: int, content: PyTree, params: PyTree) -> Message:
    """`content` as a message. Raises `TypeError` unless tree, shapes and dtypes are those of one owner's `params`.

    So experience cannot be sent: a message's size depends on the network alone, not on how much a node has seen.
    """
    expected, given = (jax.eval_shape(lambda tree: tree, tree) for tree in (params, content))
    if len({jax.tree.structure(expected), jax.tree.structure(given)}) > 1:
        raise TypeError(f"a node sends parameters or gradients only; node {sender} was to send {type(content)}.")
    for wanted, leaf in zip(jax.tree.leaves(expected), jax.tree.leaves(given), strict=True):
        if (wanted.shape, wanted.dtype) != (leaf.shape, leaf.dtype):
            raise TypeError(f"a node sends parameters or gradients only; node {sender} was to send {leaf}.")
    return Message(sender, content)


def node_agent(
    index: int, network: Network, owner: Owner, num_owners: int, optimizer: Optimizer, penalty: Penalty = td.squared
) -> Agent:
    """What one node learns: DQN on its own region, from data (Batch, targets [K, ...] of all owners)."""
    merged = partitioned(network, owner, num_owners)

    def loss(params: PyTree, target_params: PyTree, data: tuple[Batch, PyTree], key: Key, hparams: Any) -> LossOutput:
        del target_params, key  # its own target is among those of all owners
        batch, targets = data
        own = jax.vmap(owner)(batch.observation) == index
        q_tm1 = network.apply(params, batch.observation)
        q_t = merged.apply(targets, batch.bootstrap_observation)
        errors = jax.vmap(td.q_learning)(q_tm1, batch.action, batch.return_m, batch.bootstrap_discount, q_t)
        return value_loss(errors, q_tm1, batch._replace(weights=batch.weights * own), penalty, hparams)

    return sgd_agent(network, loss, epsilon_greedy_policy(network.apply), stacked.unless_zero(optimizer))


class Node:
    """One owner: its parameters, optimizer state and target, and the others' targets as they last arrived."""

    def __init__(self, index: int, agent: Agent, params: PyTree, hparams: Any):
        learner = agent.init(jax.random.key(0), hparams)
        learner = learner._replace(params=params, target_params=jax.tree.map(jnp.copy, params))
        self.index, self.agent, self.learner, self.hparams = index, agent, learner, hparams
        self.targets: PyTree = None  # [K, ...]

    def message(self) -> Message:
        """Its target parameters, for the others to bootstrap from; they change every target_period updates."""
        return node_message(self.index, self.learner.target_params, self.learner.params)

    def receive(self, messages: Sequence[Message]) -> None:
        """One message of each node, its own included."""
        ordered = sorted(messages, key=lambda message: message.sender)
        self.targets = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(m.content for m in ordered))

    def learn(self, batch: Batch) -> None:
        """One update from this node's experience, of which it uses the rows in its region."""
        key = jax.random.key(0)  # the loss draws nothing
        gradients, output = self.agent.gradient(self.learner, (batch, self.targets), key, self.hparams)
        self.learner, _ = self.agent.apply(self.learner, gradients, output.loss, self.hparams)


def exchange(nodes: Sequence[Node]) -> list[Message]:
    """Every node sends to every node; returns what was sent."""
    messages = [node.message() for node in nodes]
    for node in nodes:
        node.receive(messages)
    return messages
