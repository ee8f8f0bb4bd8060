"""The one exception users see: a sentence that says what is wrong and what to do."""


class AdrenalineError(ValueError):
    """A refusal with a message for the user; command lines print it without a traceback."""
