"""Entry point of `python -m llava_bidir`."""

from .cli import main

if __name__ == "__main__":
    main()
