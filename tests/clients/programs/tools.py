"""The tool that every program offers to the model."""

from __future__ import annotations

from typing import Any

PARAMETERS: dict[str, Any] = {"type": "object", "properties": {"room": {"type": "string"}}, "required": ["room"]}
LIGHT: dict[str, Any] = {
    "type": "function",
    "function": {"name": "switch_light", "description": "Switch a light", "parameters": PARAMETERS},
}
