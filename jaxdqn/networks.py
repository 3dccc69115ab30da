"""Torsos and heads; the only place that imports flax modules.

Networks take observations as stored: codes become one-hot, bool becomes 0/1, uint8 becomes [0, 1], the rest is used
as it is.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import Initializer

from jaxdqn import masks
from jaxdqn.acting import reset_where
from jaxdqn.base import Array, Codes, Features, Key, Network, PyTree, RecurrentNetwork, SequenceBatch, Spec, zeros_of
from jaxdqn.config import Config
from jaxdqn.errors import UserError
from jaxdqn.td import quantile_midpoints

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": nn.relu,
    "tanh": nn.tanh,
    "silu": nn.silu,
    "gelu": nn.gelu,
    "elu": nn.elu,
}
NOISE = "noise"  # flax's name of the key that layers draw from; each folds its own name into it
SIGMA = 0.5  # size of the noise at first, divided by the square root of a layer's inputs
# The shorter side below which a torso is refused, so that convolutions leave at least one pixel, and from which on
# "auto" takes it: on screens of 32 x 64 (octax) the dense layer of minatar would have four million weights.
SMALLEST = {"mlp": 0, "minatar": 3, "nips": 32, "nature": 36, "impala": 8}
AUTO = ("nature", "nips", "minatar", "mlp")  # the first that fits
RESIDUAL = (16, 32, 32)  # features of the three sections of impala
STRIDED = {"nips": ((16, 8, 4), (32, 4, 2)), "nature": ((32, 8, 4), (64, 4, 2), (64, 3, 1))}  # features, size, stride


Dense = Callable[[int, float], Callable[[Array], Array]]
"""dense(width, gain) -> a dense layer, `gain` being that of orthogonal initialisation."""


class Head(NamedTuple):
    """What a network gives, made of dense layers on the features of its torso.

    apply(dense, features [B, F], legal) -> outputs; num_layers: how many layers it makes. `legal` is a mask [B, A]
    or None: values are masked by it, and means over actions are those of the legal ones
    """

    apply: Callable[[Dense, Array, Array | None], PyTree]
    num_layers: int


def action_values(num_actions: int, dueling: bool = False) -> Head:
    """Q [B, A]; `dueling` as V + A - mean A (Wang et al., 2016, equation 9)."""

    def plain(dense: Dense, x: Array, legal: Array | None) -> Array:
        return masks.masked(dense(num_actions, 1.0)(x), legal)

    def duel(dense: Dense, x: Array, legal: Array | None) -> Array:
        value, advantage = dense(1, 1.0)(x), dense(num_actions, 1.0)(x)
        return masks.masked(value + advantage - jnp.mean(advantage, axis=-1, keepdims=True, where=legal), legal)

    return Head(duel, 2) if dueling else Head(plain, 1)


def action_atoms(num_actions: int, num_atoms: int, dueling: bool = False) -> Head:
    """K numbers for each action [B, A, K], the logits or the quantiles of its return; `dueling` for each of the K
    alone. Those of illegal actions are not masked: the values that are made of them are."""

    def plain(dense: Dense, x: Array, legal: Array | None) -> Array:
        del legal
        return dense(num_actions * num_atoms, 1.0)(x).reshape(-1, num_actions, num_atoms)

    def duel(dense: Dense, x: Array, legal: Array | None) -> Array:
        value, advantage = dense(num_atoms, 1.0)(x)[:, None], plain(dense, x, legal)
        among = None if legal is None else legal[..., None]
        return value + advantage - jnp.mean(advantage, axis=1, keepdims=True, where=among)

    return Head(duel, 2) if dueling else Head(plain, 1)


def sampled_quantiles(
    num_actions: int, num_taus: int, embedding_size: int, dueling: bool = False, shared: bool = False
) -> Head:
    """(quantiles [B, A, N], their fractions tau [B, N]), the latter drawn; Dabney et al. (2018b), equation 4. With
    `shared` all rows have the same fractions, [1, N], which are embedded once.

    The embedding of tau multiplies the features of the torso, whose last layer is dense: after the convolution alone,
    as published, every tau would need a dense layer of its own. The layers do not depend on N.
    """
    values = action_values(num_actions, dueling)

    def apply(dense: Dense, x: Array, legal: Array | None) -> tuple[Array, Array]:
        taus = Taus(num_taus)(x[:1] if shared else x)
        cosines = jnp.cos(jnp.pi * jnp.arange(embedding_size) * taus[..., None])
        embedding = nn.relu(dense(x.shape[-1], 2**0.5)(cosines))  # [B, N, F]
        among = None if legal is None else legal[:, None]
        return values.apply(dense, x[:, None] * embedding, among).swapaxes(1, 2), taus

    return Head(apply, 1 + values.num_layers)


class Taus(nn.Module):
    """N fractions in [0, 1) for each of B rows, [B, N]: uniform ones, or without noise the midpoints of N intervals."""

    num: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (x.shape[0], self.num)
        if self.has_rng(NOISE):
            return jax.random.uniform(self.make_rng(NOISE), shape)
        return jnp.broadcast_to(quantile_midpoints(self.num), shape)


def policy_and_value(num_actions: int) -> Head:
    """(logits [B, A], value [B]) on one torso."""
    return Head(lambda dense, x, legal: (masks.masked(dense(num_actions, 0.01)(x), legal), dense(1, 1.0)(x)[:, 0]), 2)


class Conv(nn.Module):
    """Convolution without padding, [B, H, W, C] -> [B, H', W', features], whose `size` is a multiple of its `stride`.

    method "patches" gathers the neighbourhoods by slicing and multiplies once, which on a CPU is much faster than
    "lax": under `vmap` over members (grouped convolutions), and in loops, where XLA does not use its library of
    convolutions (an update of the Nature network takes nine times as long). Both share parameters: kernel
    [size, size, C, features], bias.
    """

    features: int
    size: int
    stride: int
    kernel_init: Initializer
    method: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        size, stride, channels = self.size, self.stride, x.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (size, size, channels, self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        if self.method == "lax":
            dimensions = ("NHWC", "HWIO", "NHWC")
            return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, "VALID", dimension_numbers=dimensions) + bias
        # With blocks of stride x stride pixels as channels of one, it is a convolution of stride 1.
        across, blocks = size // stride, [(side - size) // stride + size // stride for side in x.shape[1:3]]
        height, width = (side - across + 1 for side in blocks)
        x = x[:, : blocks[0] * stride, : blocks[1] * stride].reshape(-1, blocks[0], stride, blocks[1], stride, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, *blocks, stride * stride * channels)
        patches = [x[:, i : i + height, j : j + width] for i in range(across) for j in range(across)]
        kernel = kernel.reshape(across, stride, across, stride, channels, self.features).transpose(0, 2, 1, 3, 4, 5)
        return jnp.concatenate(patches, axis=-1) @ kernel.reshape(-1, self.features) + bias


class NoisyDense(nn.Module):
    """A dense layer whose weights have factorised Gaussian noise with learned sizes (Fortunato et al., 2018).

    y = (mu_w + sigma_w f(e_i) f(e_o)^T)^T x + mu_b + sigma_b f(e_o), f(e) = sgn(e) sqrt(|e|), drawn once for the whole
    batch; without a key the mean, mu_w^T x + mu_b. Initialised as in section 3.2 there.
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
        if self.has_rng(NOISE):
            drawn = jax.random.normal(self.make_rng(NOISE), (width + self.features,))
            noise = jnp.sign(drawn) * jnp.sqrt(jnp.abs(drawn))
            inputs, outputs = noise[:width], noise[width:]
            kernel, bias = kernel + kernel_sigma * jnp.outer(inputs, outputs), bias + bias_sigma * outputs
        return x @ kernel + bias


