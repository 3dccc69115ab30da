"""Pictures of an episode, drawn from its stored observations alone with NumPy and Pillow, and looping GIFs of them."""

import importlib
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jaxdqn.base import PyTree, Spec
from jaxdqn.environments import suites
from jaxdqn.errors import UserError
from jaxdqn.files.paths import expanded, write_atomically
from jaxdqn.masks import seen

SUPPORTED = (
    "CartPole-v1, FrozenLake-misc, FourRooms-misc (not its visual observations), pgx/2048, 0/1 grids stored as bool "
    "(the MinAtar games, Catch-bsuite, DeepSea-bsuite, Pong-misc), octax, XLand-MiniGrid, Craftax, ALE, and what "
    "Gymnasium draws"
)
SIDE = 240  # the longer side of a grid or map in pixels, up to rounding
FINE = 3  # shapes are drawn this many times larger and averaged down, for smooth edges
MAX_FRAMES = 1000
PAPER, INK, LINE, AMBER = "#f7f6f2", "#2f3e55", "#c9c8c2", "#e8963a"
FLOOR, HOLE, START, GOAL, AGENT = "#dcebf5", "#33597f", "#a3c9e2", "#2f9e62", "#e4572e"
# The night behind a grid, then one colour per channel, the agent's first; channels beyond them start over.
COLOURS = bytes.fromhex("161b2e 4cc9f0 f94144 8d99ae f9c74f 90be6d f3722c b388eb e9ecef 2a9d8f ff70a6")
GRID_LINE = (32, 39, 63)
LAKES = {
    16: ("SFFF", "FHFH", "FFFH", "HFFG"),
    64: ("SFFFFFFF", "FFFFFFFF", "FFFHFFFF", "FFFFFHFF", "FFFHFFFF", "FHHFFFHF", "FHFFHFHF", "FFFHFFFG"),
}
WALL, ROOM, DOOR = "#############", "#.....#.....#", "#...........#"
ROOMS = (WALL, ROOM, ROOM, DOOR, ROOM, ROOM, "##.####.....#", "#.....###.###", ROOM, ROOM, DOOR, ROOM, WALL)


def painter(spec: Spec, env_kwargs: Mapping[str, Any] | None = None) -> Callable[[PyTree], Image.Image]:
    """What draws one observation [*O]. `env_kwargs` are those the environment was made with.

    A suite whose adapter has painter(name) -> draw(observation [*O]) -> uint8 [h, w, 3] is drawn by it. Raises
    `UserError` where there is none: call it early to know before anything is played.
    """
    suite = suites.of(spec.name)
    draw = getattr(importlib.import_module(suite.adapter), "painter", None) if suite and suite.installed else None
    if draw:
        return _enlarged(draw(spec.name))
    shown = seen(spec.observation)
    if not hasattr(shown, "shape"):
        kind = type(shown).__name__
        raise UserError(f"cannot draw {spec.name!r} from observations of {kind}; supported: {SUPPORTED}.")
    shape, dtype = shown.shape, np.dtype(shown.dtype)
    tiles = (env_kwargs or {}).get("desc") or LAKES.get(math.prod(shape))
    if spec.name == "CartPole-v1":
        return _cart_pole
    if spec.name == "FrozenLake-misc" and tiles:
        return lambda observation: _map(tiles, divmod(int(observation.argmax()), len(tiles[0])))
    if spec.name == "FourRooms-misc" and len(shape) == 1:
        return _four_rooms
    if spec.name == "pgx/2048":
        return _tiles
    if dtype == np.bool_ and len(shape) in (2, 3):
        return _grid
    raise UserError(f"cannot draw {spec.name!r} from observations {dtype}{list(shape)}; supported: {SUPPORTED}.")


def frames(spec: Spec, observations: PyTree, env_kwargs: Mapping[str, Any] | None = None) -> np.ndarray:
    """A picture of each observation: [L, *O] -> [L, H, W, 3] uint8, about 0.2 MB each (`thin` a long episode first).

    Raises `UserError` for an environment that cannot be drawn.
    """
    paint, observations = painter(spec, env_kwargs), jax.tree.map(np.asarray, seen(observations))
    drawn: dict[bytes, np.ndarray] = {}  # each kind once: games stand still
    pictures = []
    for index in range(len(jax.tree.leaves(observations)[0])):
        one = _item(observations, index)
        kind = b"".join(leaf.tobytes() for leaf in jax.tree.leaves(one))
        if kind not in drawn:
            drawn[kind] = np.asarray(paint(one))
        pictures.append(drawn[kind])
    return np.stack(pictures)


