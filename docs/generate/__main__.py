"""Write every generated page whose text has changed, and name it."""

from __future__ import annotations

from pathlib import Path

from docs.generate import pages

DOCS = Path(__file__).resolve().parents[1]

for name, text in pages().items():
    path = DOCS / name
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
        print(f"wrote docs/{name}")
