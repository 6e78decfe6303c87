"""The exceptions that stand for "the user can mend this"; main.py prints them as one line."""


class ConfigError(Exception):
    """A setting that cannot work; the message names the field, its value and what would be right."""


class RunError(Exception):
    """A run that cannot go on (weights stay non-finite, disk full); the message says how to go on."""
