"""The prices of the shop: always the same ones for the same day."""

from datetime import datetime, timezone
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

_PRODUCTS, _HOURS = 200, 365 * 24


def prices() -> "dict[str, pd.Series]":
    """One row per product and hour of the year before today: ``product_id``, ``at``, ``price``."""
    import numpy as np
    import pandas as pd

    today = datetime.now(timezone.utc).replace(hour=0, minute=0, second=0, microsecond=0)
    hours = pd.date_range(end=today, periods=_HOURS, freq="h")
    chance = np.random.default_rng(today.toordinal())
    product = np.repeat(np.arange(_PRODUCTS), _HOURS)
    hour = np.tile(hours.hour.to_numpy(), _PRODUCTS)
    wave = 1 + 0.1 * np.sin((hour - product % 24) * np.pi / 12)
    return {
        "product_id": pd.Series(product).map("p{}".format),
        "at": pd.Series(hours[np.tile(np.arange(_HOURS), _PRODUCTS)]),
        "price": pd.Series(np.round((5 + product % 95) * wave * chance.uniform(0.95, 1.05, len(product)), 2)),
    }