class TorsoAndHead(nn.Module):
    """A torso by name, and a head on its features."""

    head: Head
    decode: Callable[[PyTree], Array]
    torso: str
    hidden_sizes: Sequence[int]
    layer_norm: bool
    activation: str
    initializer: str
    convolution: str
    noisy: bool

    @nn.compact
    def __call__(self, observation: PyTree) -> PyTree:
        return self.head.apply(self._dense, self._torso(self.decode(observation)), masks.legal_of(observation))

    def _torso(self, x: Array) -> Array:
        if self.torso == "mlp":
            x = x.reshape(x.shape[0], -1)
            for width in self.hidden_sizes:
                x = self._activate(self._dense(width)(x))
            return x
        if self.torso == "minatar":
            # By the name that it has in old runs.
            x = self._activate(Conv(16, 3, 1, self._kernel_init(2**0.5), self.convolution, name="Conv3x3_0")(x))
            return self._activate(self._dense(128)(x.reshape(x.shape[0], -1)))
        if self.torso == "impala":
            for features in RESIDUAL:
                x = nn.max_pool(self._same(features)(x), (3, 3), (2, 2), "SAME")
                for _ in range(2):
                    inner = self._same(features)(self._activate(x))
                    x = x + self._same(features)(self._activate(inner))
            return self._activate(self._dense(256)(self._activate(x).reshape(x.shape[0], -1)))
        for features, size, stride in STRIDED[self.torso]:
            x = self._activate(Conv(features, size, stride, self._kernel_init(2**0.5), self.convolution)(x))
        return self._activate(self._dense(256 if self.torso == "nips" else 512)(x.reshape(x.shape[0], -1)))

    def _same(self, features: int) -> nn.Module:
        return nn.Conv(features, (3, 3), kernel_init=self._kernel_init(2**0.5))

    def _activate(self, x: Array) -> Array:
        return ACTIVATIONS[self.activation](nn.LayerNorm()(x) if self.layer_norm else x)

    def _dense(self, features: int, gain: float = 2**0.5) -> nn.Module:
        if self.noisy:
            return NoisyDense(features)
        return nn.Dense(features, kernel_init=self._kernel_init(gain))

    def _kernel_init(self, gain: float) -> Initializer:
        return nn.initializers.lecun_normal() if self.initializer == "default" else nn.initializers.orthogonal(gain)


