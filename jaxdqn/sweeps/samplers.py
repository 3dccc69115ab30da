"""Where trials come from: grids and sequences of points, or Optuna's samplers, asked for a round of trials at a time.

A round's trials depend on the sweep and on the scores of earlier rounds alone, so that a sweep that is resumed asks for
the same ones. Optuna is optional (the extra `optuna`), and imported only where it is needed. Every round has a sampler
of its own, seeded from the sweep's seed and the round's number, which is told all earlier trials. CMA-ES and NSGA-II
keep their state in the trials that they were asked for, and would begin anew; for them the earlier rounds are asked for
again.
"""

import importlib
import os
import re
import sqlite3
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from jaxdqn.errors import UserError
from jaxdqn.sweeps.space import Choices, Parameter, Space, Values, distinct
from jaxdqn.sweeps.sweep import Sampler

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

    Distributions = dict[str, BaseDistribution]

Scored = tuple[Values, float]

CLASSES = {"tpe": "TPESampler", "cmaes": "CmaEsSampler", "gp": "GPSampler", "nsga2": "NSGAIISampler"}
PACKAGES = {"cmaes": "cmaes", "gp": "torch"}
REPLAYED = ("cmaes", "nsga2")
NUMBER = "jaxdqn_trial"


def next_round(space: Space, sampler: Sampler, index: int, history: Sequence[Scored]) -> list[Values]:
    """The trials of round `index`, after those of `history`; none where the sweep is at its end.

    Raises `UserError` where Optuna is needed and missing, and for a grid of ranges without points.
    """
    if sampler.adaptive:
        assert sampler.trials is not None
        count = min(sampler.batch, sampler.trials - index * sampler.batch)
        return _ask(space, sampler, index, history, count) if count > 0 else []
    return once(space, sampler) if index == 0 else []


def once(space: Space, sampler: Sampler) -> list[Values]:
    """All trials of a sampler that does not learn from scores, each once: points of few choices repeat."""
    return distinct(points(space, sampler))


def points(space: Space, sampler: Sampler) -> list[Values]:
    """The values at all points of a sampler that does not learn from scores."""
    if sampler.name == "grid":
        return space.grid()
    assert sampler.trials is not None
    sequence = _SEQUENCES[sampler.name](len(space.parameters), sampler.trials, sampler.seed)
    return [space.at(point) for point in sequence.tolist()]


def uniform(dimensions: int, count: int, seed: int) -> np.ndarray:
    """Independent points of the unit cube, [count, dimensions]."""
    return np.random.default_rng(seed).random((count, dimensions))


def sobol(dimensions: int, count: int, seed: int) -> np.ndarray:
    """Points of a scrambled Sobol sequence, [count, dimensions]; they are even where `count` is a power of two."""
    from scipy.stats import qmc

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that count is no power of two: the plan says so
        return np.asarray(qmc.Sobol(dimensions, scramble=True, rng=seed).random(count))


_SEQUENCES = {"random": uniform, "sobol": sobol}


def store(space: Space, sampler: Sampler, study_name: str, history: Sequence[Scored], directory: str) -> None:
    """Writes the trials of `history` that are not yet there to the sampler's storage, for Optuna's own tools.

    A relative file is taken from `directory`. Raises `UserError` for a storage that cannot be used.
    """
    optuna = _optuna()
    assert sampler.storage is not None
    try:
        storage = _storage(sampler.storage, directory)
        study = optuna.create_study(storage=storage, study_name=study_name, direction="maximize", load_if_exists=True)
        distributions = _distributions(space)
        known = {trial.user_attrs.get(NUMBER) for trial in study.get_trials(deepcopy=False)}
        for number, (values, score) in enumerate(history):
            if number not in known:
                study.add_trial(_told(values, score, distributions, number))
    except Exception as error:
        raise UserError(f"sampler.storage {sampler.storage!r} cannot be used: {' '.join(str(error).split())}") from None


def check_storage(text: object) -> None:
    """Raises `UserError` for a storage of another form."""
    if not isinstance(text, str) or not re.fullmatch(r"(sqlite:///|journal:).*[^/]", text):
        raise UserError(f"sampler.storage is {text!r}; it must be sqlite:///FILE or journal:FILE.")


def _ask(space: Space, sampler: Sampler, index: int, history: Sequence[Scored], count: int) -> list[Values]:
    """`count` trials of round `index`. Raises `UserError` where a package is missing."""
    study = _optuna().create_study(direction="maximize")
    _check_package(sampler.name)
    if sampler.name in REPLAYED:
        _replay(study, space, sampler, history)
    else:
        distributions = _distributions(space)
        study.add_trials([_told(values, score, distributions) for values, score in history])
    return [_values(space, trial) for trial in _asked(study, space, sampler, index, count)]


