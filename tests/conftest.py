"""One Ray, and one S3 endpoint, for the whole test session."""

import itertools
import os

import pytest


@pytest.fixture(scope="session")
def ray_session():
    """A quiet local Ray. More logical CPUs than cores: actors must not starve the tasks that feed them."""
    from raypfk import session

    with session.ray_session(cpus=8):
        yield


STORE = os.environ.get("RAYPFK_TEST_S3", "moto")
"""Which store the tests of S3 are run against: moto, or radosgw."""


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """A run of tests/driver.py's configuration that nothing disturbed."""
    from raypfk.run import Run
    from tests import driver

    folder = tmp_path_factory.mktemp("undisturbed")
    out = str(folder / "run")
    assert driver.Driver("run", driver.configuration(folder), "--out", out).wait() == 0
    return Run.open(out)


@pytest.fixture(scope="session")
def _endpoint():
    from tests import faulty_s3, rados_gateway

    if STORE == "radosgw" and not rados_gateway.available():
        pytest.skip(f"needs {', '.join(rados_gateway.PROGRAMS)}")
    with rados_gateway.STORES[STORE]() as store, faulty_s3.running(store) as endpoint:
        yield endpoint


_numbers = itertools.count()


@pytest.fixture
def s3(_endpoint, monkeypatch):
    """An S3 endpoint that can be made to misbehave (`choose`, `once`), with an empty bucket, `s3.bucket`."""
    import boto3

    from raypfk import s3 as client

    for name, value in _endpoint.environment.items():
        monkeypatch.setenv(name, value)
    client._client.cache_clear()
    _endpoint.bucket = f"bucket-{next(_numbers)}"
    _endpoint.client = boto3.client("s3")
    _endpoint.client.create_bucket(Bucket=_endpoint.bucket)
    _endpoint.requests.clear()
    _endpoint.injected.clear()
    yield _endpoint
    _endpoint.choose = lambda method, path: None
    client._client.cache_clear()
