"""The functions of a help desk's stack. `stack.yaml` names them, and `pyproject.toml` says where they are."""

from __future__ import annotations

import re
from typing import Literal

from fluxibly import ProviderError, Request, Response, ToolCall
from fluxibly.errors import BadRequest

ORDERS = {"A-1041": "on its way, expected tomorrow", "A-1042": "waiting for payment"}
WEATHER = {"paris": 21, "oslo": 12}
LONGEST = 20_000


def get_weather(city: str, unit: Literal["celsius", "fahrenheit"] = "celsius") -> dict[str, object]:
    """Return the temperature in a city.

    Args:
        city: the city's name, such as "Paris".
        unit: the unit of the temperature.
    """
    degrees = WEATHER.get(city.lower())
    if degrees is None:
        raise ValueError(f"expected one of {', '.join(WEATHER)}, got {city!r}")
    return {"city": city, "temperature": degrees if unit == "celsius" else degrees * 9 / 5 + 32, "unit": unit}


def order_status(order: str) -> str:
    """Return the state of an order.

    Args:
        order: the number of the order, as the customer gives it.
    """
    return ORDERS.get(order, f"there is no order {order}")


def only_reads(call: ToolCall) -> bool:
    """Approve the tools that change nothing."""
    return call.name in ("get_weather", "order_status")


def order_number(text: str) -> list[tuple[int, int]]:
    """Find the order numbers in a text."""
    return [match.span() for match in re.finditer(r"\bA-\d{4}\b", text)]


def not_too_long(request: Request) -> str | None:
    """Refuse prompts that are longer than any question to a help desk."""
    return f"longer than {LONGEST} characters" if request.prompt_length > LONGEST else None


def promises_nothing(response: Response) -> str | None:
    """Refuse answers that promise a refund."""
    return "it promises a refund" if "refund you" in response.text.lower() else None


def other_model_may_help(error: Exception) -> bool:
    """Ask the next model after every failure of a service, but not after a request that is wrong for all of them."""
    return isinstance(error, ProviderError) and not isinstance(error, BadRequest)


def customer(request: Request) -> str:
    """Return the customer whose budget pays."""
    return str(request.metadata.get("customer", "everybody"))