def _optuna() -> ModuleType:
    try:
        import optuna
    except ImportError:
        raise UserError('this sampler needs the optuna package: pip install "jaxdqn[optuna]".') from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _asked(study: "Study", space: Space, sampler: Sampler, index: int, count: int) -> list["Trial"]:
    """Optuna's trials of round `index`."""
    study.sampler = _sampler(sampler, index)
    distributions = _distributions(space)
    return [study.ask(distributions) for _ in range(count)]


def _replay(study: "Study", space: Space, sampler: Sampler, history: Sequence[Scored]) -> None:
    """Asks for the rounds of `history` again, and tells their scores."""
    failed = _optuna().trial.TrialState.FAIL
    for index, start in enumerate(range(0, len(history), sampler.batch)):
        known = history[start : start + sampler.batch]
        for trial, (values, score) in zip(_asked(study, space, sampler, index, len(known)), known, strict=True):
            if _values(space, trial) != values:
                raise UserError(
                    f"sampler {sampler.name!r} does not ask for the sweep's earlier trials: was it begun with another "
                    "version of optuna? Install that one."
                )
            study.tell(trial, score) if np.isfinite(score) else study.tell(trial, state=failed)


def _check_package(name: str) -> None:
    """Raises `UserError` where the package that a sampler builds on is missing: Optuna finds that out rounds later."""
    if name in PACKAGES:
        try:
            importlib.import_module(PACKAGES[name])
        except ImportError:
            raise UserError(
                f"sampler {name!r} needs the {PACKAGES[name]} package: pip install {PACKAGES[name]}."
            ) from None


def _options(sampler: Sampler) -> dict[str, object]:
    """Of Optuna's sampler: TPE models fields together, and keeps away from trials still running; a generation of
    NSGA-II is a round."""
    options: dict[str, dict[str, object]] = {
        "tpe": {"multivariate": True, "constant_liar": True},
        "nsga2": {"population_size": max(2, sampler.batch)},
    }
    return options.get(sampler.name, {})


def _sampler(sampler: Sampler, index: int) -> "BaseSampler":
    optuna = _optuna()
    seed = int(np.random.SeedSequence([sampler.seed, index]).generate_state(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return getattr(optuna.samplers, CLASSES[sampler.name])(seed=seed, **_options(sampler))


def _storage(text: str, directory: str) -> object:
    optuna = _optuna()
    if text.startswith("journal:"):
        path = os.path.join(directory, text.removeprefix("journal:"))
        return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(path))
    path = os.path.abspath(os.path.join(directory, text.removeprefix("sqlite:///")))
    # Opened here: in a URL a ? begins options, and which other letters are escapes depends on the version.
    return optuna.storages.RDBStorage("sqlite://", {"creator": lambda: sqlite3.connect(path)})


def _distributions(space: Space) -> "Distributions":
    return {parameter.name: _distribution(parameter) for parameter in space.parameters}


def _distribution(parameter: Parameter) -> "BaseDistribution":
    optuna = _optuna()
    domain = parameter.domain
    if isinstance(domain, Choices):
        return optuna.distributions.CategoricalDistribution([_category(value) for value in domain.values])
    if domain.integer:
        return optuna.distributions.IntDistribution(int(domain.low), int(domain.high), log=domain.log)
    return optuna.distributions.FloatDistribution(domain.low, domain.high, log=domain.log)


def _category(value: object) -> object:
    return str(value) if isinstance(value, tuple) else value


def _values(space: Space, trial: "Trial") -> Values:
    """The values that an Optuna trial stands for."""
    given = dict(trial.params)
    for parameter in space.parameters:
        if isinstance(parameter.domain, Choices):
            known = {_category(value): value for value in parameter.domain.values}
            given[parameter.name] = known[given[parameter.name]]
    return space.active(given)


def _told(values: Values, score: float, distributions: "Distributions", number: int | None = None) -> "FrozenTrial":
    """A finished trial; without a score (its members diverged) it has failed."""
    optuna = _optuna()
    kept = {name: _category(value) for name, value in values.items()}
    finite = bool(np.isfinite(score))
    return optuna.trial.create_trial(
        params=kept,
        distributions={name: distributions[name] for name in kept},
        value=score if finite else None,
        state=optuna.trial.TrialState.COMPLETE if finite else optuna.trial.TrialState.FAIL,
        user_attrs={} if number is None else {NUMBER: number},
    )
