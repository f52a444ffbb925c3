"""``python -m bn_det`` is ``bn-det``."""

from .cli.main import main

if __name__ == "__main__":
    main()
