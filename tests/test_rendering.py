"""Pictures from observations: exact pixels of grids, shapes that move as they should, GIFs that read back."""

import os

import jax
import numpy as np
import pytest
from cases import slow
from PIL import Image, ImageSequence

from jaxdqn.base import Spec
from jaxdqn.environments import registry, suites
from jaxdqn.errors import UserError
from jaxdqn.masks import Masked
from jaxdqn.runs import rendering

NIGHT, LINE, CYAN, RED = (22, 27, 46), (32, 39, 63), (76, 201, 240), (249, 65, 68)
AMBER, AGENT, HOLE, GOAL, WALL = (232, 150, 58), (228, 87, 46), (51, 89, 127), (47, 158, 98), (47, 62, 85)
CART_POLE = Spec("CartPole-v1", jax.ShapeDtypeStruct((4,), np.float32), 2)


def spec(name, *shape, dtype=np.bool_):
    return Spec(name, jax.ShapeDtypeStruct(shape, dtype), 4)


def cart_poles(x, theta):
    """Frames [L, H, W, 3] of carts at x [L] with poles at theta [L]."""
    x, theta = np.broadcast_arrays(x, theta)
    return rendering.frames(CART_POLE, np.stack([x, 0 * x, theta, 0 * x], axis=-1).astype(np.float32))


def where(frame, colour):
    """Mean (row, column) of the pixels of exactly this colour."""
    rows, columns = np.nonzero((frame == colour).all(-1))
    assert rows.size, f"no pixel is {colour}"
    return rows.mean(), columns.mean()


def read(path):
    """Every frame of a GIF as RGB [H, W, 3], and how long each is shown, in milliseconds."""
    with Image.open(path) as image:
        shown = [(np.asarray(frame.convert("RGB")), frame.info["duration"]) for frame in ImageSequence.Iterator(image)]
    return zip(*shown, strict=True)


def test_every_pixel_of_a_small_grid():
    observation = np.zeros((1, 2, 3, 2), np.bool_)
    observation[0, 0, 0, 0] = observation[0, 1, 2, 1] = True
    observation[0, 1, 1] = True  # both channels: the lower one shows
    frame = rendering.frames(spec("Mine", 2, 3, 2), observation)[0]
    expected = np.empty((160, 240, 3), np.uint8)
    for row, line in enumerate([(CYAN, NIGHT, NIGHT), (NIGHT, CYAN, RED)]):
        for column, colour in enumerate(line):
            expected[80 * row : 80 * (row + 1), 80 * column : 80 * (column + 1)] = colour
    expected[[0, 80]] = expected[:, [0, 80, 160]] = LINE
    np.testing.assert_array_equal(frame, expected)


def test_tiles_of_2048_have_their_numbers():
    board = np.array([[0, 1, 11, 0]] * 4)  # nothing, 2, and 2048 of the same colour
    seen = Masked(np.eye(31, dtype=bool)[board][None], np.ones((1, 4), bool))
    made = Spec("pgx/2048", Masked(jax.ShapeDtypeStruct((4, 4, 31), np.bool_), jax.ShapeDtypeStruct((4,), np.bool_)), 4)
    frame = rendering.frames(made, seen)[0]
    empty, two, most, _ = np.split(frame, 4, axis=1)
    assert frame.shape == (240, 240, 3) and len(np.unique(empty.reshape(-1, 3), axis=0)) == 1
    assert (two[5, 5] == CYAN).all() and (most[5, 5] == CYAN).all()
    written = [np.sum((cell[:60] == WALL).all(-1)) for cell in (empty, two, most)]
    assert written[0] == 0 < written[1] < written[2]


def test_small_cells_have_no_lines_between_them():
    observation = np.zeros((1, 30, 40, 3), np.bool_)
    observation[0, 4, 7, 1] = True
    expected = np.full((180, 240, 3), NIGHT, np.uint8)
    expected[24:30, 42:48] = RED
    np.testing.assert_array_equal(rendering.frames(spec("Pong-misc", 30, 40, 3), observation)[0], expected)


def test_each_channel_has_its_own_colour():
    observation = np.eye(10, dtype=np.bool_)[None]  # the cell in column c of the only row holds channel c
    frame = rendering.frames(spec("Seaquest-MinAtar", 1, 10, 10), observation[:, None])[0]
    assert len({tuple(colour) for colour in frame[12, 12::24]} | {NIGHT, LINE}) == 12


