"""preftune aligns causal language models with preferences: exactly, fast, honestly. Start in `recipes/`."""

__version__ = "0.1.0"
__all__ = ["__version__"]
