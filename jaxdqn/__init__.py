"""jaxdqn: parallel deep Q-learning in JAX, every way of running it over one set of pure functions."""

__version__ = "0.1.0"
