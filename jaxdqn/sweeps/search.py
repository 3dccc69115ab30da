"""A whole sweep: rounds of trials or a population that evolves, and the winners once more with fresh seeds."""

import pathlib

from jaxdqn.sweeps.engines import Engine, Run
from jaxdqn.sweeps.evolution import evolve
from jaxdqn.sweeps.record import Record
from jaxdqn.sweeps.rounds import RoundSearch
from jaxdqn.sweeps.sweep import Sweep


def execute(sweep: Sweep, folder: pathlib.Path, engine: Engine, run: Run) -> Record:
    """Trains what is left of the sweep in `folder`, and writes its tables. Raises `Stopped`, and `UserError`."""
    record = Record(sweep, folder, engine, run)
    if sweep.population_based is not None:
        evolve(record)
    else:
        RoundSearch(record).execute()
    record.write()
    return record
