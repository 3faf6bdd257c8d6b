"""Draw the losses of a run.

python examples/shapes/curves.py LOG.jsonl PICTURE.png ce mse
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, LEFT, BOTTOM = 720, 360, 60, 40
COLORS = ("#c0392b", "#2a6fb0", "#2e8b57", "#8e44ad")


def curves(log: Path, names: list[str]) -> Image.Image:
    """Return an image of values over steps, on a logarithmic scale."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    last = lines[-1]["step"]
    values = [line[name] for line in lines for name in names if line[name] > 0]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)

    def place(step: float, value: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - 20) * step / last
        up = (math.log10(value) - low) / max(high - low, 1)
        return across, HEIGHT - BOTTOM - (HEIGHT - BOTTOM - 20) * up

    for power in range(low, high + 1):
        _, y = place(0, 10.0**power)
        draw.line([(LEFT, y), (WIDTH - 20, y)], fill="#dddddd")
        draw.text((8, y - 8), f"{10.0**power:g}", fill="black", font=font)
    for part in range(5):
        x, _ = place(last * part / 4, 10.0**low)
        draw.text((x - 20, HEIGHT - BOTTOM + 12), f"{last * part // 4}", fill="black", font=font)
    for index, (name, color) in enumerate(zip(names, COLORS, strict=False)):
        points = [place(line["step"], line[name]) for line in lines if line[name] > 0]
        draw.line(points, fill=color, width=2)
        draw.text((WIDTH - 120, 20 + 20 * index), name, fill=color, font=font)
    return image


if __name__ == "__main__":
    curves(Path(sys.argv[1]), sys.argv[3:]).save(sys.argv[2])
