"""The argument of a recipe, FILE.py:WORD,WORD: words in any order, each from a set of its own."""

from collections.abc import Sequence


def parse(argument: str, *choices: Sequence[str]) -> tuple[str, ...]:
    """Returns one word of each set: the one given, or the set's first.

    Args:
        argument: What stood behind the colon.
        choices: Sets of words; no word is in two of them.

    Raises:
        ValueError: An unknown word, or two of one set; the message lists what is possible.
    """
    words = [word for word in argument.split(',') if word]
    found = [[word for word in words if word in choice] for choice in choices]
    if any(len(own) > 1 for own in found) or sum(map(len, found)) < len(words):
        possible = ', '.join('|'.join(choice) for choice in choices)
        raise ValueError(f'{argument!r} is not understood; behind the colon stand words of {possible}, one of each')
    return tuple((own or choice)[0] for own, choice in zip(found, choices, strict=True))
