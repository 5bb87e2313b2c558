"""The shipped configurations, installed as the package raypfk.configs (pyproject.toml)."""
