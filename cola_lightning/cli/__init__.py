"""What can be typed: Lightning's commands and this package's own."""