Cell = nn.RNNCellBase
CELLS: dict[str, Callable[[int], Cell]] = {"gru": nn.GRUCell, "lstm": nn.OptimizedLSTMCell}
"""Recurrent cells of a given size, by name."""


class TorsoMemoryAndHead(TorsoAndHead):
    """A torso, a recurrent cell on its features, and a head on what the cell puts out."""

    cell: Cell

    @nn.compact
    def __call__(self, observation: PyTree, carry: PyTree) -> Any:  # type: ignore[override]
        carry, features = self.cell(carry, self._torso(self.decode(observation)))
        return carry, self.head.apply(self._dense, features, masks.legal_of(observation))


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
    """The Q-network for an environment: "mlp", "minatar" (Young and Tian, 2019), "nips" (Mnih et al., 2013), "nature"
    (Mnih et al., 2015) or "impala", the residual network of Espeholt et al. (2018), figure 3, without its LSTM.

    "auto" takes nature for images of at least 36 x 36, nips for those of at least 32 x 32, minatar for smaller grids
    with channels, else mlp. Raises `UserError` where the torso does not fit the observation.
    """
    head = action_values(spec.num_actions, dueling)
    return network(spec, head, torso, hidden_sizes, layer_norm, activation, initializer, convolution, noisy)


def configured(spec: Spec, head: Head, config: Config) -> Network:
    """The torso that `config` describes, with a head. Raises `UserError` as `q_network` does."""
    options = (config.layer_norm, config.activation, config.initializer, config.convolution, config.noisy)
    return network(spec, head, config.network, config.hidden_sizes, *options)


def network(spec: Spec, head: Head, torso: str, hidden_sizes: Sequence[int], *options: Any) -> Network:
    """A torso with a head; `options` are layer_norm, activation, initializer, convolution and noisy (False)."""
    parts = (*_input(torso, spec.observation), tuple(hidden_sizes), *options)
    module = TorsoAndHead(head, *parts)

    def init(key: Key) -> PyTree:
        return module.init(key, zeros_of(spec, 1))["params"]

    def apply(params: PyTree, observation: PyTree, key: Key | None = None) -> PyTree:
        return module.apply({"params": params}, observation, rngs=None if key is None else {NOISE: key})

    return Network(init, apply, _features(*parts))


def recurrent(spec: Spec, head: Head, config: Config, cell: Cell) -> RecurrentNetwork:
    """The torso that `config` describes, a recurrent cell and a head. Raises `UserError` as `q_network` does."""
    options = (config.layer_norm, config.activation, config.initializer, config.convolution, config.noisy)
    parts = (*_input(config.network, spec.observation), config.hidden_sizes, *options)
    module = TorsoMemoryAndHead(head, *parts, cell)

    def init(key: Key) -> PyTree:
        return module.init(key, zeros_of(spec, 1), initial_carry(1))["params"]

    def initial_carry(num: int) -> PyTree:
        # Zeros for every cell: the key is not used.
        return cell.initialize_carry(jax.random.key(0), (num, cell.features))

    def step(params: PyTree, carry: PyTree, observation: PyTree, key: Key | None = None) -> tuple[PyTree, Any]:
        return module.apply({"params": params}, observation, carry, rngs=None if key is None else {NOISE: key})

    return RecurrentNetwork(init, initial_carry, step, _features(*parts))


