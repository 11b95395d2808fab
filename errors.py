class UserError(ValueError):
    """Bad input: the message names the cause and the remedy in one sentence; scripts print it and exit with 2."""
