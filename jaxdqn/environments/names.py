"""The names of environments in their suites, listed so that they can be shown and checked without importing these
(seconds) or JAX."""

# Left out: MNISTBandit, which downloads when it is made.
GYMNAX = (
    "CartPole-v1",
    "Acrobot-v1",
    "MountainCar-v0",
    "Asterix-MinAtar",
    "Breakout-MinAtar",
    "Freeway-MinAtar",
    "Seaquest-MinAtar",
    "SpaceInvaders-MinAtar",
    "Catch-bsuite",
    "DeepSea-bsuite",
    "MemoryChain-bsuite",
    "UmbrellaChain-bsuite",
    "DiscountingChain-bsuite",
    "SimpleBandit-bsuite",
    "FourRooms-misc",
    "MetaMaze-misc",
    "BernoulliBandit-misc",
    "GaussianBandit-misc",
    "Pong-misc",
    "FrozenLake-misc",
)
CONTINUOUS = ("Pendulum-v1", "MountainCarContinuous-v0", "PointRobot-misc", "Reacher-misc", "Swimmer-misc")

# Left out: the ROMs cavern4a and cavern4b, which octax cannot make.
OCTAX = (
    "airplane",
    "blinky",
    "brix",
    *(f"cavern{level}" for level in (1, 2, 3, 5, 6)),
    "deep",
    "filter",
    "flight_runner",
    "missile",
    "pong",
    "rocket",
    "shooting_stars",
    *(f"space_flight{level}" for level in range(1, 11)),
    "spacejam",
    "squash",
    "submarine",
    "tank",
    *(f"target_shooter{level}" for level in (1, 2, 3)),
    "tetris",
    "ufo",
    "vertical_brix",
    "wipe_off",
    "worm",
)

# Left out, as they have no goal without a ruleset, so that no reward is ever paid: XLand-MiniGrid-* and
# MiniGrid-Playground.
XMINIGRID = (
    *(f"MiniGrid-Empty-{side}x{side}" for side in (5, 6, 8, 16)),
    *(f"MiniGrid-EmptyRandom-{side}x{side}" for side in (5, 6, 8, 16)),
    *(f"MiniGrid-DoorKey-{side}x{side}" for side in (5, 6, 8, 16)),
    "MiniGrid-FourRooms",
    "MiniGrid-LockedRoom",
    "MiniGrid-Unlock",
    "MiniGrid-UnlockPickUp",
    "MiniGrid-BlockedUnlockPickUp",
    *(f"MiniGrid-MemoryS{width}" for width in (8, 16, 32, 64, 128)),
)

PGX = tuple(f"minatar-{game}" for game in ("asterix", "breakout", "freeway", "seaquest", "space_invaders"))

CRAFTAX = ("Craftax-Classic-Symbolic-v1", "Craftax-Classic-Pixels-v1", "Craftax-Symbolic-v1", "Craftax-Pixels-v1")

CONVOLVED = (
    "MinAtar",
    "Pong-misc",
    "octax/",
    "pgx/minatar-",
    "-Pixels-",
)  # in the names of environments whose default network convolves
