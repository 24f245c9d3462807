"""Commands on the database file, whether or not nearhit runs: migrate, backup."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from proxy.commands.options import EXIT_CONFIG, load_settings, stop, with_settings
from storage.base import StorageCorrupt, StorageError, StorageFull, StorageRefused
from storage.sqlite_backup import Copied, DestinationRefused, back_up
from storage.sqlite_offline import Schema, bring_up_to_date, refuse_too_new, schema_of


@click.command()
@with_settings
@click.option("--dry-run", is_flag=True, help="Say what is missing, and do nothing.")
@click.option("--no-backup", is_flag=True, help="Do not copy the file first.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def migrate(config_file: Path | None, *, dry_run: bool, no_backup: bool, as_json: bool, **flags: Any) -> None:
    """Bring the database file up to the schema of this nearhit, as its next start would.

    A copy of the file is kept beside it as FILE.schema-N.bak, where N is its old schema. Stop an older nearhit that
    runs on the file first.

    Example: nearhit migrate --dry-run
    """
    path = _file(config_file, flags)
    kept: Path | None = None
    applied = 0
    with _told(path):
        schema = schema_of(path)
        refuse_too_new(schema)
        if schema.missing and not dry_run:
            if not no_backup:
                kept = _free(path, schema)
                _copied(path, kept, replace=False)
            applied = bring_up_to_date(path)
    if as_json:
        told = {
            "file": str(path),
            "schema": schema.number,
            "known": schema.known,
            "missing": list(schema.missing),
            "applied": applied,
            "backup": None if kept is None else str(kept),
        }
        click.echo(json.dumps(told, indent=2))
        return
    _tell(path, schema, applied, kept, is_dry=dry_run)


@click.command()
@click.argument("destination", type=click.Path(path_type=Path))
@with_settings
@click.option("--force", is_flag=True, help="Replace DESTINATION if it exists.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def backup(destination: Path, config_file: Path | None, *, force: bool, as_json: bool, **flags: Any) -> None:
    """Copy the database to the file DESTINATION, also while nearhit runs.

    The copy is checked and whole, or not there. To go back to it: stop nearhit, remove FILE-wal and FILE-shm beside the
    database FILE, put the copy in its place, start.

    Example: nearhit backup nearhit-backup.db
    """
    path = _file(config_file, flags)
    began = time.monotonic()
    with _told(path):
        copied = _copied(path, destination, replace=force)
    seconds = round(time.monotonic() - began, 2)
    if as_json:
        told = {"file": str(destination), "bytes": copied.bytes, "entries": copied.entries, "seconds": seconds}
        click.echo(json.dumps(told, indent=2))
    else:
        click.echo(f"{destination}: {copied.entries} entries, {copied.bytes / 2**20:,.1f} MiB, in {seconds:g} s")


def _file(config_file: Path | None, flags: Mapping[str, Any]) -> Path:
    path = load_settings(config_file, flags).settings.database
    if path is None:
        stop("cache.persist is off: there is no database file")
    if not path.exists():
        stop(f"there is no database {path}: the first start of nearhit makes it, up to date; or give --cache-file")
    return path


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Storage's errors in one line each, and what to do."""
    try:
        yield
    except DestinationRefused as error:
        stop(str(error))
    except StorageRefused as error:
        stop(str(error), EXIT_CONFIG)
    except StorageCorrupt as error:
        stop(
            f"{path} is corrupt ({error}); it was left as it is. The next start of nearhit sets it aside and begins a "
            "new one; to go back to a backup, see docs/troubles.md"
        )
    except StorageFull as error:
        stop(f"{error}: is the disk full, or not writable? Nothing was changed")
    except StorageError as error:
        stop(f"{path}: {error}; nothing was changed")
    except KeyboardInterrupt:
        stop("stopped; nothing was changed", 130)


def _free(path: Path, schema: Schema) -> Path:
    """A name for a copy that no earlier one has."""
    names = (f"{path.name}.schema-{schema.number}{f'-{n}' if n > 1 else ''}.bak" for n in count(1))
    return next(kept for kept in map(path.with_name, names) if not kept.exists())


def _tell(path: Path, schema: Schema, applied: int, kept: Path | None, *, is_dry: bool) -> None:
    if not schema.missing:
        click.echo(f"{path} has schema {schema.number}: up to date")
        return
    click.echo(f"{path} has schema {schema.number}, this nearhit has {schema.known}")
    for name in schema.missing:
        click.echo(f"  {name}")
    if kept is not None:
        click.echo(f"kept as it was: {kept}")
    if is_dry:
        click.echo("nothing was done: this was a dry run")
    elif applied:
        click.echo(f"up to date now: {applied} applied")
    else:
        click.echo("up to date now: another nearhit has done it meanwhile")


def _copied(path: Path, destination: Path, *, replace: bool) -> Copied:
    console = Console(stderr=True)
    with Progress(
        SpinnerColumn(),
        TextColumn("copying the database"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f} %"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("", total=None)

        def told(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        return back_up(path, destination, replace=replace, progress=told)
