"""``python -m sphere_easyedit``."""

from .cli import main

main()
