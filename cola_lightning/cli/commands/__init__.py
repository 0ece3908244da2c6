"""Commands that need no Trainer loop, one file each."""
