"""The command line, ``sphere-easyedit``: ``app`` registers the commands, each of which has a module of its own."""


def main() -> None:
    """Run the command line (see ``app.main``)."""
    from .app import main as run  # typer and rich are imported only here

    run()
