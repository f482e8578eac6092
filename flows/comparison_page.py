"""A comparison as a page in the Prefect UI, with its picture."""

import base64
import io
import tempfile
from pathlib import Path

from PIL import Image

from flows.comparison import Comparison, markdown
from flows.comparison_picture import draw_comparison
from flows.markdown_page import MarkdownPage

__all__ = ["show_comparison"]

_WIDTH_PX = 1000


def show_comparison(found: Comparison) -> bool:
    """Put it under one key for this pair of processings; whether the server took it."""
    with tempfile.TemporaryDirectory() as folder:
        picture = _embedded(draw_comparison(Path(folder) / "comparison.png", found))
    page = MarkdownPage(f"compare-{found.a.name}-{found.b.name}", "two processings side by side")
    return page.show(markdown(found, picture))


def _embedded(path: Path) -> str:
    with Image.open(path) as picture:
        small = picture.convert("RGB")
        small.thumbnail((_WIDTH_PX, _WIDTH_PX))
        buffer = io.BytesIO()
        small.save(buffer, "PNG", optimize=True)
    return f"![histograms and rates](data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()})"
