"""What a token may attend to, by the definition."""


def positions_seen(position: int, sink: int, window: int, own_window: int | None = None) -> set[int]:
    """The `sink` first tokens and the `window` most recent ones, itself included, as of `position`.

    A layer with a window of its own sees of these what is nearer than that, where a sink is never farther away than it was
    when the first token was evicted.
    """
    held = {other for other in range(position + 1) if other < sink or position - other < window}
    if own_window is None:
        return held
    near = min(position, sink + window - 1)
    return {other for other in held if (near if other < sink else position) - other < own_window}
