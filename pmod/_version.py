"""The version, written here and nowhere else: pyproject.toml reads it from this file,
and `pmod.__version__` is it.
"""

__version__ = "0.2.0"
