"""Files that try to run code, to leave their folder, or to grow without bound; and a fuzzer. See docs/security.md."""
