"""How it arrives: the HTTP server, its routes, headers, metrics and logs."""
