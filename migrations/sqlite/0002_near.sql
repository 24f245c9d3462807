-- The near tier: which entries may be served for words that are nearly theirs, and how those are found.
ALTER TABLE entry ADD COLUMN near INTEGER NOT NULL DEFAULT 0 CHECK (near IN (0, 1));

-- One row for each near entry that has words. Until its sketch is made, `scheme` is null and there are no keys.
CREATE TABLE sketch (
  entry    INTEGER PRIMARY KEY REFERENCES entry (id) ON DELETE CASCADE,
  scheme   INTEGER,
  skeleton TEXT    NOT NULL DEFAULT '',
  keys     BLOB    NOT NULL DEFAULT x'' CHECK (length(keys) % 8 = 0)
) STRICT;

-- Whether something is left to sketch is asked every few seconds.
CREATE INDEX sketch_by_scheme ON sketch (scheme);

-- By far the most rows. An index by entry would double them: those of an entry are found by `sketch.keys`, little-endian.
CREATE TABLE band (
  key   INTEGER NOT NULL,
  entry INTEGER NOT NULL,
  PRIMARY KEY (key, entry)
) STRICT, WITHOUT ROWID;

-- What the numbers in `sketch.scheme` stand for.
CREATE TABLE scheme (
  id          INTEGER PRIMARY KEY,
  description TEXT    NOT NULL,
  noted_ms    INTEGER NOT NULL
) STRICT;

-- Pairs that must never match again, by their digest.
CREATE TABLE veto (
  pair     BLOB    NOT NULL PRIMARY KEY,
  noted_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
