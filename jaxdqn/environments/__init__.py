"""Environments by name. Adapters turn a suite into our `Environment` record; gymnax is imported only when needed."""

from jaxdqn.environments.registry import make, names, register

__all__ = ["make", "names", "register"]
