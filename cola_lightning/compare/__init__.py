"""Train several methods under equal conditions, and compare them."""
