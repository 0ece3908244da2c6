"""Train several methods on equal terms, and put them side by side."""
