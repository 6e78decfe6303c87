"""The one exception that stands for "the data cannot be used as asked"; main.py prints it as one line."""


class DataError(Exception):
    """Missing, damaged or mislabelled data; the message names the file or field and what would be right."""
