"""Any image, with the same chance: what every other strategy must be better than."""

from raypfk.strategies import by_chance


@by_chance()
def random():
    return 1.0
