"""The one exception that users see. Its message says in a sentence what is wrong and what to do."""


class AdrenalineError(ValueError):
    """A refusal with a message for the user. Command lines print it without a traceback."""