def test_a_grid_without_channels_is_one_channel():
    observation = np.random.default_rng(0).random((3, 10, 5)) < 0.3
    np.testing.assert_array_equal(
        rendering.frames(spec("Catch-bsuite", 10, 5), observation),
        rendering.frames(spec("Catch-bsuite", 10, 5, 1), observation[..., None]),
    )


def test_frames_keep_the_order_of_the_observations():
    positions = [5, 0, 5, 3, 15, 0]
    frames = rendering.frames(spec("FrozenLake-misc", 16), np.eye(16, dtype=np.bool_)[positions])
    assert frames.shape == (6, 240, 240, 3) and frames.dtype == np.uint8
    for frame, position in zip(frames, positions, strict=True):
        row, column = divmod(position, 4)
        np.testing.assert_allclose(where(frame, AGENT), (60 * row + 29.5, 60 * column + 29.5), atol=1)


def test_the_pole_leans_by_theta_and_the_cart_is_at_x():
    angles = np.array([-0.2, 0.0, 0.2])
    left, upright, right = cart_poles(0.0, angles)
    assert not np.array_equal(left, upright)
    assert where(left, AMBER)[1] < where(upright, AMBER)[1] - 5 < where(right, AMBER)[1] - 10
    # The middle of a pole of 72 pixels is at 36 sin(theta) from the axle.
    assert where(right, AMBER)[1] - where(upright, AMBER)[1] == pytest.approx(36 * np.sin(0.2), abs=1)
    here, there = cart_poles(np.array([0.0, 1.0]), 0.0)
    assert where(there, WALL)[1] - where(here, WALL)[1] == pytest.approx(72, abs=0.5)


def test_a_cart_beyond_the_limit_stays_in_the_picture():
    np.testing.assert_array_equal(*cart_poles(np.array([2.7, 90.0]), 0.1))


def test_frozen_lake_draws_the_map_it_was_made_with():
    start = np.eye(16, dtype=np.bool_)[:1]
    usual, mine = (
        rendering.frames(spec("FrozenLake-misc", 16), start, env_kwargs)[0]
        for env_kwargs in (None, {"desc": ["SFFF", "FFFF", "FFFF", "GFFH"]})
    )
    np.testing.assert_array_equal(usual[90, 90], HOLE)
    assert where(usual, GOAL)[1] > 180
    np.testing.assert_allclose(where(mine, HOLE), (209.5, 209.5), atol=1)
    assert where(mine, GOAL)[1] < 60


def test_four_rooms_shows_agent_goal_and_walls():
    coordinates = np.array([4, 1, 8, 9])
    frame = rendering.frames(spec("FourRooms-misc", 48), np.eye(12, dtype=np.bool_)[coordinates].reshape(1, -1))[0]
    np.testing.assert_allclose(where(frame, AGENT), (4.5 * 18, 1.5 * 18), atol=1)
    np.testing.assert_allclose(where(frame, GOAL), (8.5 * 18, 9.5 * 18), atol=5)
    np.testing.assert_array_equal(frame[9, 9], WALL)


def test_maps_are_those_of_gymnax():
    from gymnax.environments.misc import frozen_lake, rooms

    open_cells = np.array([[tile == "." for tile in row] for row in rendering.ROOMS])
    np.testing.assert_array_equal(open_cells, rooms.string_to_bool_map(rooms.four_rooms_map))
    assert {len(m) ** 2: m for m in frozen_lake._MAPS.values()} == rendering.LAKES


@pytest.mark.parametrize(
    "name, env_kwargs",
    [
        ("CartPole-v1", {}),
        ("Breakout-MinAtar", {}),
        ("Catch-bsuite", {}),
        ("DeepSea-bsuite", {"size": 5}),
        ("FrozenLake-misc", {"map_name": "8x8"}),
        ("FrozenLake-misc", {"desc": ["SFFHF", "FFFFG"]}),
        ("FourRooms-misc", {}),
    ],
)
def test_first_observations_of_real_environments(name, env_kwargs):
    environment = registry.make(name, env_kwargs=env_kwargs)
    _, observations = jax.vmap(environment.reset)(jax.random.split(jax.random.key(0), 2))
    frames = rendering.frames(environment.spec, observations, env_kwargs)
    assert frames.dtype == np.uint8 and frames.shape[0] == 2 and 200 <= max(frames.shape[1:3]) <= 400
    assert len(np.unique(frames.reshape(-1, 3), axis=0)) > 2


