"""Adapters in, numbers out: prompt sets, the runner, metrics and the report."""
