import sys

from cola_lightning import signals

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in ("fit", "validate", "test", "predict"):
        signals.die_with_launcher()
        signals.LISTENER.listen()  # importing the rest takes seconds
    from cola_lightning.cli import main

    main()
