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

# Of one player, which all others are not.
PGX = ("2048", *(f"minatar-{game}" for game in ("asterix", "breakout", "freeway", "seaquest", "space_invaders")))

# A few of Gymnasium's; any other id works, too.
GYMNASIUM = (
    "CartPole-v1",
    "Acrobot-v1",
    "MountainCar-v0",
    "FrozenLake-v1",
    "CliffWalking-v1",
    "Taxi-v4",
    "LunarLander-v3",
)

ATARI = tuple(
    f"{game}-v5"
    for game in (
        "Adventure AirRaid Alien Amidar Assault Asterix Asteroids Atlantis Atlantis2 Backgammon BankHeist BasicMath "
        "BattleZone BeamRider Berzerk Blackjack Bowling Boxing Breakout Carnival Casino Centipede ChopperCommand "
        "CrazyClimber Crossbow Darkchambers Defender DemonAttack DonkeyKong DoubleDunk Earthworld ElevatorAction "
        "Enduro Entombed Et FishingDerby FlagCapture Freeway Frogger Frostbite Galaxian Gopher Gravitar Hangman "
        "HauntedHouse Hero HumanCannonball IceHockey Jamesbond JourneyEscape Kaboom Kangaroo KeystoneKapers "
        "KingKong Klax Koolaid Krull KungFuMaster LaserGates LostLuggage MarioBros MiniatureGolf MontezumaRevenge "
        "MrDo MsPacman NameThisGame Othello Pacman Phoenix Pitfall Pitfall2 Pong Pooyan PrivateEye Qbert Riverraid "
        "RoadRunner Robotank Seaquest SirLancelot Skiing Solaris SpaceInvaders SpaceWar StarGunner Superman "
        "Surround Tennis Tetris TicTacToe3D TimePilot Trondead Turmoil Tutankham UpNDown Venture VideoCheckers "
        "VideoChess VideoCube VideoPinball WizardOfWor WordZapper YarsRevenge Zaxxon"
    ).split()
)

CRAFTAX = ("Craftax-Classic-Symbolic-v1", "Craftax-Classic-Pixels-v1", "Craftax-Symbolic-v1", "Craftax-Pixels-v1")

CONVOLVED = (
    "MinAtar",
    "Pong-misc",
    "octax/",
    "pgx/minatar-",
    "ALE/",
    "-Pixels-",
)  # in the names of environments whose default network convolves
