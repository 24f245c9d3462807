-- One stored answer a row. The answer itself lives in `body`, so that counting a hit rewrites no answer.
CREATE TABLE entry (
  id                INTEGER PRIMARY KEY,
  key               BLOB    NOT NULL UNIQUE CHECK (length(key) = 32),
  key_version       INTEGER NOT NULL,
  namespace         BLOB    NOT NULL,
  space             BLOB    NOT NULL CHECK (length(space) = 32),
  upstream          TEXT    NOT NULL,
  fingerprint       BLOB    NOT NULL,
  endpoint          TEXT    NOT NULL,
  model             TEXT    NOT NULL,
  words             TEXT,
  stored_ms         INTEGER NOT NULL,
  expires_ms        INTEGER NOT NULL,
  cost_ms           INTEGER NOT NULL,
  prompt_tokens     INTEGER,
  completion_tokens INTEGER,
  usage_known       INTEGER NOT NULL CHECK (usage_known IN (0, 1)),
  size              INTEGER NOT NULL,
  hits              INTEGER NOT NULL DEFAULT 0,
  used_ms           INTEGER NOT NULL
) STRICT;

CREATE INDEX entry_by_expiry ON entry (expires_ms);
CREATE INDEX entry_by_use ON entry (used_ms);

CREATE TABLE body (
  entry  INTEGER PRIMARY KEY REFERENCES entry (id) ON DELETE CASCADE,
  answer BLOB NOT NULL
) STRICT;

-- What is known of an upstream between two runs: its fingerprint, whether it checks keys.
CREATE TABLE fact (
  upstream TEXT    NOT NULL,
  name     TEXT    NOT NULL,
  value    TEXT    NOT NULL,
  noted_ms INTEGER NOT NULL,
  PRIMARY KEY (upstream, name)
) STRICT, WITHOUT ROWID;
