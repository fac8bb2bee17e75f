"""The command `key`: makes an API key and the lines that admit it. Imported by the CLI."""

import click

from serve.keys import KeyEntry, digest, new_key


@click.command()
@click.argument("tenant")
@click.option("--priority", type=int, default=0, show_default=True, help="Lower goes first.")
@click.option("--share", type=float, default=1.0, show_default=True, help="Weight among tenants.")
def key(tenant: str, priority: int, share: float) -> None:
    """Make an API key for TENANT and the lines to add to http.api_keys_file."""
    made = new_key()
    entry = KeyEntry(tenant=tenant, sha256=digest(made), priority=priority, share=share)
    click.echo(f"The key, shown this once:\n  {made}\n\nAdd to the file of http.api_keys_file:\n")
    click.echo("[[key]]")
    for name, value in entry.model_dump().items():
        click.echo(f'{name} = "{value}"' if isinstance(value, str) else f"{name} = {value}")
