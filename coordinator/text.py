"""Text from the wire, fit to be shown in a terminal and kept in a log."""

LONGEST_NAME = 64  # of a client, in letters


def printable(text: str, most: int = LONGEST_NAME) -> str:
    """Its printable letters, at most so many."""
    return "".join(letter for letter in text if letter.isprintable())[:most].strip()
