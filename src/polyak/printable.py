"""Text out of files, made safe for a terminal. No torch here: the command line imports this first."""


def printable(text: str) -> str:
    r"""Return text with what is not printable escaped: a terminal obeys nothing in it, and shows all of it.

    Args:
        text: Any, such as the name of a tensor.

    Example:
        >>> printable("\x1b[2J is no name\u202e")
        '\\x1b[2J is no name\\u202e'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
