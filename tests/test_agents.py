"""The losses of the value-based agents against rlax, and the random agent against its name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax
import scipy.stats

from jaxdqn.base import Batch, Spec
from jaxdqn.components import make_agent
from jaxdqn.config import Config, HParams
from jaxdqn.errors import UserError
from jaxdqn.networks import q_network

B, A = 32, 3
KEY = jax.random.key(0)
H = jax.tree.map(jnp.float32, HParams(huber_delta=0.5))
SPEC = Spec("test", jax.ShapeDtypeStruct((4,), jnp.float32), A)
CONFIG = Config(hidden_sizes=(16,))


@pytest.fixture(scope="module")
def batch():
    random = np.random.default_rng(0)
    return Batch(
        observation=jnp.asarray(random.normal(size=(B, 4)), jnp.float32),
        action=jnp.asarray(random.integers(A, size=B), jnp.int32),
        return_m=jnp.asarray(random.normal(size=B), jnp.float32),
        bootstrap_discount=jnp.asarray(0.9 * (random.random(B) < 0.8), jnp.float32),
        bootstrap_observation=jnp.asarray(random.normal(size=(B, 4)), jnp.float32),
        weights=jnp.asarray(random.random(B), jnp.float32),
    )


def learner_and_q(agent):
    """A learner whose target differs from its online network, and the Q-function of parameters."""
    learner = agent.init(jax.random.key(0), H)
    learner = learner._replace(target_params=agent.init(jax.random.key(1), H).params)
    return learner, q_network(SPEC, hidden_sizes=CONFIG.hidden_sizes).apply


def rlax_errors(name, q, params, learner, batch):
    """TD errors [B] by rlax, as a function of the online parameters."""
    q_tm1, q_t = q(params, batch.observation), q(learner.target_params, batch.bootstrap_observation)
    arguments = (q_tm1, batch.action, batch.return_m, batch.bootstrap_discount, q_t)
    if name == "dqn":
        return jax.vmap(rlax.q_learning)(*arguments)
    return jax.vmap(rlax.double_q_learning)(*arguments, q(params, batch.bootstrap_observation))


@pytest.mark.parametrize("loss, penalty", [("squared", rlax.l2_loss), ("huber", lambda x: rlax.huber_loss(x, 0.5))])
@pytest.mark.parametrize("name", ["dqn", "double_dqn"])
def test_loss_gradient_and_priorities_are_rlaxs(name, loss, penalty, batch):
    agent = make_agent(Config(agent=name, loss=loss, hidden_sizes=CONFIG.hidden_sizes), SPEC)
    learner, q = learner_and_q(agent)

    def expected_loss(params):
        errors = rlax_errors(name, q, params, learner, batch)
        return jnp.mean(batch.weights * penalty(errors)), errors

    (expected, errors), expected_gradients = jax.value_and_grad(expected_loss, has_aux=True)(learner.params)
    gradients, output = agent.gradient(learner, batch, KEY, H)
    np.testing.assert_allclose(output.loss, expected, rtol=1e-5)
    np.testing.assert_allclose(output.priorities, jnp.abs(errors), rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), gradients, expected_gradients)


def test_value_agents_act_epsilon_greedily(batch):
    agent = make_agent(CONFIG, SPEC)
    learner, q = learner_and_q(agent)
    best = jnp.argmax(q(learner.params, batch.observation), axis=1)
    action, carry, extras = agent.act(learner.params, (), batch.observation, KEY, jnp.zeros(B))
    np.testing.assert_array_equal(action, best)
    assert (carry, extras) == ((), ())
    action, carry, extras = agent.greedy(learner.params, (), batch.observation, KEY)
    np.testing.assert_array_equal(action, best)
    assert (action.dtype, carry, extras) == (jnp.int32, (), ())


def test_the_random_agent_is_uniform_even_when_asked_to_be_greedy():
    agent = make_agent(Config(agent="random"), SPEC)
    observation = jnp.zeros((9000, 4))
    action, _, _ = agent.greedy(agent.init(KEY, H).params, (), observation, KEY)
    assert action.dtype == jnp.int32
    assert scipy.stats.chisquare(np.bincount(action, minlength=A)).pvalue > 1e-3


def test_an_unknown_agent_suggests_the_nearest():
    with pytest.raises(UserError, match=r"'doubledqn'.*'double_dqn'"):
        make_agent(Config(agent="doubledqn"), SPEC)
