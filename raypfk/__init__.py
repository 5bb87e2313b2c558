"""Active learning for biased, cloud-sized image pools by Fisher-kernel self-supervision, on Ray."""

import os

# A machine that vanishes closes no connection: as it comes, Ray waits 5 + 2 minutes for a task that ran there. Ray
# reads these as it is imported; the machines of a cluster get theirs from cluster/Dockerfile.
os.environ.setdefault("RAY_grpc_client_keepalive_time_ms", "20000")
os.environ.setdefault("RAY_grpc_client_keepalive_timeout_ms", "20000")

__version__ = "0.1.0"
