"""`config`: what a node would run with, and where each setting comes from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from agi.core.dht.cli import output
from agi.core.dht.cli.connection import AsJson

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

File = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="YAML file.", show_default=False)]


@app.callback()
def _config() -> None:
    """Check and show the settings of a node."""


@app.command()
def check(config: File = None, as_json: AsJson = False) -> None:
    """Check settings: those of the file and of DHT_* in the environment.

    The first mistake is one line that names file and line, or the variable; exit code 11.

    --json prints {"ok": true, "settings": how many are set}.

    Example:

        agi-dht config check --config configs/dht_config.yaml
    """
    from agi.core.dht.config import load_config

    loaded = load_config(config, os.environ, {})
    if as_json:
        output.document({"ok": True, "settings": len(loaded.sources)})
    else:
        output.line(f"ok: {len(loaded.sources)} settings given, the others have their defaults")


@app.command()
def show(
    config: File = None,
    given: Annotated[bool, typer.Option("--given", help="Leave out the defaults.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show every setting, its value and where that comes from; passwords are masked.

    --json prints {"dht.network.port": {"value": text as YAML has it, "source": text}, ...}.

    Examples:

        agi-dht config show --config configs/dht_config.yaml

        DHT_PORT=7100 agi-dht config show --given
    """
    from agi.core.dht.config import load_config

    loaded = load_config(config, os.environ, {})
    rows = [row for row in loaded.describe() if not given or row[0] in loaded.sources]
    if as_json:
        output.document({key: {"value": value, "source": source} for key, value, source in rows})
    else:
        output.table(("setting", "value", "source"), rows)
