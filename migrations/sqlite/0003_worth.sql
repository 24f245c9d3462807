-- Where a bound is exceeded, what is worth least goes first: see storage/worth.py.
ALTER TABLE entry ADD COLUMN worth REAL NOT NULL DEFAULT 0;
UPDATE entry SET worth = (1 + hits) * max(cost_ms, 1) / (size + 3000.0);

CREATE TABLE ageing (
  id    INTEGER PRIMARY KEY CHECK (id = 1),
  floor REAL    NOT NULL
) STRICT;

INSERT INTO ageing (id, floor) VALUES (1, 0);

-- Namespace, model and system prompt, digested.
ALTER TABLE entry ADD COLUMN topic INTEGER NOT NULL DEFAULT 0;

-- How long after it expired an entry is kept, for times of trouble.
ALTER TABLE entry ADD COLUMN grace_ms INTEGER NOT NULL DEFAULT 0 CHECK (grace_ms >= 0);

-- Whether `body.answer` is encrypted.
ALTER TABLE entry ADD COLUMN sealed INTEGER NOT NULL DEFAULT 0 CHECK (sealed IN (0, 1));

DROP INDEX entry_by_use;
DROP INDEX entry_by_expiry;
CREATE INDEX entry_by_end ON entry (expires_ms + grace_ms);
CREATE INDEX entry_by_worth ON entry (worth);
CREATE INDEX entry_by_topic ON entry (topic, worth, hits);

-- How many topics there are is asked whenever something must go.
CREATE TABLE topic (
  id      INTEGER PRIMARY KEY,
  entries INTEGER NOT NULL CHECK (entries > 0)
) STRICT;

INSERT INTO topic (id, entries) SELECT topic, count(*) FROM entry GROUP BY topic;

CREATE TRIGGER entry_came AFTER INSERT ON entry BEGIN
  INSERT INTO topic (id, entries) VALUES (new.topic, 1) ON CONFLICT (id) DO UPDATE SET entries = entries + 1;
END;

CREATE TRIGGER entry_went AFTER DELETE ON entry BEGIN
  DELETE FROM topic WHERE id = old.topic AND entries = 1;
  UPDATE topic SET entries = entries - 1 WHERE id = old.topic;
END;

-- Moves with every entry that is removed or replaced on purpose, so that other processes stop serving it from memory.
CREATE TABLE generation (
  id    INTEGER PRIMARY KEY CHECK (id = 1),
  moved INTEGER NOT NULL
) STRICT;

INSERT INTO generation (id, moved) VALUES (1, 0);
