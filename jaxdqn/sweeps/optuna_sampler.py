"""Optuna's samplers, asked for a round of trials at a time. Optional: the extra `optuna`.

Samplers do not keep their state. Every round therefore has a sampler of its own, seeded from the sweep's seed and the
round's number, which is told all earlier trials: a resumed sweep asks for the same trials as one that never stopped.
"""

import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxdqn.errors import UserError
from jaxdqn.sweeps.space import Choices, Parameter, Space, Values
from jaxdqn.sweeps.sweep import Sampler

CLASSES = {"tpe": "TPESampler", "cmaes": "CmaEsSampler", "gp": "GPSampler", "nsga2": "NSGAIISampler"}
OPTIONS: dict[str, dict[str, Any]] = {"tpe": {"multivariate": True, "constant_liar": True}}
NUMBER = "jaxdqn_trial"


def ask(
    space: Space, sampler: Sampler, index: int, history: Sequence[tuple[Values, float]], count: int
) -> list[Values]:
    """`count` trials of round `index`. Raises `UserError` where a package is missing."""
    optuna = _optuna()
    study = optuna.create_study(direction="maximize", sampler=_sampler(sampler, index))
    distributions = {parameter.name: _distribution(parameter) for parameter in space.parameters}
    for values, score in history:
        study.add_trial(_told(values, score, distributions))
    try:
        asked = [study.ask(distributions) for _ in range(count)]
    except ImportError as error:
        raise UserError(f"sampler {sampler.name!r} needs another package: {error}") from None
    return [space.active({name: _value(space, name, trial.params[name]) for name in space.names}) for trial in asked]


def record(
    space: Space, sampler: Sampler, study_name: str, history: Sequence[tuple[Values, float]], directory: str
) -> None:
    """Writes the trials of `history` that are not yet there to the sampler's storage, for Optuna's own tools.

    A relative file is taken from `directory`. Raises `UserError` for a storage that cannot be used.
    """
    optuna = _optuna()
    assert sampler.storage is not None
    try:
        storage = _storage(sampler.storage, directory)
        study = optuna.create_study(storage=storage, study_name=study_name, direction="maximize", load_if_exists=True)
        distributions = {parameter.name: _distribution(parameter) for parameter in space.parameters}
        known = {trial.user_attrs.get(NUMBER) for trial in study.get_trials(deepcopy=False)}
        for number, (values, score) in enumerate(history):
            if number not in known:
                study.add_trial(_told(values, score, distributions, number))
    except Exception as error:
        raise UserError(f"sampler.storage {sampler.storage!r} cannot be used: {' '.join(str(error).split())}") from None


def check_storage(text: Any) -> None:
    """Raises `UserError` for a storage of another form."""
    if not isinstance(text, str) or not re.fullmatch(r"(sqlite:///|journal:).*[^/]", text):
        raise UserError(f"sampler.storage is {text!r}; it must be sqlite:///FILE or journal:FILE.")


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UserError('this sampler needs the optuna package: pip install "jaxdqn[optuna]".') from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _sampler(sampler: Sampler, index: int) -> Any:
    import warnings

    optuna = _optuna()
    seed = int(np.random.SeedSequence([sampler.seed, index]).generate_state(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        try:
            return getattr(optuna.samplers, CLASSES[sampler.name])(seed=seed, **OPTIONS.get(sampler.name, {}))
        except ImportError as error:
            raise UserError(f"sampler {sampler.name!r} needs another package: {error}") from None


def _storage(text: str, directory: str) -> Any:
    optuna = _optuna()
    check_storage(text)
    if text.startswith("journal:"):
        path = os.path.join(directory, text.removeprefix("journal:"))
        return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(path))
    return f"sqlite:///{os.path.join(directory, text.removeprefix('sqlite:///'))}"


def _distribution(parameter: Parameter) -> Any:
    optuna = _optuna()
    domain = parameter.domain
    if isinstance(domain, Choices):
        return optuna.distributions.CategoricalDistribution([_category(value) for value in domain.values])
    if domain.integer:
        return optuna.distributions.IntDistribution(int(domain.low), int(domain.high), log=domain.log)
    return optuna.distributions.FloatDistribution(domain.low, domain.high, log=domain.log)


def _category(value: Any) -> Any:
    return str(value) if isinstance(value, tuple) else value


def _value(space: Space, name: str, given: Any) -> Any:
    domain = next(parameter.domain for parameter in space.parameters if parameter.name == name)
    if isinstance(domain, Choices):
        return next(value for value in domain.values if _category(value) == given)
    return given


def _told(values: Values, score: float, distributions: dict[str, Any], number: int | None = None) -> Any:
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
