"""Environments by name. Adapters turn a suite into our `Environment` record; gymnax is imported only when needed."""
