"""The errors a user can cause."""


class UserError(Exception):
    """A mistake in what the user gave; its message is one sentence naming the argument and value.

    The command line prints it and exits with code 2; nothing half written is left behind.
    """