def reduced(picture: np.ndarray) -> np.ndarray:
    """A picture [H, W, 3], averaged down to less than twice `SIDE`."""
    return np.asarray(Image.fromarray(picture).reduce(max(1, max(picture.shape) // SIDE)))


def thin(sequence: PyTree, most: int = MAX_FRAMES) -> PyTree:
    """At most `most` evenly spaced items, the first and the last among them."""
    length = len(jax.tree.leaves(sequence)[0])
    return sequence if length <= most else _item(sequence, np.linspace(0, length - 1, most).round().astype(int))


def _item(sequence: PyTree, index: Any) -> PyTree:
    return jax.tree.map(lambda x: x[index], sequence)


def save_gif(path: str | os.PathLike[str], frames: np.ndarray, fps: int = 30) -> None:
    """Writes [L, H, W, 3] uint8 as a GIF that loops forever; the file appears complete or not at all.

    Thinned to `MAX_FRAMES`. Equal successive frames become one, shown longer. A GIF counts in hundredths of a second,
    and viewers slow down what is shown for less than two of them: 50 frames a second at most.
    """
    images = [Image.fromarray(frame) for frame in thin(frames)]
    duration = 10 * max(2, round(100 / fps))

    def write(whole: pathlib.Path) -> None:
        # Pillow gives each frame its own few colours, and stores only what differs from the frame before.
        options = {"duration": duration, "loop": 0, "optimize": True}
        images[0].save(whole, format="GIF", save_all=True, append_images=images[1:], **options)

    write_atomically(expanded(path), write)


def _enlarged(draw: Callable[[PyTree], np.ndarray]) -> Callable[[PyTree], Image.Image]:
    def paint(observation: PyTree) -> Image.Image:
        picture = draw(observation)
        scale = max(1, round(SIDE / max(picture.shape)))
        return Image.fromarray(picture.repeat(scale, axis=0).repeat(scale, axis=1))

    return paint


def _grid(observation: np.ndarray) -> Image.Image:
    """[H, W] or [H, W, C], enlarged by nearest neighbour. The lowest of a cell's channels is the one that shows."""
    cells = observation.reshape(*observation.shape[:2], -1)
    colours = np.frombuffer(COLOURS, np.uint8).reshape(-1, 3)
    shown = np.where(cells.any(-1), 1 + cells.argmax(-1) % (len(colours) - 1), 0)  # [H, W]
    scale = max(1, SIDE // max(shown.shape))
    picture = colours[shown].repeat(scale, axis=0).repeat(scale, axis=1)
    if scale >= 12:  # Lines between the cells, so that neighbours of one colour can be told apart.
        picture[::scale] = picture[:, ::scale] = GRID_LINE
    return Image.fromarray(picture)


def _tiles(observation: np.ndarray) -> Image.Image:
    """2048's board, the powers of two one-hot on the last axis, as tiles with their numbers."""
    cell, colours = SIDE // len(observation), np.frombuffer(COLOURS, np.uint8).reshape(-1, 3)[1:]
    image = Image.new("RGB", (cell * len(observation), cell * len(observation)), PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(cell / 4)
    for (row, column), power in np.ndenumerate(observation.argmax(-1)):
        if power > 0:
            left, top, colour = column * cell, row * cell, colours[(power - 1) % len(colours)]
            draw.rectangle((left + 1, top + 1, left + cell - 2, top + cell - 2), tuple(colour.tolist()))
            draw.text((left + cell / 2, top + cell / 2), str(2**power), INK, font, anchor="mm")
    return image


def _cart_pole(observation: np.ndarray) -> Image.Image:
    """[x, x_dot, theta, theta_dot]: the track between its limits at 2.4, and a pole of length 1 leaning by theta."""
    image = Image.new("RGB", (400 * FINE, 180 * FINE), PAPER)
    draw = ImageDraw.Draw(image)
    unit, rail, axle = 72 * FINE, 148 * FINE, 118 * FINE
    draw.rectangle((0, rail, image.width, rail + 2 * FINE - 1), LINE)
    middle = image.width // 2
    for limit in (middle - 2.4 * unit, middle + 2.4 * unit):
        draw.rectangle((limit - FINE, rail - 8 * FINE, limit + FINE, rail + 10 * FINE), LINE)
    x, theta = middle + float(observation[0].clip(-2.7, 2.7)) * unit, float(observation[2])
    draw.rounded_rectangle((x - 27 * FINE, axle - 3 * FINE, x + 27 * FINE, rail - 6 * FINE), 4 * FINE, INK)
    for wheel in (x - 15 * FINE, x + 15 * FINE):
        _disc(draw, wheel, rail - 6 * FINE, 7 * FINE, PAPER)
        _disc(draw, wheel, rail - 6 * FINE, 6 * FINE, INK)
    tip = (x + unit * math.sin(theta), axle - unit * math.cos(theta))
    draw.line((x, axle, *tip), AMBER, 7 * FINE)
    _disc(draw, x, axle, 3.5 * FINE, AMBER)
    _disc(draw, *tip, 3.5 * FINE, AMBER)
    _disc(draw, x, axle, 1.5 * FINE, PAPER)
    return image.reduce(FINE)


def _four_rooms(observation: np.ndarray) -> Image.Image:
    """Four one-hot coordinates in a row: the agent's row and column, the goal's row and column."""
    row, column, goal_row, goal_column = (int(i) for i in observation.reshape(4, -1).argmax(-1))
    return _map(ROOMS, (row, column), (goal_row, goal_column))


def _map(tiles: Sequence[str], agent: tuple[int, int], goal: tuple[int, int] | None = None) -> Image.Image:
    """A map of # (wall), S (start), H (hole), G or `goal` (a flag) and other letters (floor), with the agent on it."""
    cell = SIDE // max(len(tiles), len(tiles[0])) * FINE
    image = Image.new("RGB", (cell * len(tiles[0]), cell * len(tiles)), PAPER)
    draw = ImageDraw.Draw(image)
    for row, line in enumerate(tiles):
        for column, tile in enumerate(line):
            left, top = column * cell, row * cell
            draw.rectangle((left, top, left + cell - FINE - 1, top + cell - FINE - 1), INK if tile == "#" else FLOOR)
            if tile in "SH":
                _disc(draw, left + cell / 2, top + cell / 2, 0.38 * cell, HOLE if tile == "H" else START)
            elif tile == "G" or (row, column) == goal:
                x, y = left + 0.3 * cell, top + 0.16 * cell
                draw.rectangle((x, y, x + 0.07 * cell, y + 0.66 * cell), INK)
                draw.polygon([(x, y), (x + 0.5 * cell, y + 0.2 * cell), (x, y + 0.4 * cell)], GOAL)
    row, column = agent
    _disc(draw, (column + 0.5) * cell, (row + 0.5) * cell, 0.3 * cell, AGENT)
    return image.reduce(FINE)


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, colour: str) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), colour)
