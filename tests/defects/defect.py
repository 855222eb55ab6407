"""What a known defect is."""

from dataclasses import dataclass

SLIP = "a slip of the pen"
SHIPPED = "shipped in a published trainer"


@dataclass(frozen=True)
class Defect:
    """One replacement of text that stands once in its file."""

    name: str
    origin: str  # where it was seen, or how it happens
    file: str
    old: str
    new: str
    test: str  # a pytest node below tests/ that must fail
    error: str = ""  # how its message starts, where the test fails by an error and not an assert
