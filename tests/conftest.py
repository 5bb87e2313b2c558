"""One Ray for the whole test session."""

import pytest


@pytest.fixture(scope="session")
def ray_session():
    """A quiet local Ray. More logical CPUs than cores: actors must not starve the tasks that feed them."""
    from raypfk import session

    with session.ray_session(cpus=8):
        yield
