"""Torsos and heads; the only place that imports flax modules.

Networks take observations as stored: bool becomes 0/1, uint8 becomes [0, 1], the rest is used as it is.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdqn.base import Array, Network, Spec
from jaxdqn.errors import UserError

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": nn.relu,
    "tanh": nn.tanh,
    "silu": nn.silu,
    "gelu": nn.gelu,
    "elu": nn.elu,
}
NATURE_MIN_SIDE = 36  # the smallest image on which its three convolutions leave at least one pixel


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


class TorsoAndHead(nn.Module):
    """A torso and a linear head: "q" and "dueling" give Q [B, A]; "actor_critic" gives (logits [B, A], value [B])."""

    num_actions: int
    head: str
    torso: str
    hidden_sizes: Sequence[int]
    layer_norm: bool
    activation: str
    initializer: str
    convolution: str

    @nn.compact
    def __call__(self, observation: Array) -> Any:
        x = self._torso(_decode(observation))
        if self.head == "q":
            return self._dense(self.num_actions, gain=1.0)(x)
        if self.head == "actor_critic":
            return self._dense(self.num_actions, gain=0.01)(x), self._dense(1, gain=1.0)(x)[:, 0]
        value, advantage = self._dense(1, gain=1.0)(x), self._dense(self.num_actions, gain=1.0)(x)
        return value + advantage - jnp.mean(advantage, axis=-1, keepdims=True)

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

    def _dense(self, features: int, gain: float = 2**0.5) -> nn.Dense:
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
) -> Network:
    """The Q-network for an environment: "mlp", "minatar" (Young and Tian, 2019) or "nature" (Mnih et al., 2015).

    "auto" takes nature for images of at least 36 x 36, minatar for smaller grids with channels, else mlp. Raises
    `UserError` where the torso does not fit the observation.
    """
    head = "dueling" if dueling else "q"
    return _network(spec, head, torso, hidden_sizes, layer_norm, activation, initializer, convolution)


def actor_critic(
    spec: Spec,
    torso: str = "auto",
    hidden_sizes: Sequence[int] = (128, 128),
    layer_norm: bool = False,
    activation: str = "relu",
    initializer: str = "default",
    convolution: str = "patches",
) -> Network:
    """Policy and value on one torso, (logits [B, A], value [B]); arguments and errors as for `q_network`."""
    return _network(spec, "actor_critic", torso, hidden_sizes, layer_norm, activation, initializer, convolution)


def _network(spec: Spec, head: str, torso: str, hidden_sizes: Sequence[int], *options: Any) -> Network:
    module = TorsoAndHead(
        spec.num_actions, head, _choose_torso(torso, spec.observation.shape), tuple(hidden_sizes), *options
    )

    def init(key: Array) -> Any:
        example = jnp.zeros((1, *spec.observation.shape), spec.observation.dtype)
        return module.init(key, example)["params"]

    return Network(init, lambda params, observation: module.apply({"params": params}, observation))


def _choose_torso(torso: str, shape: tuple[int, ...]) -> str:
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


def _decode(observation: Array) -> Array:
    if observation.dtype == jnp.uint8:
        return observation.astype(jnp.float32) / 255.0
    return observation.astype(jnp.float32)
