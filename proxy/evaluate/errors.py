"""What stops an evaluation."""

from __future__ import annotations


class EvaluationError(Exception):
    """A file cannot be evaluated; the message names it, and the line where there is one."""
