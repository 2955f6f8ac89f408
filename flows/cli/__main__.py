"""``python -m flows.cli``: the command ``gradaudit``."""

from __future__ import annotations

from flows.cli.entry import main

if __name__ == "__main__":
    main()
