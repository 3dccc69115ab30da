"""What the parts of a sweep demand of each other."""

from typing import Any

from jaxdqn.config import LARGEST
from jaxdqn.errors import UserError, unknown_name
from jaxdqn.sweeps.space import Choices
from jaxdqn.sweeps.sweep import OBJECTIVES, Halving, PopulationBased, Seeds, Sweep

FIRST_RUNG, LEAST_SEEDS = 0.2, 3
MAX_TRIALS, MAX_SEED = 100_000, 2_000_000_000


def check(sweep: Sweep) -> None:
    """Raises `UserError` for parts that do not go together."""
    if sweep.objective not in OBJECTIVES:
        raise unknown_name("objective", sweep.objective, OBJECTIVES)
    _check_numbers(sweep)
    _check_ranges(sweep)
    halving, pbt = sweep.halving, sweep.population_based
    if halving is not None and pbt is not None:
        raise UserError("halving and population_based are two ways to stop early; keep one.")
    if halving is not None:
        _check_halving(halving, sweep.seeds.number)
    if pbt is not None:
        _check_population_based(sweep, pbt)
    tuned = set(sweep.seeds.all)
    if sweep.winners.trials and tuned & set(Seeds(sweep.winners.seeds, sweep.winners.first_seed).all):
        raise UserError(
            f"winners.first_seed is {sweep.winners.first_seed}, and tuning uses seeds {min(tuned)} to {max(tuned)}: "
            "the winners need seeds that tuning has not seen."
        )


def _check_numbers(sweep: Sweep) -> None:
    sampler = sweep.sampler
    least = {"sampler.batch": sampler.batch, "seeds.number": sweep.seeds.number, "winners.seeds": sweep.winners.seeds}
    if sampler.name != "grid":
        least["sampler.trials"] = sampler.trials  # type: ignore[assignment]
    for name, value in least.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_TRIALS:
            raise UserError(f"{name} is {value!r}; it must be a whole number from 1 to {MAX_TRIALS:,}.")
    zero = {
        "sampler.seed": sampler.seed,
        "seeds.first": sweep.seeds.first,
        "winners.trials": sweep.winners.trials,
        "winners.first_seed": sweep.winners.first_seed,
    }
    for name, value in zero.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_SEED:
            raise UserError(f"{name} is {value!r}; it must be a whole number from 0 to {MAX_SEED:,}.")


def _check_ranges(sweep: Sweep) -> None:
    domains = [parameter.domain for parameter in sweep.space.parameters]
    if sweep.sampler.name == "cmaes" and (len(domains) < 2 or any(isinstance(domain, Choices) for domain in domains)):
        raise UserError(
            "sampler 'cmaes' needs at least two fields, all of them ranges: it would draw anything else at random. "
            "Take tpe."
        )
    if sweep.sampler.name == "grid":
        sweep.space.grid()


def _check_halving(halving: Halving, seeds: int) -> None:
    rungs = halving.rungs
    if (
        not rungs
        or any(not _is_number(rung) or not 0 < rung < 1 for rung in rungs)
        or list(rungs) != sorted(set(rungs))
    ):
        raise UserError(f"halving.rungs is {list(rungs)}; it must be rising fractions of the budget between 0 and 1.")
    if rungs[0] < FIRST_RUNG:
        raise UserError(
            f"halving.rungs begins at {rungs[0]:g}; the first must be at least {FIRST_RUNG:g} of the budget, since "
            "earlier curves say little about later ones."
        )
    if not _is_number(halving.keep) or not 0 < halving.keep < 1:
        raise UserError(f"halving.keep is {halving.keep!r}; it must be a fraction between 0 and 1.")
    if not isinstance(halving.exact, bool):
        raise UserError(f"halving.exact is {halving.exact!r}; it must be true or false.")
    if seeds < LEAST_SEEDS:
        raise UserError(f"seeds.number is {seeds}; halving needs at least {LEAST_SEEDS}, to rank trials and not luck.")


def _check_population_based(sweep: Sweep, pbt: PopulationBased) -> None:
    static = [parameter.name for parameter in sweep.space.parameters if not parameter.traced]
    if static:
        raise UserError(
            f"population_based changes values during training, and {static[0]} is static (a field of Config); search "
            "only fields of HParams."
        )
    if sweep.sampler.adaptive:
        raise UserError(f"population_based with the sampler {sweep.sampler.name!r}: take grid, random or sobol.")
    if not _is_number(pbt.interval) or not 0 < pbt.interval <= 0.5:
        raise UserError(f"population_based.interval is {pbt.interval!r}; it must be a fraction above 0, at most 0.5.")
    if not _is_number(pbt.quantile) or not 0 < pbt.quantile <= 0.5:
        raise UserError(f"population_based.quantile is {pbt.quantile!r}; it must be a fraction above 0, at most 0.5.")
    if not pbt.factors or any(not _is_number(factor) or factor <= 0 for factor in pbt.factors):
        raise UserError(f"population_based.factors is {list(pbt.factors)}; it must be numbers above 0.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST
