"""The two ways in which raypfk stops on purpose."""


class UserError(Exception):
    """Bad input: names the file, field or image, what was expected and what came. The CLI exits with 2."""


class RunError(Exception):
    """A failure that is not the user's mistake. The CLI exits with 1."""


class WaitingForLabels(Exception):
    """The run stops here until a person has labelled the selection. The CLI says so and exits with 0."""
