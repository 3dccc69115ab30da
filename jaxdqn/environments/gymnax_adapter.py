"""gymnax 1.x as our `Environment` record; the only place that imports gymnax."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import gymnax
import jax
import jax.numpy as jnp

from jaxdqn.base import Array, Environment, Key, PyTree, Spec, TimeStep
from jaxdqn.environments import arguments, encoding, trial
from jaxdqn.environments.contract import line, one_array
from jaxdqn.environments.names import GYMNAX
from jaxdqn.errors import UserError, shown, unknown_name

# Observations that hold only 0 and 1 and arrive as float32: stored as bool (tests/test_environments.py checks each).
BINARY = {
    "Asterix-MinAtar",
    "Breakout-MinAtar",
    "Freeway-MinAtar",
    "Seaquest-MinAtar",
    "SpaceInvaders-MinAtar",
    "Catch-bsuite",
    "DeepSea-bsuite",
    "Pong-misc",
}
# Parameters that gymnax declares, and never reads (tests/test_environments.py checks that, too).
UNREAD = {
    "Acrobot-v1": {"link_length_2"},
    "Asterix-MinAtar": {"shot_cool_down"},
    "Seaquest-MinAtar": {"ramp_interval", "enemy_move_interval"},
}
# Parameters that follow from others, which gymnax holds as numbers of their own.
DERIVED: dict[str, dict[str, Callable[[Any], float]]] = {
    "CartPole-v1": {
        "total_mass": lambda params: params.masscart + params.masspole,
        "polemass_length": lambda params: params.masspole * params.length,
    }
}


def make(
    name: str,
    env_params: dict[str, object],
    env_kwargs: dict[str, object],
    factory: Callable[..., object] | None = None,
) -> Environment:
    """gymnax's environment of that name, or what a registered `factory` makes: a gymnax environment or our record.

    Raises `UserError` as `construct` and `adapt` do, and for parameters of a record, which has none.
    """
    environment = construct(name, factory, env_kwargs)
    if not isinstance(environment, Environment):
        return adapt(name, environment, env_params)
    if env_params:
        raise UserError(f"environment {name!r} takes no env_params; it got {', '.join(sorted(env_params))}.")
    return environment


def construct(name: str, factory: Callable[..., object] | None, env_kwargs: dict[str, object]) -> Any:
    """The registered factory's environment, or gymnax's of that name. Raises `UserError` for a wrong argument."""
    own = factory is None
    factory = factory or gymnax.registration._builtins[name]
    parameters = inspect.signature(factory).parameters
    known = [p.name for p in parameters.values() if p.kind != p.VAR_KEYWORD]
    given = {}
    for argument, value in env_kwargs.items():
        if argument not in known and len(known) == len(parameters):
            if not known:
                raise UserError(f"environment {name!r} takes no env_kwargs; it got {argument!r}.")
            raise unknown_name(f"env_kwargs field of {name}", argument, known)
        what = f"env_kwargs.{argument} of {name}"
        given[argument] = arguments.sized(what, value, parameters[argument].default) if own else value
    try:
        return factory(**given)
    except UserError:
        raise
    except Exception as error:  # of any kind: it is other people's code
        raise UserError(f"environment {name!r} cannot be made with env_kwargs {shown(given)}: {line(error)}") from error


def adapt(name: str, env: Any, env_params: dict[str, object]) -> Environment:
    """A gymnax environment as our record.

    Raises `UserError` for an unknown parameter, a value of another type than the default's, continuous actions, what
    cannot be stored, and a user's environment that does not stand a short trial.
    """
    params = _replace_params(name, env.default_params, env_params)
    actions = env.action_space(params)
    if not hasattr(actions, "n"):
        raise UserError(f"environment {name!r} has no discrete action space ({shown(actions)}); jaxdqn needs one.")
    raw = one_array(name, jax.eval_shape(lambda key: env.reset(key, params)[0], jax.random.key(0)))
    encode = _encoder(name, raw, env.observation_space(params))
    first_action = int(getattr(actions, "start", 0))
    if name not in GYMNAX:
        _try(name, env, params, raw, (first_action, int(actions.n)))

    def reset(key: Key) -> tuple[PyTree, Array]:
        observation, state = env.reset(key, params)
        return _strong(state), encode(observation)

    def step(key: Key, state: PyTree, action: Array) -> tuple[PyTree, TimeStep]:
        observation, next_state, reward, terminated, truncated, info = env.step(
            key, state, action + first_action, params
        )
        # A branch of gymnax's reset select may widen a dtype; the carry of a loop must keep it.
        next_state = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), next_state, state)
        return next_state, TimeStep(
            observation=encode(observation),
            reward=jnp.asarray(reward, jnp.float32),
            discount=1.0 - jnp.asarray(terminated, jnp.float32),
            final_observation=encode(info["final_observation"]),
            episode_end=jnp.logical_or(terminated, truncated),
        )

    example = jax.eval_shape(reset, jax.random.key(0))[1]
    limit = getattr(params, "max_steps_in_episode", None)
    spec = Spec(name, jax.ShapeDtypeStruct(example.shape, example.dtype), int(actions.n), limit and int(limit))
    return Environment(reset, step, spec)


def _encoder(name: str, raw: jax.ShapeDtypeStruct, space: Any) -> Callable[[Array], Array]:
    if name in BINARY:
        return lambda observation: jnp.asarray(observation).astype(jnp.bool_)
    return encoding.encoder(name, raw, space)


def _try(name: str, env: Any, params: PyTree, raw: jax.ShapeDtypeStruct, actions: tuple[int, int]) -> None:
    trial.check_values(name, env, params, actions[0])
    trial.check_limit(name, env, params, actions)
    if encoding.categorical(raw):
        trial.check_bounds(name, env, params, actions, encoding.bounds(name, raw, env.observation_space(params)))


def _replace_params(name: str, params: PyTree, env_params: dict[str, object]) -> PyTree:
    for field in sorted(UNREAD.get(name, frozenset()) & set(env_params)):
        raise UserError(f"env_params.{field} of {name} has no effect: gymnax does not read it. Leave it out.")
    known = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
    params = params.replace(**arguments.among("env_params", name, env_params, known, {"max_steps_in_episode"}))
    follow = {field: of for field, of in DERIVED.get(name, {}).items() if field not in env_params}
    return params.replace(**{field: of(params) for field, of in follow.items()})


def _strong(tree: PyTree) -> PyTree:
    """Without weak types: a weakly typed reset state makes the second call of a jitted function compile again."""
    return jax.tree.map(lambda leaf: jax.lax.convert_element_type(leaf, jnp.asarray(leaf).dtype), tree)
