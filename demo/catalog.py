"""What sellers submit, made up; and what the catalog's branches make of it: their work, without its weight."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

_COLORS = ("red", "green", "blue", "black", "white")
_THINGS = ("lamp", "chair", "kettle", "bicycle", "umbrella", "teapot")
_HEIGHTS = (1080, 720, 480, 240)
_WIDTHS = (64, 256, 1024)


def submission(chance: random.Random, product_id: str, *, playable: bool) -> dict[str, Any]:
    """What a seller sends: a text, a price, images, and a video that may be of a kind nobody can play."""
    title = f"{chance.choice(_COLORS)} {chance.choice(_THINGS)}"
    return {
        "product_id": product_id,
        "seller": f"seller-{chance.randrange(40)}",
        "title": title,
        "price": chance.randint(5, 99),
        "images": [f"{product_id}-{number}.png" for number in range(chance.randint(1, 4))],
        "video": {
            "format": "mp4" if playable else "vhs",
            "height": chance.choice(_HEIGHTS),
            "seconds": chance.randint(5, 90),
        },
    }


def facts(submitted: Mapping[str, Any]) -> dict[str, Any]:
    """What the catalog searches by."""
    color, thing = submitted["title"].split(" ", 1)
    return {
        "title": submitted["title"],
        "seller": submitted["seller"],
        "price": submitted["price"],
        "tags": [color, thing],
    }


def renditions(video: Mapping[str, Any]) -> list[str]:
    """The sizes a video is shown in: its own, and all below.

    Raises:
        ValueError: of a kind that nobody can play.
    """
    if video["format"] != "mp4":
        raise ValueError(f"a video of format {video['format']!r}, which nobody can play")
    return [f"{height}p" for height in _HEIGHTS if height <= video["height"]]


def thumbnails(images: Sequence[str]) -> list[str]:
    """The images in all widths."""
    return [f"{image.removesuffix('.png')}@{width}.png" for image in images for width in _WIDTHS]
