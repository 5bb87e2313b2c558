import resource
import signal

import pytest

SECONDS, BYTES = 60, 4 << 30


@pytest.fixture
def limits():
    """No input may take a minute, or 4 GiB more than there were."""

    def late(*_):
        raise TimeoutError(f"not done after {SECONDS} s")

    with open("/proc/self/statm") as memory:
        size = int(memory.read().split()[0]) * resource.getpagesize()
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, hard))
    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    resource.setrlimit(resource.RLIMIT_AS, (before, hard))
