"""Test files that try to run code, leave their folder, or grow without bound, and a fuzzer. See docs/security.md."""
