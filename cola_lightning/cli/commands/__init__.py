"""Commands without a Trainer, one file each; :mod:`cola_lightning.cli.app` lists this folder.

The name of a file is the name of its command, the first line of its docstring is its line in ``--help``. It has

- ``GROUP``: the group in ``--help``, one of those of :data:`cola_lightning.cli.app.GROUPS`;
- ``parse(args)``: make options of what was typed. It imports nothing heavy where that can be avoided;
- ``run(options)``: import the package that does the work, and call it.
"""
