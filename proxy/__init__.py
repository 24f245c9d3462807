"""nearhit: a caching reverse proxy for LLM servers that people run themselves."""

__version__ = "0.1.0"
