"""The one exception that means "the user can mend this": tools print it as a single line and exit with 2."""


class UserError(ValueError):
    """A mistake in what the user handed over; the message names the requirement, the value and the way out."""