@pytest.mark.parametrize(
    "name",
    [
        "octax/brix",
        "xminigrid/MiniGrid-DoorKey-5x5",
        "pgx/minatar-breakout",
        *map(slow, suites.CRAFTAX.names),
    ],
)
def test_suites_draw_their_observations(name):
    for module in suites.of(name).modules:
        pytest.importorskip(module)
    environment = registry.make(name)
    _, observations = jax.jit(jax.vmap(environment.reset))(jax.random.split(jax.random.key(1), 2))
    frames = rendering.frames(environment.spec, observations)
    assert frames.dtype == np.uint8 and frames.shape[0] == 2 and 170 <= max(frames.shape[1:3]) <= 400
    assert len(np.unique(frames.reshape(-1, 3), axis=0)) >= (2 if name.startswith("octax") else 3)


def test_a_screen_of_octax_shows_its_newest_frame():
    pytest.importorskip("octax")
    pytest.importorskip("cv2")
    screens = np.zeros((1, 32, 64, 4), np.bool_)
    screens[0, 0, :, 2], screens[0, 31, 63, 3] = True, True
    frame = rendering.frames(spec("octax/brix", 32, 64, 4), screens)[0]
    assert frame.shape == (128, 256, 3) and np.all(frame[-4:, -4:] == 255) and frame.sum() == 16 * 3 * 255


@pytest.mark.parametrize(
    "unsupported",
    [
        spec("Acrobot-v1", 6, dtype=np.float32),
        spec("MemoryChain-bsuite", 1, 3, dtype=np.float32),
        spec("FrozenLake-misc", 12),
        spec("FourRooms-misc", 13, 13, 2, dtype=np.float32),
        Spec("Mine", {"x": jax.ShapeDtypeStruct((2, 2), np.bool_)}, 2),
    ],
    ids=lambda unsupported: unsupported.name,
)
def test_unsupported_environments_are_named_in_one_line(unsupported):
    with pytest.raises(UserError, match=r"supported: CartPole-v1, FrozenLake-misc") as error:
        rendering.painter(unsupported)
    assert unsupported.name in str(error.value) and "\n" not in str(error.value)


def test_thin_keeps_the_ends():
    assert rendering.thin(np.arange(10), 4).tolist() == [0, 3, 6, 9]
    assert rendering.thin(np.arange(3), 4).tolist() == [0, 1, 2]
    both = rendering.thin({"x": np.arange(10), "y": np.zeros((10, 2))}, 4)
    assert both["x"].tolist() == [0, 3, 6, 9] and both["y"].shape == (4, 2)


def test_a_gif_reads_back(tmp_path):
    frames = rendering.frames(spec("Mine", 4, 4), np.eye(16, dtype=np.bool_).reshape(16, 4, 4))
    rendering.save_gif(tmp_path / "grid.gif", frames, fps=20)
    images, durations = read(tmp_path / "grid.gif")
    np.testing.assert_array_equal(images, frames)
    assert durations == (50,) * 16
    assert Image.open(tmp_path / "grid.gif").info["loop"] == 0  # forever
    assert os.listdir(tmp_path) == ["grid.gif"]


def test_a_gif_shows_what_does_not_change_for_longer(tmp_path):
    frames = cart_poles(0.0, np.array([0.0, 0.1, 0.1, 0.1]))
    rendering.save_gif(tmp_path / "still.gif", frames, fps=50)
    images, durations = read(tmp_path / "still.gif")
    np.testing.assert_array_equal(images, frames[:2])
    assert durations == (20, 60)


def test_a_long_gif_is_thinned(tmp_path):
    corners = np.eye(4, dtype=np.bool_)[np.arange(1500) % 4]  # at any stride below 4 successive frames differ
    frames = rendering.frames(spec("FrozenLake-misc", 4), corners, {"desc": ["SF", "FG"]})[:, ::40, ::40]
    rendering.save_gif(tmp_path / "long.gif", frames)
    with Image.open(tmp_path / "long.gif") as image:
        assert image.n_frames == rendering.MAX_FRAMES == 1000


def test_a_whole_cart_pole_episode_is_below_two_megabytes(tmp_path):
    time = np.linspace(0, 10, 500)
    frames = cart_poles(1.5 * np.sin(time), 0.15 * np.sin(5 * time))
    rendering.save_gif(tmp_path / "long.gif", frames)
    assert (tmp_path / "long.gif").stat().st_size < 2e6


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "episode.gif"
    path.write_bytes(b"old")

    def fail(self, target, **options):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        rendering.save_gif(path, cart_poles(0.0, np.zeros(2)))
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["episode.gif"]
