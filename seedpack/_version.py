"""The version of this package, and the name that files give their writer. Standard library only."""

__version__ = "0.1.0"
WRITER = f"seedpack {__version__}"
