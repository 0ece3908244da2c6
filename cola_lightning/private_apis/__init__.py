"""Uses of private APIs of libraries, one file for each library, each use behind a small function.

A new version may change such an API without notice. Each file lists at its end what it was written for, and
:func:`cola_lightning.private_apis.checks.check_private_apis` compares that with what is installed, and names what has
changed. The command line calls it before a run, and the tests call it in full. No other file of this package uses a
private API (tests/test_private_apis.py). CONTRIBUTING.md describes the upgrade of a library.
"""
