"""Networks against XLA's convolution, closed forms in NumPy, and properties."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdqn.base import Spec
from jaxdqn.networks import ACTIVATIONS, q_network


def spec(shape, dtype=jnp.float32, num_actions=3) -> Spec:
    return Spec("test", jax.ShapeDtypeStruct(shape, dtype), num_actions)


GRID = spec((6, 5, 4), jnp.bool_)


# Sides that leave pixels over, and that do not.
IMAGES = {"minatar": GRID, "nips": spec((33, 38, 2)), "nature": spec((39, 45, 2))}


@functools.cache
def convolved(torso, convolution):
    network = q_network(IMAGES[torso], torso, convolution=convolution)
    return network, jax.jit(network.init)(jax.random.key(0))


@pytest.fixture(scope="module", params=IMAGES)
def torso(request):
    return request.param


@pytest.fixture(scope="module")
def images(torso):
    return jax.random.bernoulli(jax.random.key(1), 0.5, (4, *IMAGES[torso].observation.shape)).astype(jnp.float32)


def loss(network, params, observation):
    return jnp.mean(jnp.square(network.apply(params, observation)))


def assert_close(actual, expected):
    """The two sum products in another order."""
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), actual, expected)


def test_patches_have_the_parameters_of_the_convolution(torso):
    (_, patches), (_, lax) = convolved(torso, "patches"), convolved(torso, "lax")
    jax.tree.map(np.testing.assert_array_equal, patches, lax)


def test_patches_equal_the_convolution_and_so_do_their_gradients(torso, images):
    (patches, params), (lax, _) = convolved(torso, "patches"), convolved(torso, "lax")
    assert_close(*(jax.jit(jax.value_and_grad(functools.partial(loss, x)))(params, images) for x in (patches, lax)))


def test_patches_under_vmap_equal_convolutions_one_by_one(torso, images):
    (patches, params), (lax, _) = convolved(torso, "patches"), convolved(torso, "lax")
    several = [params, jax.tree.map(lambda x: -0.5 * x, params)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *several)
    value_and_grad = jax.value_and_grad(functools.partial(loss, patches))
    together = jax.jit(jax.vmap(value_and_grad, in_axes=(0, None)))(stacked, images)
    one = jax.jit(jax.value_and_grad(functools.partial(loss, lax)))
    assert_close(together, jax.tree.map(lambda *x: jnp.stack(x), *(one(p, images) for p in several)))


# Heads.


def relu_layer(layer, x):
    return np.maximum(x @ layer["kernel"] + layer["bias"], 0)


def affine(layer, x):
    return x @ layer["kernel"] + layer["bias"]


def heads(params, widths):
    """The parameters of the dense layer of each width in `widths`."""
    by_width = {layer["bias"].shape[0]: layer for layer in jax.tree.map(np.asarray, params).values()}
    return [by_width[width] for width in widths]


@pytest.fixture(scope="module")
def observations():
    return np.asarray(jax.random.normal(jax.random.key(2), (10, 4)))


@pytest.fixture(scope="module")
def dueling():
    network = q_network(spec((4,)), hidden_sizes=(7,), dueling=True)
    return network, network.init(jax.random.key(0))


def test_mlp_is_its_closed_form(observations):
    network = q_network(spec((4,)), hidden_sizes=(7, 6))
    params = network.init(jax.random.key(0))
    first, second, head = heads(params, (7, 6, 3))
    expected = affine(head, relu_layer(second, relu_layer(first, observations)))
    assert_close(network.apply(params, observations), expected)


def test_dueling_is_its_closed_form(dueling, observations):
    network, params = dueling
    torso, value, advantage = heads(params, (7, 1, 3))
    features = relu_layer(torso, observations)
    advantages = affine(advantage, features)
    expected = affine(value, features) + advantages - advantages.mean(axis=1, keepdims=True)
    assert_close(network.apply(params, observations), expected)


def shift_bias(params, width, amount):
    return {
        name: {**layer, "bias": layer["bias"] + amount} if layer["bias"].shape == (width,) else layer
        for name, layer in params.items()
    }


def test_a_constant_on_all_advantages_leaves_q_unchanged(dueling, observations):
    network, params = dueling
    assert_close(network.apply(shift_bias(params, 3, 5.0), observations), network.apply(params, observations))


def test_a_constant_on_the_value_shifts_every_q(dueling, observations):
    network, params = dueling
    assert_close(network.apply(shift_bias(params, 1, 5.0), observations), network.apply(params, observations) + 5.0)


# Observations as stored.


@pytest.mark.parametrize(
    "stored, decoded",
    [
        (np.array([[False, True, True]]), [[0.0, 1.0, 1.0]]),
        (np.array([[0, 51, 255]], np.uint8), [[0.0, 0.2, 1.0]]),
        (np.array([[-2, 0, 7]], np.int32), [[-2.0, 0.0, 7.0]]),
        (np.array([[-2.0, 0.0, 0.7]], np.float32), [[-2.0, 0.0, 0.7]]),
    ],
    ids=["bool", "uint8", "int32", "float32"],
)
def test_observations_are_decoded_by_their_dtype(stored, decoded):
    network = q_network(spec((3,), stored.dtype), hidden_sizes=(5,))
    params = network.init(jax.random.key(0))
    np.testing.assert_allclose(network.apply(params, stored), network.apply(params, np.float32(decoded)), rtol=1e-6)


# Torsos.


def kernel_shapes(network):
    params = jax.eval_shape(network.init, jax.random.key(0))
    return sorted(leaf.shape for leaf in jax.tree.leaves(params) if len(leaf.shape) > 1)


@pytest.mark.parametrize(
    "shape, expected",
    [
        ((), "mlp"),
        ((4,), "mlp"),
        ((10, 5), "mlp"),
        ((2, 10, 3), "mlp"),
        ((3, 3, 1), "minatar"),
        ((10, 10, 4), "minatar"),
        ((31, 64, 4), "minatar"),
        ((32, 64, 4), "nips"),
        ((36, 36, 3), "nature"),
        ((84, 84, 4), "nature"),
    ],
)
def test_auto_takes_the_torso_that_fits(shape, expected):
    network, named = q_network(spec(shape)), q_network(spec(shape), expected)
    assert kernel_shapes(network) == kernel_shapes(named)
    first = {
        "mlp": (int(np.prod(shape)), 128),
        "minatar": (3, 3, shape[-1:], 16),
        "nips": (8, 8, shape[-1:], 16),
        "nature": (8, 8, shape[-1:], 32),
    }
    assert tuple(np.hstack(first[expected])) in kernel_shapes(network)


@pytest.mark.parametrize(
    "torso, shape",
    [("minatar", (4,)), ("minatar", (2, 9, 3)), ("nips", (31, 31, 3)), ("nature", (35, 35, 3)), ("impala", (7, 9, 3))],
)
def test_a_torso_that_does_not_fit_is_refused(torso, shape):
    with pytest.raises(ValueError, match=rf"'{torso}'.*\[{', '.join(map(str, shape))}\].*'mlp'"):
        q_network(spec(shape), torso)


@pytest.mark.parametrize("shape", [(), (4,), (10, 5), (10, 10, 4)])
def test_a_batch_of_observations_gives_a_batch_of_action_values(shape):
    network = q_network(spec(shape, num_actions=6), hidden_sizes=(8,))
    q = network.apply(network.init(jax.random.key(0)), jnp.ones((2, *shape)))
    assert (q.shape, q.dtype) == ((2, 6), jnp.float32)


def test_nature_gives_a_batch_of_action_values():
    network = q_network(spec((84, 84, 4), jnp.uint8, num_actions=6))
    q = jax.eval_shape(
        lambda k: network.apply(network.init(k), jnp.zeros((2, 84, 84, 4), jnp.uint8)), jax.random.key(0)
    )
    assert (q.shape, q.dtype) == ((2, 6), jnp.float32)


def test_impala_has_the_layers_of_its_paper():
    """Three sections of five 3 x 3 convolutions, each halving the image (84, 42, 21, 11), and a dense layer of 256."""
    params = jax.eval_shape(q_network(spec((84, 84, 4), jnp.uint8, num_actions=6), "impala").init, jax.random.key(0))
    inputs, outputs = [4, *[16] * 5, *[32] * 9], [*[16] * 5, *[32] * 10]
    convolutions = sum((9 * i + 1) * o for i, o in zip(inputs, outputs, strict=True))
    dense = (11 * 11 * 32 + 1) * 256 + (256 + 1) * 6
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == convolutions + dense == 1_090_774


def test_impala_is_its_definition_in_loops():
    network = q_network(spec((9, 8, 2)), "impala")
    params = jax.tree.map(lambda x: x + 0.01, network.init(jax.random.key(0)))  # biases that are not 0
    image = np.random.default_rng(0).normal(size=(1, 9, 8, 2)).astype(np.float32)
    layers = iter(params[f"Conv_{i}"] for i in range(15))
    relu = lambda x: np.maximum(x, 0)  # noqa: E731

    def convolve(x):
        layer, padded = next(layers), np.pad(x, ((1, 1), (1, 1), (0, 0)))
        kernel = np.asarray(layer["kernel"], np.float64)
        out = [
            [np.sum(padded[i : i + 3, j : j + 3, :, None] * kernel, (0, 1, 2)) for j in range(x.shape[1])]
            for i in range(x.shape[0])
        ]
        return np.array(out) + layer["bias"]

    def pool(x):
        # SAME: an odd side is padded by one before and after, an even one by one after.
        odd = [side % 2 for side in x.shape[:2]]
        padded = np.pad(x, ((odd[0], 1), (odd[1], 1), (0, 0)), constant_values=-np.inf)
        sides = [(side + 1) // 2 for side in x.shape[:2]]
        return np.array(
            [
                [padded[2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((0, 1)) for j in range(sides[1])]
                for i in range(sides[0])
            ]
        )

    x = image[0]
    for _ in range(3):
        x = pool(convolve(x))
        for _ in range(2):
            x = x + convolve(relu(convolve(relu(x))))
    hidden = relu(affine(params["Dense_0"], relu(x).reshape(1, -1)))
    expected = affine(params["Dense_1"], hidden)
    np.testing.assert_allclose(jax.jit(network.apply)(params, image), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(network.features(params, image), hidden, rtol=1e-4, atol=1e-5)


# Options.


def test_layer_norm_forgets_the_scale_of_the_input(observations):
    def q(layer_norm, scale):
        network = q_network(spec((4,)), hidden_sizes=(16,), layer_norm=layer_norm)
        return np.asarray(network.apply(network.init(jax.random.key(0)), scale * observations))

    # LayerNorm adds 1e-6 to variances of about 1.
    np.testing.assert_allclose(q(True, 100.0), q(True, 10.0), rtol=1e-3, atol=1e-4)
    assert np.max(np.abs(q(False, 100.0) - q(False, 10.0))) > 1.0


def test_orthogonal_kernels_are_orthogonal_with_gain_sqrt_2_and_1_at_the_head():
    network = q_network(spec((4,)), hidden_sizes=(8,), initializer="orthogonal")
    hidden, head = heads(network.init(jax.random.key(0)), (8, 3))
    np.testing.assert_allclose(hidden["kernel"] @ hidden["kernel"].T, 2 * np.eye(4), atol=1e-5)
    np.testing.assert_allclose(head["kernel"].T @ head["kernel"], np.eye(3), atol=1e-5)


def test_orthogonal_convolutions_are_orthogonal():
    network = q_network(GRID, "minatar", initializer="orthogonal")
    params = network.init(jax.random.key(0))
    kernel = next(np.asarray(leaf) for leaf in jax.tree.leaves(params) if leaf.ndim == 4).reshape(-1, 16)
    np.testing.assert_allclose(kernel.T @ kernel, 2 * np.eye(16), atol=1e-5)


@pytest.mark.parametrize("name", ["relu", "tanh", "silu", "gelu", "elu"])
def test_activations_are_those_of_their_name(name, observations):
    network = q_network(spec((4,)), hidden_sizes=(7,), activation=name)
    params = network.init(jax.random.key(0))
    hidden, head = heads(params, (7, 3))
    expected = affine(head, np.asarray(getattr(nn, name)(affine(hidden, observations))))
    assert_close(network.apply(params, observations), expected)


def test_every_activation_is_tested():
    assert set(ACTIVATIONS) == {"relu", "tanh", "silu", "gelu", "elu"}


def test_initialisation_depends_on_the_key_alone():
    network = q_network(spec((4,)), hidden_sizes=(7,))
    same = [network.init(jax.random.key(seed)) for seed in (0, 0, 1)]
    jax.tree.map(np.testing.assert_array_equal, same[0], same[1])
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (same[0], same[2])), strict=True))
