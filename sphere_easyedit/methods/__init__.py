"""Base methods, one file each; see ``base`` for how to add one."""
