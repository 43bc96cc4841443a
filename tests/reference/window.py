"""What a token may attend to, by the definition."""


def positions_seen(position: int, sink: int, window: int) -> set[int]:
    """The `sink` first tokens and the `window` most recent ones, itself included, as of `position`."""
    return {other for other in range(position + 1) if other < sink or position - other < window}
