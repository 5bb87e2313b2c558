"""Active learning for biased, cloud-sized image pools by Fisher-kernel self-supervision, on Ray."""

__version__ = "0.1.0"
