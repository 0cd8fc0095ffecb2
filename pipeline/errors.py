"""Errors that the command line turns into exit codes; everything else is a programming fault."""


class BadData(ValueError):
    """Input data that cannot be used. The text names the file or field and says what to do."""


class Incomplete(RuntimeError):
    """A stage ended with work undone. The text says what is missing and how to resume."""
