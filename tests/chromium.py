"""Pages in Debian's chromium, without a screen and without a driver: a script in the page says what it saw."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NEEDED = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
# What a page's script returns goes into the title of the page around it.
RETURNS = """<script>(async () => {{ const see = async () => {{ {script} }};
  const seen = await see().catch((error) => "raised " + error + error.stack);
  (parent.seen ??= [])[{number}] = seen;
  parent.document.title = JSON.stringify(parent.seen); }})()</script></body>"""


def dumped(page: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """What a browser makes of a page."""
    (folder / "report.html").write_text(page, encoding="utf-8")
    assert CHROMIUM is not None
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--dump-dom"]
    arguments += [f"--user-data-dir={folder / 'profile'}", *options, f"file://{folder / 'report.html'}"]
    return subprocess.run([CHROMIUM, *arguments], capture_output=True, text=True, timeout=120, check=False)


def framed(
    pages: Sequence[str],
    folder: Path,
    script: str,
    *,
    library: str = "",
    widths: Sequence[int] = (390,),
    schemes: Sequence[str] = ("light",),
) -> list[Any]:
    """What the script returns in each page, for each width and colour scheme; a promise is waited for.

    ``library`` is a script that runs before.
    """
    # A browser without a screen has no window as narrow as a telephone, but a frame, whose scheme is that of its element.
    before = f"<script>{library}</script>" if library else ""
    frames = ""
    number = 0
    for page in pages:
        for width in widths:
            for scheme in schemes:
                text = page.replace("</body>", before + RETURNS.format(script=script, number=number))
                style = f"width: {width}px; height: 800px; border: 0; color-scheme: {scheme}"
                frames += f'<iframe style="{style}" srcdoc="{escape(text, quote=True)}"></iframe>'
                number += 1
    ran = dumped(f"<title></title>{frames}", folder, "--virtual-time-budget=60000")
    (title,) = re.findall("<title>(.*?)</title>", ran.stdout.partition("<iframe")[0], re.DOTALL) or [ran.stderr]
    seen: list[Any] = json.loads(unescape(title))
    assert len(seen) == number
    return seen
