"""Questions that are asked before clients ask them. Nothing here prints."""
