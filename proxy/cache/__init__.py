"""What to do with a call: read it, look it up, decide, fetch once, keep. Knows no HTTP server."""
