"""Schemes whose workers are threads, or processes on Ray: actors and a learner, workers and a server."""
