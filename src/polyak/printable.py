"""Makes text from files safe for a terminal. It does not import torch, since the command line imports this first."""


def printable(text: str) -> str:
    r"""Return text with unprintable characters escaped, so that a terminal shows them and does not obey them.

    Args:
        text: Any, such as the name of a tensor.

    Example:
        >>> printable("\x1b[2J is no name\u202e")
        '\\x1b[2J is no name\\u202e'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
