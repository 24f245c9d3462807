"""What an engine is: everything that is asked of a store."""

from __future__ import annotations

from typing import Protocol

from storage.base import Bounds, Coherence, Entries, Facts, Inspection, Keys, Shredding, Sketches, Vetoes
from storage.listing import Finding, Listing


class Store(
    Entries, Keys, Sketches, Vetoes, Bounds, Shredding, Coherence, Facts, Finding, Listing, Inspection, Protocol
):
    """A whole engine. Engines are opened by async context managers and closed by leaving them."""
