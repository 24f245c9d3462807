"""What must be true of every SQLite store at the end of every transaction: queries that count what breaks a rule."""

from __future__ import annotations

from storage import sqlite_near

INVARIANTS = (
    ("SELECT count(*) FROM entry WHERE id NOT IN (SELECT entry FROM body)", "entries without an answer"),
    ("SELECT count(*) FROM body WHERE entry NOT IN (SELECT id FROM entry)", "answers without an entry"),
    (
        "SELECT count(*) FROM entry JOIN body ON entry = id WHERE size <> length(answer)",
        "entries with the size of another",
    ),
    ("SELECT count(*) FROM entry WHERE expires_ms < stored_ms OR hits < 0", "entries with impossible times or counts"),
    (
        """SELECT (
          SELECT count(*) FROM topic LEFT JOIN (SELECT topic AS id, count(*) AS there FROM entry GROUP BY topic)
          USING (id) WHERE entries IS NOT there
        ) + (SELECT count(DISTINCT topic) FROM entry WHERE topic NOT IN (SELECT id FROM topic))""",
        "topics with too few or too many entries",
    ),
    *sqlite_near.INVARIANTS,
)
"""Each a query whose single value is how many there are, and what they are."""
