"""Torsos and heads; the only place that imports flax modules.

Networks take observations as stored: bool becomes 0/1, uint8 becomes [0, 1], the rest is used as it is.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdqn.acting import reset_where
from jaxdqn.base import Array, Key, Network, PyTree, RecurrentNetwork, Spec, zeros_of
from jaxdqn.config import Config
from jaxdqn.errors import UserError

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": nn.relu,
    "tanh": nn.tanh,
    "silu": nn.silu,
    "gelu": nn.gelu,
    "elu": nn.elu,
}
SIGMA = 0.5  # size of the noise at first, divided by the square root of a layer's inputs
NATURE_MIN_SIDE = 36  # the smallest image on which its three convolutions leave at least one pixel


Dense = Callable[[int, float], Callable[[Array], Array]]
"""dense(width, gain) -> a dense layer, `gain` being that of orthogonal initialisation."""


class Head(NamedTuple):
    """What a network gives, made of dense layers on the features of its torso.

    apply(dense, features [B, F]) -> outputs; num_layers: how many layers it makes
    """

    apply: Callable[[Dense, Array], Any]
    num_layers: int


def action_values(num_actions: int, dueling: bool = False) -> Head:
    """Q [B, A]; `dueling` as V + A - mean A (Wang et al., 2016, equation 9)."""

    def plain(dense: Dense, x: Array) -> Array:
        return dense(num_actions, 1.0)(x)

    def duel(dense: Dense, x: Array) -> Array:
        value, advantage = dense(1, 1.0)(x), dense(num_actions, 1.0)(x)
        return value + advantage - jnp.mean(advantage, axis=-1, keepdims=True)

    return Head(duel, 2) if dueling else Head(plain, 1)


def policy_and_value(num_actions: int) -> Head:
    """(logits [B, A], value [B]) on one torso."""
    return Head(lambda dense, x: (dense(num_actions, 0.01)(x), dense(1, 1.0)(x)[:, 0]), 2)


class Conv3x3(nn.Module):
    """3 x 3 convolution without padding, [B, H, W, C] -> [B, H-2, W-2, features].

    method "patches" gathers the neighbourhoods by slicing and multiplies once, which on a CPU, and under `vmap` over
    members, is much faster than "lax" (grouped convolutions). Both share parameters: kernel [3, 3, C, features], bias.
    """

    features: int
    kernel_init: Any
    method: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (3, 3, channels, self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        if self.method == "lax":
            dimensions = ("NHWC", "HWIO", "NHWC")
            return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=dimensions) + bias
        height, width = x.shape[1] - 2, x.shape[2] - 2
        patches = [x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
        return jnp.concatenate(patches, axis=-1) @ kernel.reshape(9 * channels, self.features) + bias


class NoisyDense(nn.Module):
    """A dense layer whose weights have factorised Gaussian noise with learned sizes (Fortunato et al., 2018).

    y = (mu_w + sigma_w f(e_i) f(e_o)^T)^T x + mu_b + sigma_b f(e_o), f(e) = sgn(e) sqrt(|e|), drawn once for the whole
    batch; without a "noise" key the mean, mu_w^T x + mu_b. Initialised as in section 3.2 there.
    """

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]

        def mean(key: Key, shape: tuple[int, ...]) -> Array:
            return jax.random.uniform(key, shape, minval=-(width**-0.5), maxval=width**-0.5)

        size = nn.initializers.constant(SIGMA * width**-0.5)
        kernel = self.param("kernel", mean, (width, self.features))
        bias = self.param("bias", mean, (self.features,))
        kernel_sigma = self.param("kernel_sigma", size, (width, self.features))
        bias_sigma = self.param("bias_sigma", size, (self.features,))
        if self.has_rng("noise"):
            drawn = jax.random.normal(self.make_rng("noise"), (width + self.features,))
            noise = jnp.sign(drawn) * jnp.sqrt(jnp.abs(drawn))
            inputs, outputs = noise[:width], noise[width:]
            kernel, bias = kernel + kernel_sigma * jnp.outer(inputs, outputs), bias + bias_sigma * outputs
        return x @ kernel + bias


class TorsoAndHead(nn.Module):
    """A torso by name, and a head on its features."""

    head: Head
    torso: str
    hidden_sizes: Sequence[int]
    layer_norm: bool
    activation: str
    initializer: str
    convolution: str
    noisy: bool = False

    @nn.compact
    def __call__(self, observation: Array) -> Any:
        return self.head.apply(self._dense, self._torso(_decode(observation)))

    def _torso(self, x: Array) -> Array:
        if self.torso == "mlp":
            x = x.reshape(x.shape[0], -1)
            for width in self.hidden_sizes:
                x = self._activate(self._dense(width)(x))
            return x
        if self.torso == "minatar":
            x = self._activate(Conv3x3(16, self._kernel_init(2**0.5), self.convolution)(x))
            return self._activate(self._dense(128)(x.reshape(x.shape[0], -1)))
        for features, size, stride in ((32, 8, 4), (64, 4, 2), (64, 3, 1)):
            kernel_init = self._kernel_init(2**0.5)
            x = self._activate(nn.Conv(features, (size, size), stride, "VALID", kernel_init=kernel_init)(x))
        return self._activate(self._dense(512)(x.reshape(x.shape[0], -1)))

    def _activate(self, x: Array) -> Array:
        return ACTIVATIONS[self.activation](nn.LayerNorm()(x) if self.layer_norm else x)

    def _dense(self, features: int, gain: float = 2**0.5) -> nn.Module:
        if self.noisy:
            return NoisyDense(features)
        return nn.Dense(features, kernel_init=self._kernel_init(gain))

    def _kernel_init(self, gain: float) -> Any:
        return nn.initializers.lecun_normal() if self.initializer == "default" else nn.initializers.orthogonal(gain)


def q_network(
    spec: Spec,
    torso: str = "auto",
    hidden_sizes: Sequence[int] = (128, 128),
    dueling: bool = False,
    layer_norm: bool = False,
    activation: str = "relu",
    initializer: str = "default",
    convolution: str = "patches",
    noisy: bool = False,
) -> Network:
    """The Q-network for an environment: "mlp", "minatar" (Young and Tian, 2019) or "nature" (Mnih et al., 2015).

    "auto" takes nature for images of at least 36 x 36, minatar for smaller grids with channels, else mlp. Raises
    `UserError` where the torso does not fit the observation.
    """
    head = action_values(spec.num_actions, dueling)
    return network(spec, head, torso, hidden_sizes, layer_norm, activation, initializer, convolution, noisy)


def configured(spec: Spec, head: Head, config: Config) -> Network:
    """The torso that `config` describes, with a head. Raises `UserError` as `q_network` does."""
    options = (config.layer_norm, config.activation, config.initializer, config.convolution, config.noisy)
    return network(spec, head, config.network, config.hidden_sizes, *options)


def network(spec: Spec, head: Head, torso: str, hidden_sizes: Sequence[int], *options: Any) -> Network:
    """A torso with a head; `options` are layer_norm, activation, initializer, convolution and noisy (False)."""
    module = TorsoAndHead(head, _choose_torso(torso, spec.observation), tuple(hidden_sizes), *options)

    def init(key: Key) -> PyTree:
        return module.init(key, zeros_of(spec, 1))["params"]

    def apply(params: PyTree, observation: PyTree, key: Key | None = None) -> Any:
        draws = {"noise": key} if module.noisy and key is not None else {}
        return module.apply({"params": params}, observation, rngs=draws)

    return Network(init, apply)


def unroll(
    network: RecurrentNetwork, params: PyTree, carry: PyTree, observation: PyTree, episode_end: Array, key: Key
) -> tuple[PyTree, Any]:
    """A recurrent network over observation [L, B, *O] from `carry` [B, ...]: (the last carry, outputs [L, B, ...]).

    After a row where `episode_end` [L, B] the state is that of an episode's start.
    """
    initial = network.initial_carry(episode_end.shape[1])

    def step(carry: PyTree, row: tuple[PyTree, Array, Key]) -> tuple[PyTree, Any]:
        carry, output = network.step(params, carry, row[0], row[2])
        return reset_where(row[1], initial, carry), output

    return jax.lax.scan(step, carry, (observation, episode_end, jax.random.split(key, len(episode_end))))


def _choose_torso(torso: str, observation: PyTree) -> str:
    arrays = jax.tree.leaves(observation)
    shape = arrays[0].shape if len(arrays) == 1 else ()
    side = min(shape[:2]) if len(shape) == 3 else 0
    if torso == "auto":
        return "nature" if side >= NATURE_MIN_SIDE else "minatar" if side >= 3 else "mlp"
    smallest = {"mlp": 0, "minatar": 3, "nature": NATURE_MIN_SIDE}[torso]
    if side < smallest:
        raise UserError(
            f"network {torso!r} needs observations [H, W, C] of at least {smallest} x {smallest}; this environment's "
            f"are {list(shape)}. Use network 'auto' or 'mlp'."
        )
    return torso


def _decode(observation: PyTree) -> Array:
    """What a torso takes: of several arrays their numbers side by side, [B, F]."""
    arrays = [_numbers(x) for x in jax.tree.leaves(observation)]
    return arrays[0] if len(arrays) == 1 else jnp.concatenate([x.reshape(len(x), -1) for x in arrays], axis=-1)


def _numbers(array: Array) -> Array:
    return array.astype(jnp.float32) / 255.0 if array.dtype == jnp.uint8 else array.astype(jnp.float32)
