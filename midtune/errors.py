"""The errors midtune raises on purpose. `cli.py` prints them; nothing else catches them."""


class MidtuneError(Exception):
    """A problem a person can act on: one sentence with what was asked, what exists and what to do."""

    exit_code = 2


class InputError(MidtuneError):
    """Something that was asked for is wrong or missing; nothing has been written."""


class RunStopped(MidtuneError):
    """A run stopped itself because it could not go on usefully; its folder stays resumable."""

    exit_code = 3


class Interrupted(MidtuneError):
    """The run was stopped from outside (Ctrl-C, SIGTERM) after saving a checkpoint."""

    exit_code = 130