def _features(*parts: Any) -> Features:
    """What a torso of these `parts` puts out, of the parameters of a network that has it."""
    torso = TorsoAndHead(Head(lambda dense, features, legal: features, 0), *parts)

    def features(params: PyTree, observation: PyTree) -> PyTree:
        return torso.apply({"params": params}, observation)

    return features


def unroll(
    network: RecurrentNetwork, params: PyTree, carry: PyTree, observation: PyTree, episode_end: Array, key: Key
) -> tuple[PyTree, PyTree]:
    """A recurrent network over observation [L, B, *O] from `carry` [B, ...]: (the last carry, outputs [L, B, ...]).

    After a row where `episode_end` [L, B] the state is that of an episode's start.
    """
    initial = network.initial_carry(episode_end.shape[1])

    def step(carry: PyTree, row: tuple[PyTree, Array, Key]) -> tuple[PyTree, PyTree]:
        carry, output = network.step(params, carry, row[0], row[2])
        return reset_where(row[1], initial, carry), output

    return jax.lax.scan(step, carry, (observation, episode_end, jax.random.split(key, len(episode_end))))


def unroll_after(network: RecurrentNetwork, params: PyTree, batch: SequenceBatch, burn_in: int, key: Key) -> Any:
    """Outputs [L - burn_in, B, ...] over a batch of sequences; its first `burn_in` rows only bring the stored state up
    to date: no gradient flows through them. Kapturowski et al. (2019), section 3."""

    def part(carry: PyTree, rows: slice, key: Key) -> tuple[PyTree, Any]:
        observation, end = jax.tree.map(
            lambda x: x[rows], (batch.transitions.observation, batch.transitions.episode_end)
        )
        return unroll(network, params, carry, observation, end, key)

    first_key, rest_key = jax.random.split(key)
    carry, _ = part(batch.carry, slice(burn_in), first_key)
    return part(jax.lax.stop_gradient(carry), slice(burn_in, None), rest_key)[1]


def _input(torso: str, observation: PyTree) -> tuple[Callable[[PyTree], Array], str]:
    """What a torso is given of an observation, and which torso that is."""
    decode = decoder(observation)
    shape = jax.eval_shape(
        decode, jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), observation)
    ).shape
    return decode, _choose_torso(torso, shape[1:])


def _choose_torso(torso: str, shape: tuple[int, ...]) -> str:
    side = min(shape[:2]) if len(shape) == 3 else 0
    if torso == "auto":
        return next(name for name in AUTO if side >= SMALLEST[name])
    if side < SMALLEST[torso]:
        raise UserError(
            f"network {torso!r} needs observations [H, W, C] of at least {SMALLEST[torso]} x {SMALLEST[torso]}; this "
            f"environment's are {list(shape)}. Use network 'auto' or 'mlp'."
        )
    return torso


def decoder(observation: PyTree) -> Callable[[PyTree], Array]:
    """What makes the numbers that a torso takes of a batch of observations like those of a spec: float32 [B, H, W, C],
    say, or of several arrays their numbers side by side, [B, F]. A mask of actions is not among them."""
    kinds = jax.tree.leaves(masks.seen(observation))

    def decode(batch: PyTree) -> Array:
        arrays = [_numbers(kind, x) for kind, x in zip(kinds, jax.tree.leaves(masks.seen(batch)), strict=True)]
        return arrays[0] if len(arrays) == 1 else jnp.concatenate([x.reshape(x.shape[0], -1) for x in arrays], axis=-1)

    return decode


def _numbers(kind: PyTree, array: Array) -> Array:
    if isinstance(kind, Codes):
        place = np.repeat(np.arange(len(kind.sizes)), kind.sizes)
        value = np.concatenate([np.arange(size) for size in kind.sizes])
        return (array[..., place] == value).astype(jnp.float32)
    return array.astype(jnp.float32) / 255.0 if array.dtype == jnp.uint8 else array.astype(jnp.float32)
