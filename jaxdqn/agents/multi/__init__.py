"""Agents of several networks: ensembles, and owners of parts of the state space."""
