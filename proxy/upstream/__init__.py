"""Who answers: the HTTP client, one adapter a kind of server, its identity, and whether it checks keys."""
